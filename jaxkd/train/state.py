"""All that a run's next step depends on, beside the mixture: what is checkpointed."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxkd.core.types import PyTree
from jaxkd.losses.group_dro import Groups
from jaxkd.train import guard
from jaxkd.train.guard import Recent


class TrainState(NamedTuple):
    """`params["student"]` is the model, `params["objective"]` what the objective itself learns."""

    step: jax.Array  # [] int32: updates made
    params: dict[str, PyTree]
    opt_state: PyTree
    ema: PyTree = None  # running average of the student's parameters, where it is its own teacher
    groups: Groups | None = None  # weights of the domains in the loss, where they move at every step
    recent: Recent | None = None  # losses and gradient norms, where a step is left out that is far above them


def present(state: TrainState) -> dict[str, Any]:
    """The parts that a state has, by name: one that is not kept leaves nothing on disk."""
    return {name: part for name, part in state._asdict().items() if part is not None}


BEGIN: Mapping[str, Callable[[], Any]] = {"recent": guard.init}
"""Parts that a run may begin to keep at any step, as empty as at its first, or may cease to keep.

What spikes are compared with fills by itself; an average or weights that began later would not be what the config says.
"""
_WHAT = {
    "ema": "the student's running average (teacher.path=self)",
    "groups": "weights of the domains in the loss (data.mixture=doremi_proxy)",
}


def restorable(kept: set[str], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the wanted parts that are read from a checkpoint; the others begin with this process.

    Args:
        kept: the names of the parts that it has.
        wanted: parts by name, as `present` gives them.

    Raises:
        ValueError: a part is missing, or is there in vain, of which that is not right.
    """
    for name, what in _WHAT.items():
        if name in wanted and name not in kept:
            raise ValueError(f"it holds no {name}, {what}, which this config asks for: take the config it was saved by")
        if name in kept and name not in wanted:
            raise ValueError(
                f"it holds {name}, {what}, which this config does not keep: take the config it was saved by"
            )
    return {name: part for name, part in wanted.items() if name in kept or name not in BEGIN}


def begun(wanted: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that were read, and the first values of the others, placed as they are wanted."""
    place = lambda part: jax.tree.map(lambda leaf: leaf.sharding, part)
    new = {name: jax.jit(BEGIN[name], out_shardings=place(wanted[name]))() for name in wanted.keys() - read.keys()}
    return {**read, **new}


TRAINED = ("student", "objective")


def trained(params: dict[str, PyTree], names: tuple[str, ...] = TRAINED) -> dict[str, PyTree]:
    """The parameters that a run moves: the optimiser knows no others."""
    return {name: params[name] for name in params if name in names}


def init_state(
    params: dict[str, PyTree],
    tx: optax.GradientTransformation,
    names: tuple[str, ...] = TRAINED,
    averaged: bool = False,
    groups: Groups | None = None,
    recent: Recent | None = None,
) -> TrainState:
    """The state before the first step; parameters in float32.

    Args:
        params: all of them.
        tx: the optimiser.
        names: which of `params` it moves, the objective's `trains`.
        averaged: whether `ema` is kept.
        groups: the first weights of the domains, where they move.
        recent: `guard.init()`, where spikes are left out.
    """
    ema = jax.tree.map(jnp.copy, params["student"]) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(trained(params, names)), ema, groups, recent)
