"""Random models of some ten thousand parameters on two real domains: seconds, for tests and for trying things out.

    jaxkd train --config configs/tiny.py --workdir runs/tiny

The same path through the code as every other recipe; only the sizes differ. Runtime: under half a minute on
two CPU cores, most of it compiling. Expected: the loss falls from 5.5 to about 4.2 in 20 steps.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; it takes no argument."""
    if arg:
        raise ValueError(f"configs/tiny.py takes no argument, got '{arg}'")
    shape = {"vocab": 257, "embed": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64}
    return ConfigDict(
        {
            "teacher": {"path": "random", "dtype": "float32", "shape": shape},
            "student": {"path": "teacher", "layers": (0, 3), "keep": 0},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 0.5, "temperature": 1.0},
                "ce": {"divergence": "next_token", "weight": 1.0},
            },
            "data": {
                "domains": {"code": "builtin:code", "manual": "builtin:manual"},
                "directory": "rows",
                "tokenizer": "bytes",
                "text_key": "text",
                "mixture": "natural",
                "interval": 5,
                "batch": 8,
                "length": 64,
                "train_rows": 64,
                "valid_rows": 8,
                "valid_share": 0.05,
            },
            "optim": {
                "lr": {"schedule": "cosine", "peak": 1e-2, "warmup": 2, "end": 1e-3},
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip": 1.0,
                "micro_batches": 1,
            },
            "run": {
                "steps": 20,
                "seed": 0,
                "dtype": "float32",
                "remat": "none",
                "mesh": {"data": -1, "model": 1},
                "eval_every": 10,
                "eval_batch": 8,
                "checkpoint_every": 5,
                "keep_checkpoints": 2,
                "log_every": 1,
            },
        }
    )
