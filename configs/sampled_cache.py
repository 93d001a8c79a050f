"""Random-sampling KD from a cache: a few dozen bytes a token, and unbiased.

    jaxkd cache --config configs/sampled_cache.py
    jaxkd train --config configs/sampled_cache.py --workdir runs/sampled_cache

The argument is the number of draws per token (default: 50; Sparse Logit Sampling, arXiv 2503.16870). Draws give
unbiased values of terms that are linear in the teacher's distribution, so the term is `cross_entropy`, whose gradient
is forward KL's. What it costs on disk and in KL: docs/results.md. Teacher and data as in configs/quickstart.py, 32
rows of each domain.
"""

from ml_collections import ConfigDict

DOMAINS = ("code", "manual", "legal", "scripture", "dialogue", "math")
LAYERS = (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29)


def get_config(arg: str = "50") -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    return ConfigDict(
        {
            "teacher": {
                "path": "smollm2-135m-instruct",
                "signal": "sampled",
                "entries": int(arg),
                "cache": f"cache/sampled{arg}",
            },
            "student": {"layers": LAYERS},
            "objective": {
                "kd": {"divergence": "cross_entropy", "weight": 1.0},
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
