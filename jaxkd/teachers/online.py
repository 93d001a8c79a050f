"""Teachers that run beside the student: a model, no model, or the student itself."""

from typing import Any

import jax

from jaxkd.core.sharding import Rules, constrain, table
from jaxkd.core.types import Batch, Forward, Output, PyTree
from jaxkd.teachers.base import Teacher, untouched

# What of a batch a forward pass reads.
_READ = ("tokens", "segments", "positions")
# How a tap lies, by its kind.
_TAPS = {"layer": (None,), "query": ("heads", None), "key": ("kv_heads", None), "value": ("kv_heads", None)}


def online(params: PyTree, forward: Forward) -> Teacher:
    """The teacher's forward pass on every batch: exact, over the full vocabulary.

    Args:
        params: the teacher's arrays, in the dtype in which they are stored.
        forward: `forward(params, batch) -> Output`, and with `taps=names` where the objective needs features.
    """

    def signal(state: PyTree, batch: Batch, **options: Any) -> Output:
        return jax.lax.stop_gradient(forward(state, batch, **options))

    return Teacher(params, untouched, signal, ("taps",))


def within(rules: Rules, forward: Forward) -> Forward:
    """A forward pass whose activations lie by a table of its own; what it returns lies as the student's does.

    Args:
        rules: the table, such as `sharding.of_teacher` makes.
        forward: of a model whose parameters lie by it.
    """

    def moved(params: PyTree, batch: Batch, **options: Any) -> Output:
        with table(rules):
            wide: dict[str, Any] = {name: constrain(getattr(batch, name), "batch", None) for name in _READ}
            # Pinned here too: else the compiler carries the rows below back into the loop over the layers.
            output = lie(forward(params, batch._replace(**wide), **options))
        # Tokens over all the mesh's rows again, before the loss splits a vocabulary that `teacher` has no part of.
        return lie(output)

    def lie(output: Output) -> Output:
        hidden = constrain(output.head.hidden, "batch", "length", None)
        taps = {n: constrain(x, "batch", "length", *_TAPS[n.partition("_")[0]]) for n, x in output.taps.items()}
        return Output(output.head._replace(hidden=hidden), taps)

    return moved


def self_teacher(forward: Forward) -> Teacher:
    """The student as its own teacher: the running average of its parameters that the train state keeps.

    Mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780): ema <- d ema + (1 - d) params after every step. With
    d = 1 it is the student as it was before the first step (self-distillation), with d = 0 the student as it is.

    Args:
        forward: the student's.
    """

    def signal(state: PyTree, batch: Batch, *, own: PyTree, **options: Any) -> Output:
        del state
        return jax.lax.stop_gradient(forward(own, batch, **options))

    return Teacher({}, untouched, signal, ("taps", "own"))


def no_teacher() -> Teacher:
    """No teacher: for objectives that learn from the data alone."""
    return Teacher({}, untouched, lambda state, batch: None)
