"""Self-distillation: the student is its own teacher.

    jaxkd train --config configs/self_distill.py --workdir runs/self
    jaxkd train --config configs/self_distill.py:frozen --workdir runs/self_frozen

The argument is "ema" (default), a running average of the student's own parameters that moves by 1% a step (mean
teacher, arXiv 1703.01780), or "frozen", the student as it was before the first step, which holds a model near
itself while it learns new text. The average is part of the train state: it is checkpointed, sharded as the student
is, and costs its memory once. A teacher of the same size that was trained before (born-again networks, arXiv
1805.04770) is an ordinary teacher: export it and give its path. Model and data as in configs/quickstart.py, 32 rows
of each domain.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; the argument is which of its selves teaches."""
    if arg not in ("", "ema", "frozen"):
        raise ValueError(f"configs/self_distill.py takes ema or frozen, got '{arg}'")
    return ConfigDict(
        {
            "teacher": {"path": "self", "decay": 1.0 if arg == "frozen" else 0.99},
            "student": {
                "path": "smollm2-135m-instruct",
                "layers": (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29),
                "keep": 0,
            },
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 1.0},
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
