"""Sequence-level KD: the student learns text written by the teacher (Kim and Rush 2016, arXiv 1606.07947).

    jaxkd cache --config configs/sequence_kd.py
    jaxkd train --config configs/sequence_kd.py --workdir runs/sequence_kd

The teacher continues the first 32 tokens of each row at temperature 1, and the student is trained on the continuation;
prompts have weight 0. `--config.teacher.temperatures=0.0` takes the most probable token each time, and
`--config.teacher.cache=` writes new text in every step. Only terms that need no distribution can learn from text.
Teacher and data as in configs/quickstart.py, 32 rows of each domain.
"""

from ml_collections import ConfigDict

DOMAINS = ("code", "manual", "legal", "scripture", "dialogue", "math")
LAYERS = (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29)


def get_config() -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    return ConfigDict(
        {
            "teacher": {"path": "smollm2-135m-instruct", "signal": "token", "cache": "cache/text"},
            "student": {"layers": LAYERS},
            "objective": {"ce": {"divergence": "next_token", "weight": 1.0}},
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
