"""Offline and still exact: the teacher's last hidden states are cached, and only its unembedding is loaded.

    jaxkd cache --config configs/hidden_cache.py
    jaxkd train --config configs/hidden_cache.py --workdir runs/hidden_cache

The argument is the dtype in the cache: "bfloat16" (default), "int8" or "float32". The loss is over the full
vocabulary, and `hidden_mse(layers={-1: -1})` can learn from the hidden states themselves. What it costs on disk and
in KL: docs/results.md; the files' format: docs/formats.md. Teacher and data as in configs/quickstart.py, 32 rows of
each domain.
"""

from ml_collections import ConfigDict

DOMAINS = ("code", "manual", "legal", "scripture", "dialogue", "math")
LAYERS = (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29)


def get_config(arg: str = "bfloat16") -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    return ConfigDict(
        {
            "teacher": {
                "path": "smollm2-135m-instruct",
                "signal": "hidden",
                "stored": arg,
                "cache": f"cache/hidden-{arg}",
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
