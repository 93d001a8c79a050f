"""Recipes of benchmarks/on_policy.py: those of configs/on_policy.py with one student, rate and length for all.

jaxkd train --config benchmarks/_on_policy_recipe.py:METHOD
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.lax import stop_gradient
from ml_collections import ConfigDict

from jaxkd.core.types import Divergence

JSD = {"kd": {"divergence": "generalized_jsd(beta=0.5)", "weight": 1.0}}
STUDENT = {"student": 1.0}
# What configs/on_policy.py does not have: rollouts and objective.
CONTROLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kd": ({}, {"kd": {"divergence": "forward_kl", "weight": 1.0}}),
    "gkd0": ({}, JSD),
    "gkd1": (STUDENT, JSD),
    "negative": (STUDENT, {"kd": {"divergence": "_on_policy_recipe:fixed_negative", "weight": 1.0}}),
}
METHODS = ("sft", "opd", "kd", "gkd", "minillm", "distillm", "gkd1", "prefix", "negative", "seqkd", "opsd", "gkd0")


def fixed_negative(below: float = 0.2) -> Divergence:
    """An advantage of -1 on drawn tokens whose probability is below a bound, without a teacher (arXiv 2608.31046).

    The bound is ours. Value: log q(y) where q(y) < `below`, else 0.
    """

    def phi(lp, lq, side):
        low = stop_gradient(lq < jnp.log(below))
        return (jnp.where(side.is_target & low, lq, 0.0),)

    return Divergence(phi, uses_teacher=False)


def _recipes() -> Any:
    path = Path(__file__).resolve().parent.parent / "configs" / "on_policy.py"
    spec = importlib.util.spec_from_file_location("on_policy_recipes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(arg: str = "gkd") -> ConfigDict:
    """The recipe of a method, or of `teacher` or `start`, which learn from labels; paths and sizes are overrides."""
    base = {"teacher": "sft", "start": "sft", "gkd0": "gkd", "kd": "gkd", "gkd1": "gkd", "negative": "opd"}
    config = _recipes().get_config(f"{base.get(arg, arg)},small")
    if arg in CONTROLS:
        rollout, terms = CONTROLS[arg]
        config.objective = ConfigDict(terms)
        config.data.rollout = ConfigDict(rollout)
    if config.data.get("rollout"):
        config.data.rollout.length = config.data.rollout.prompt = 0
    elif "rollout" in config.data:
        del config.data.rollout
    config.data.domains = ConfigDict()
    config.data.packs = False
    config.data.train_rows, config.data.valid_rows = 0, 0
    if arg == "distillm":  # a share that rises at evaluations stays 0 in a run of one evaluation
        config.data.rollout.student = 0.5
    if config.data.get("context"):
        config.data.context = 16
    config.optim.lr = ConfigDict({"schedule": "cosine", "peak": 0.0, "warmup": 5})
    config.run.samples = 0  # benchmarks/on_policy.py measures all methods beside one teacher
    if arg not in ("teacher", "start"):
        config.student = ConfigDict({"path": ""})
    return config
