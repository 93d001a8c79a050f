"""Sequence-level KD: the student learns the teacher's own text (Kim and Rush 2016, arXiv 1606.07947).

    jaxkd cache --config configs/sequence_kd.py
    jaxkd train --config configs/sequence_kd.py --workdir runs/sequence_kd

The teacher goes on from the first 32 tokens of each row, drawing at temperature 1, and the student is trained on
what it wrote; prompts have no weight. `--config.teacher.temperatures="(0.0,)"` takes the most probable token each
time, and `--config.teacher.cache=` makes the text anew in every step. Only terms that need no distribution can learn
from text. Teacher and data as in configs/quickstart.py, 32 rows of each domain.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; it takes no argument."""
    if arg:
        raise ValueError(f"configs/sequence_kd.py takes no argument, got '{arg}'")
    return ConfigDict(
        {
            "teacher": {
                "path": "smollm2-135m-instruct",
                "dtype": "float32",
                "signal": "token",
                "prompt": 32,
                "temperatures": (1.0,),
                "cache": "cache/text",
            },
            "student": {
                "path": "teacher",
                "layers": (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29),
                "keep": 0,
            },
            "objective": {
                "ce": {"divergence": "next_token", "weight": 1.0},
            },
            "data": {
                "domains": {
                    "code": "builtin:code",
                    "manual": "builtin:manual",
                    "legal": "builtin:legal",
                    "scripture": "builtin:scripture",
                    "dialogue": "builtin:dialogue",
                    "math": "builtin:math",
                },
                "directory": "rows",
                "tokenizer": "teacher",
                "text_key": "text",
                "mixture": "uniform",
                "interval": 12,
                "batch": 4,
                "length": 128,
                "train_rows": 32,
                "valid_rows": 4,
                "valid_share": 0.05,
            },
            "optim": {
                "lr": {"schedule": "cosine", "peak": 8e-4, "warmup": 3, "end": 4e-5},
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip": 1.0,
                "micro_batches": 1,
            },
            "run": {
                "steps": 48,
                "seed": 0,
                "dtype": "float32",
                "remat": "none",
                "mesh": {"data": -1, "model": 1},
                "eval_every": 0,
                "eval_batch": 4,
                "checkpoint_every": 48,
                "keep_checkpoints": 1,
                "log_every": 1,
            },
        }
    )
