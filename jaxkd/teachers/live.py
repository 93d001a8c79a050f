"""Teachers that run beside the student: a model, no model, or the student itself."""

from typing import Any

import jax

from jaxkd.teachers.base import Teacher, untouched
from jaxkd.types import Batch, Forward, Output, PyTree


def live(params: PyTree, forward: Forward) -> Teacher:
    """The teacher's forward pass on every batch: exact, over the full vocabulary.

    Args:
        params: the teacher's arrays, in the dtype in which they are stored.
        forward: `forward(params, batch) -> Output`, and with `taps=names` where the objective needs features.
    """

    def signal(state: PyTree, batch: Batch, **options: Any) -> Output:
        return jax.lax.stop_gradient(forward(state, batch, **options))

    return Teacher(params, untouched, signal, ("taps",))


def own(forward: Forward) -> Teacher:
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


def absent() -> Teacher:
    """No teacher: for objectives that learn from the data alone."""
    return Teacher({}, untouched, lambda state, batch: None)
