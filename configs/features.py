"""Logit distillation with one feature loss beside it, on random models of different widths: seconds.

    jaxkd train --config configs/features.py:minilm --workdir runs/minilm
    jaxkd train --config configs/features.py --workdir runs/hidden --config.objective.feature.weight=0.05

The argument is one of hidden (default), cosine, minilm, attention and cka; formulas and papers are in
jaxkd/losses/features.py. The student is narrower than the teacher, so hidden and cosine learn projectors, which are
part of params["objective"] and are not exported. To distil real models give both paths and a map of layers that
fits them, such as "--config.objective.feature.feature=hidden_mse(layers={5: 10, 10: 20, 15: 30})". Minitron (arXiv
2407.14679) found that such terms help only where much depth was cut. Expected after 20 steps: the loss falls from 5.5
to about 4.2 (hidden), the feature's own value from about 1.0 to 0.4 (cosine) and from 0.4 to 0.1 (cka); minilm and
attention are too small beside the random models' cross-entropy to be seen in the loss.
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
    """The keys that differ from the defaults (docs/config.md)."""
    if arg not in FEATURES:
        raise ValueError(f"configs/features.py takes one of {', '.join(FEATURES)}, got '{arg}'")
    feature, weight = FEATURES[arg]
    teacher = {"vocab": 257, "embed": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64}
    student = {"vocab": 257, "embed": 24, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 48}
    return ConfigDict(
        {
            "teacher": {"path": "random", "shape": teacher},
            "student": {"path": "random", "shape": student},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 0.5},
                "ce": {"divergence": "next_token", "weight": 1.0},
                "feature": {"feature": feature, "weight": weight},
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
