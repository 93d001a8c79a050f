"""Offline and still exact: the teacher's last hidden states are cached, and only its unembedding is loaded.

    jaxkd cache --config configs/hidden_cache.py
    jaxkd train --config configs/hidden_cache.py --workdir runs/hidden_cache

The argument is how they are stored: "bfloat16" (default), "int8" or "float32". The loss is over the full
vocabulary, and `hidden_mse(layers={-1: -1})` can learn from the hidden states themselves. What it costs on disk and
in KL is in docs/results.md; docs/formats.md says what is in the files. Teacher and data as in
configs/quickstart.py, 32 rows of each domain.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; the argument is what hidden states are stored as."""
    return ConfigDict(
        {
            "teacher": {
                "path": "smollm2-135m-instruct",
                "dtype": "float32",
                "signal": "hidden",
                "stored": arg or "bfloat16",
                "cache": f"cache/hidden-{arg or 'bfloat16'}",
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
