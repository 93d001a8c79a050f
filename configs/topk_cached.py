"""A cached top-k teacher with its tail: no teacher in memory, and any divergence.

    jaxkd cache --config configs/topk_cached.py
    jaxkd train --config configs/topk_cached.py --workdir runs/topk_cached
    jaxkd train --config configs/topk_cached.py:8 --workdir runs/topk_cached_8      # after `jaxkd cache` of the same

The argument is K (default: 64). The cache holds the K largest log-probabilities, and the mass of all other ids as one
bucket at each of `teacher.temperatures`; another temperature is refused. A divergence over these K + 1 entries never
exceeds the one over the full vocabulary (docs/losses.md), and it bounds the mass that the student puts off the K.
What it costs on disk and in KL: docs/results.md. Teacher and data as in configs/quickstart.py, 32 rows of each domain.
"""

from ml_collections import ConfigDict

DOMAINS = ("code", "manual", "legal", "scripture", "dialogue", "math")
LAYERS = (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29)


def get_config(arg: str = "64") -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    return ConfigDict(
        {
            "teacher": {
                "path": "smollm2-135m-instruct",
                "signal": "top_k",
                "entries": int(arg),
                "temperatures": (1.0, 2.0),
                "cache": f"cache/top{arg}",
            },
            "student": {"layers": LAYERS},
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
