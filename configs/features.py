"""Logit distillation with one term over features beside it, on random models of different widths: seconds.

    jaxkd train --config configs/features.py:minilm --workdir runs/minilm
    jaxkd train --config configs/features.py --workdir runs/hidden "--config.objective.feature.weight=0.05"

The argument is one of hidden (default), cosine, minilm, attention and cka; jaxkd/losses/features.py has their formulas
and
papers. The student is narrower than the teacher, so hidden and cosine learn projectors, which live beside the student
in params["objective"] and are left behind by export. To distil real models give both paths and a map of layers that
fits them, such as "--config.objective.feature.feature=hidden_mse(layers={5: 10, 10: 20, 15: 30})". Minitron (arXiv
2407.14679) found that such terms help only where much depth was cut. Expected after 20 steps: the loss falls from 5.5
to about 4.2 (hidden), the feature's own value from about 1.0 to 0.4 (cosine) and from 0.4 to 0.1 (cka); next to the
random models' cross-entropy minilm and attention are too small to see.
"""

from ml_collections import ConfigDict

FEATURES = {
    "hidden": ("hidden_mse(layers={1: 2, 2: 4})", 0.1),
    "cosine": ("hidden_cosine(layers={1: 2, 2: 4})", 1.0),
    "minilm": ("relations(layers={2: 3}, heads=8)", 1.0),
    "attention": ("attention_transfer(layers={1: 2, 2: 4})", 1.0),
    "cka": ("linear_cka(layers={1: 2, 2: 4})", 1.0),
}


def get_config(arg: str = "hidden") -> ConfigDict:
    """The recipe; the argument is the feature."""
    if (arg or "hidden") not in FEATURES:
        raise ValueError(f"configs/features.py takes one of {', '.join(FEATURES)}, got '{arg}'")
    feature, weight = FEATURES[arg or "hidden"]
    teacher = {"vocab": 257, "embed": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64}
    student = {"vocab": 257, "embed": 24, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 48}
    return ConfigDict(
        {
            "teacher": {"path": "random", "dtype": "float32", "shape": teacher},
            "student": {"path": "random", "layers": (), "keep": 0, "shape": student},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 0.5, "temperature": 1.0},
                "ce": {"divergence": "next_token", "weight": 1.0},
                "feature": {"feature": feature, "weight": weight},
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
                "weight_decay": 0.1,  # of the student's matrices; projectors do not decay
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
