"""Random-sampling KD from a cache: a few dozen bytes a token, and unbiased.

    jaxkd cache --config configs/sampled_cache.py
    jaxkd train --config configs/sampled_cache.py --workdir runs/sampled_cache

The argument is the number of draws per token, 50 by default (Sparse Logit Sampling, arXiv 2503.16870). Draws stand
for the teacher where a term is linear in its distribution, so the term is `cross_entropy`, whose gradient is
forward KL's. What it costs on disk and in KL is in docs/results.md.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; the argument is the number of draws."""
    return ConfigDict(
        {
            "teacher": {
                "path": "smollm2-135m-instruct",
                "dtype": "float32",
                "signal": "sampled",
                "entries": int(arg or 50),
                "cache": f"cache/sampled{arg or 50}",
            },
            "student": {
                "path": "teacher",
                "layers": (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29),
                "keep": 0,
            },
            "objective": {
                "kd": {"divergence": "cross_entropy", "weight": 1.0},
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
