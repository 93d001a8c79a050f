"""All that a run's next step depends on, beside the mixture: what is checkpointed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxkd.groups import Groups
from jaxkd.train.guard import Recent
from jaxkd.types import PyTree


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
