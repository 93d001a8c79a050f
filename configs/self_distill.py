"""Self-distillation: the student is its own teacher.

    jaxkd train --config configs/self_distill.py --workdir runs/self
    jaxkd train --config configs/self_distill.py:frozen --workdir runs/self_frozen

The argument is "ema" (default), a running average of the student's parameters that moves by 1% a step (mean teacher,
arXiv 1703.01780), or "frozen", the student before the first step, which keeps a model near itself while it learns new
text. The average is part of the train state: checkpointed, sharded like the student, one more copy of its parameters.
For born-again networks (arXiv 1805.04770), a teacher of the same size that was trained before, export that run and
give its path as an ordinary teacher. Model and data as in configs/quickstart.py, 32 rows of each domain.
"""

from ml_collections import ConfigDict

DOMAINS = ("code", "manual", "legal", "scripture", "dialogue", "math")
LAYERS = (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29)


def get_config(arg: str = "ema") -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    if arg not in ("ema", "frozen"):
        raise ValueError(f"configs/self_distill.py takes ema or frozen, got '{arg}'")
    return ConfigDict(
        {
            "teacher": {"path": "self", "decay": 1.0 if arg == "frozen" else 0.99},
            "student": {"path": "smollm2-135m-instruct", "layers": LAYERS},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 1.0},
                "ce": {"divergence": "next_token", "weight": 0.5},
            },
            "data": {
                "domains": {name: f"builtin:{name}" for name in DOMAINS},
                "mixture": "uniform",
                "interval": 12,
                "batch": 4,
                "length": 128,
                "train_rows": 32,
                "valid_rows": 4,
            },
            "optim": {"lr": {"schedule": "cosine", "peak": 8e-4, "warmup": 3, "end": 4e-5}},
            "run": {"steps": 48, "eval_batch": 4, "checkpoint_every": 48, "keep_checkpoints": 1},
        }
    )
