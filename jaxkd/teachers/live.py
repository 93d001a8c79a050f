"""A teacher that is run beside the student."""

import jax

from jaxkd.teachers.base import Teacher
from jaxkd.types import Batch, Forward, Output, PyTree


def live(params: PyTree, forward: Forward) -> Teacher:
    """The teacher's forward pass on every batch: exact, over the full vocabulary.

    Args:
        params: the teacher's arrays, in the dtype in which they are stored.
        forward: `forward(params, batch) -> Output`, and with `taps=names` where the objective needs features.
    """

    def signal(state: PyTree, batch: Batch, **options) -> Output:
        return jax.lax.stop_gradient(forward(state, batch, **options))

    return Teacher(params, lambda batch: batch, signal, taps=True)


def absent() -> Teacher:
    """No teacher: for objectives that learn from the data alone."""
    return Teacher({}, lambda batch: batch, lambda state, batch: None)
