"""jaxkd: distil large language models with JAX.

`import jaxkd as kd` gives the public names below (docs/api.md). Each is imported when it is first used, so that the
import itself loads neither JAX nor what only runs need.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "core.types": ("Batch", "Divergence", "Ensemble", "Head", "Hidden", "Output", "Sampled", "TopK"),
    "losses.distill": ("distill",),
    "kernels.mesh": ("Axes",),
    "losses.divergences": (
        "adaptive_kl", "alpha_beta", "alpha_divergence", "conditional_kl", "cross_entropy", "decoupled_kd",
        "decoupled_topk", "forward_kl", "generalized_jsd", "generalized_kl", "generalized_reverse_kl", "jeffreys",
        "mixed_kl", "partial_kl", "renormalized_kl", "renyi", "reverse_kl", "sampled_reverse_kl", "skew_kl",
        "skew_reverse_kl", "squared_hellinger", "total_variation", "z_loss",
    ),
    "kernels.api": ("linear_divergence", "token_values"),
    "losses.features": (
        "attention_transfer", "hidden_cosine", "hidden_mse", "linear_cka", "minillm", "policy_gradient", "relations",
        "ted_filters", "ted_match",
    ),
    "losses.objective": ("match", "next_token", "objective"),
    "data.load_model": ("load_model",),
    "sampling.complete": ("generate",),
    "evals.scoring": ("score",),
    "teachers.base": ("Teacher",),
    "teachers.online": ("no_teacher", "online", "self_teacher"),
    "teachers.signals": ("sampled", "top_k"),
    "teachers.cached": ("cached",),
    "teachers.ensemble": ("ensemble", "route"),
    "train.state": ("TrainState", "init_state"),
    "train.step": ("make_step",),
}  # fmt: skip
_MODULES = {name: f"jaxkd.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxkd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
