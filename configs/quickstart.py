"""A real teacher distilled into a student with half its layers, on a laptop CPU, in minutes.

    bash launch/local.sh
    jaxkd train --config configs/quickstart.py --workdir runs/quickstart

Teacher: SmolLM2-135M-Instruct. Student: its fifteen most important layers, 81M parameters. Data: six domains of
real text that come with Python packages. Objective: forward KL to the teacher (Hinton et al. 2015, arXiv
1503.02531) plus next-token cross-entropy. Runtime and the expected numbers are in docs/results.md.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; it takes no argument."""
    if arg:
        raise ValueError(f"configs/quickstart.py takes no argument, got '{arg}'")
    return ConfigDict(
        {
            "teacher": {"path": "smollm2-135m-instruct", "dtype": "float32"},
            # Those whose loss was largest when left out, on other text; `--config.student.layers=()` with
            # `--config.student.keep=15` measures it on this run's own rows, in about half a minute.
            "student": {
                "path": "teacher",
                "layers": (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29),
                "keep": 0,
            },
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 1.0, "temperature": 1.0},
                "ce": {"divergence": "next_token", "weight": 0.5},
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
                "train_rows": 400,
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
                "steps": 24,
                "seed": 0,
                "dtype": "float32",
                "remat": "none",
                "mesh": {"data": -1, "model": 1},
                "eval_every": 12,
                "eval_batch": 4,
                "checkpoint_every": 12,
                "keep_checkpoints": 1,
                "log_every": 1,
            },
        }
    )
