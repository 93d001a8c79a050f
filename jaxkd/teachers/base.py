"""A teacher is a pair of pure functions and its arrays, as an optax transformation is."""

from collections.abc import Callable
from typing import NamedTuple

from jaxkd.types import Batch, PyTree, Signal


class Teacher(NamedTuple):
    """Where the teacher's signal comes from.

    `state` holds its arrays and is an argument of the step: not captured, not donated, not checkpointed.
    `annotate(batch)` runs on the host before the step; `signal(state, batch)` inside it, with `taps=names` when the
    objective needs features and the teacher gives them.
    """

    state: PyTree
    annotate: Callable[[Batch], Batch]
    signal: Callable[..., Signal | None]
    taps: bool = False  # whether `signal` takes `taps`
