"""The `Teacher` interface: two functions and their arrays, as in an optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxkd.core.types import PyTree

HostRows = dict[str, Any]
"""Fields of a `Batch` as numpy arrays on the host."""


class Teacher(NamedTuple):
    """The source of the teacher's signal.

    `state`: its arrays, an argument of the step; neither captured, donated nor checkpointed.
    `host_features(rows)`: adds a cache's stored signal of this process's rows on the host, in the prefetching threads.
    `signal(state, batch, **options)`: inside the jitted step. Its options are those of `requires`: "taps" (names of
    features, if the objective has any), "step", and "own" (`TrainState.ema`, else the student's parameters).
    """

    state: PyTree
    host_features: Callable[[HostRows], HostRows]
    signal: Callable[..., Any]  # returns a `types.Signal`, or None without a teacher
    requires: tuple[str, ...] = ()


def untouched(rows: HostRows) -> HostRows:
    """The `host_features` of a teacher without a cache."""
    return rows
