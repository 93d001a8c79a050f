"""A cached top-k teacher with its tail: no teacher in memory, and any divergence.

    jaxkd cache --config configs/topk_cached.py
    jaxkd train --config configs/topk_cached.py --workdir runs/topk_cached
    jaxkd train --config configs/topk_cached.py:8 --workdir runs/topk_cached_8      # after `jaxkd cache` of the same

The argument is K, 64 by default. The K largest log-probabilities are stored as they are, and all other ids as one
bucket whose mass is known at each of `teacher.temperatures`: a divergence over K + 1 entries never exceeds the one
over the full vocabulary (docs/losses.md), and it says how much of its mass the student should keep off the K.
Another temperature than a stored one is refused. What it costs on disk and in KL is in docs/results.md.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; the argument is K."""
    return ConfigDict(
        {
            "teacher": {
                "path": "smollm2-135m-instruct",
                "dtype": "float32",
                "signal": "top_k",
                "entries": int(arg or 64),
                "temperatures": (1.0, 2.0),
                "cache": f"cache/top{arg or 64}",
            },
            "student": {
                "path": "teacher",
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
