"""The train state: with the mixture, all that the next step depends on and all that is checkpointed."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxkd.core.types import PyTree
from jaxkd.train import guard
from jaxkd.train.guard import Recent


class TrainState(NamedTuple):
    """`params["student"]` is what the student trains, `params["objective"]` the objective's own parameters.

    The student's other arrays are `frozen`, an argument of the step; see `assemble`. Unused parts are None and not
    checkpointed.
    """

    step: jax.Array  # [] int32: steps made, skipped ones included
    params: dict[str, PyTree]
    opt_state: PyTree
    ema: PyTree = None  # running average of `params["student"]`, for teacher.path=self
    group_dro: PyTree = None  # state of a `Reweighting`: domain weights in the loss, for data.mixture=doremi_proxy
    recent: Recent | None = None  # recent losses and gradient norms, for optim.spike
    texts: PyTree = None  # rollouts that later steps train on: for run.rollout_every and data.rollout.buffer


def parts(state: TrainState) -> dict[str, Any]:
    """The parts of a state that have arrays, by name."""
    return {name: part for name, part in state._asdict().items() if jax.tree.leaves(part)}


def assemble(params: PyTree, frozen: PyTree) -> PyTree:
    """The student's parameters from its trained and frozen arrays, two disjoint nested dicts.

    Raises ValueError: naming a key that has an array in both.
    """
    if not jax.tree.leaves(frozen):
        return params
    if not jax.tree.leaves(params):
        return frozen

    def merge(key: str) -> PyTree:
        if key not in params or key not in frozen:
            return params[key] if key in params else frozen[key]
        if not isinstance(params[key], dict) or not isinstance(frozen[key], dict):
            raise ValueError(f"'{key}' is both trained and frozen")
        return assemble(params[key], frozen[key])

    return {key: merge(key) for key in sorted(params.keys() | frozen.keys())}


OPTIONAL: Mapping[str, Callable[[], Any]] = {"recent": guard.init}
"""Parts that may be enabled or disabled during a run, and their initial values. `ema` and `group_dro` may not: started
late, they would differ from what the config describes."""
_REQUIRED = {
    "ema": "the student's running average (teacher.path=self)",
    "group_dro": "domain weights in the loss (data.mixture=doremi_proxy)",
    "texts": "rollouts that later steps train on (run.rollout_every, data.rollout.buffer)",
}


def parts_to_read(saved: set[str], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The wanted parts that a checkpoint with the parts `saved` has; `with_defaults` adds the others.

    Raises ValueError: the checkpoint lacks a part, or has an extra one, that is not `OPTIONAL`.
    """
    for name, description in _REQUIRED.items():
        if (name in wanted) != (name in saved):
            has, needs = ("no ", "needs") if name in wanted else ("", "does not use")
            raise ValueError(
                f"it holds {has}{name}, {description}, which this config {needs}: take the config it was saved by"
            )
    return {name: part for name, part in wanted.items() if name in saved or name not in OPTIONAL}


def with_defaults(wanted: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that were read, and initial values of the missing ones under the shardings of `wanted`."""
    shardings = lambda part: jax.tree.map(lambda leaf: leaf.sharding, part)
    missing = wanted.keys() - read.keys()
    return {**read, **{name: jax.jit(OPTIONAL[name], out_shardings=shardings(wanted[name]))() for name in missing}}


def init_state(
    params: dict[str, PyTree],
    tx: optax.GradientTransformation,
    averaged: bool = False,
    group_dro: PyTree = None,
    recent: Recent | None = None,
    texts: PyTree = None,
) -> TrainState:
    """The initial state.

    `params` are float32; `averaged` keeps `ema`; `group_dro` is the initial state of a `Reweighting`; `recent` is
    `guard.init()` if spikes are skipped; `texts` are those of rollouts that later steps train on.
    """
    ema = jax.tree.map(jnp.copy, params["student"]) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema, group_dro, recent, texts)


def abstract_state(
    params: dict[str, PyTree], moments: dict[str, PyTree], tx: optax.GradientTransformation, **parts: Any
) -> TrainState:
    """`init_state` of abstract arrays: shapes and shardings of the train state.

    `params` have ShapeDtypeStruct leaves with shardings, `moments` the shardings of the optimiser's moments. `parts`
    are the other arguments of `init_state`; their arrays are replicated.
    """
    replicated = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())
    init = functools.partial(init_state, tx=tx, averaged=parts.pop("averaged", False))
    shapes = jax.eval_shape(init, params, **parts)
    opt_state = optax.tree_utils.tree_map_params(
        tx, lambda _, s: s, shapes.opt_state, moments, transform_non_params=lambda _: replicated
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    ema = None if shapes.ema is None else shardings["student"]
    of_state = jax.tree.map(lambda _: replicated, shapes)._replace(params=shardings, opt_state=opt_state, ema=ema)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, of_state)
