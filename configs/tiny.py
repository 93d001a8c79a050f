"""Random models of some ten thousand parameters on two real domains: seconds, for tests and for trying things out.

    jaxkd train --config configs/tiny.py --workdir runs/tiny

The same code path as every other recipe at smaller sizes. Runtime: under half a minute on two CPU cores, most of it
compiling. Expected: the loss falls from 5.5 to about 4.2 in 20 steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    shape = {"vocab": 257, "embed": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64}
    return ConfigDict(
        {
            "teacher": {"path": "random", "shape": shape},
            "student": {"layers": (0, 3)},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 0.5},
                "ce": {"divergence": "next_token", "weight": 1.0},
            },
            "data": {
                "domains": {"code": "builtin:code", "manual": "builtin:manual"},
                "tokenizer": "bytes",
                "interval": 5,
                "batch": 8,
                "length": 64,
                "train_rows": 64,
                "valid_rows": 8,
            },
            "optim": {"lr": {"schedule": "cosine", "peak": 1e-2, "warmup": 2, "end": 1e-3}},
            "run": {"steps": 20, "eval_every": 10, "checkpoint_every": 5},
        }
    )
