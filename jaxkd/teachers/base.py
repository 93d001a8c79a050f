"""The `Teacher` interface: two functions and the arrays that they need, as in an optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxkd.core.types import PyTree

HostRows = dict[str, Any]
"""Fields of a `Batch` as numpy arrays, before they are put on devices."""


class Teacher(NamedTuple):
    """The source of the teacher's signal.

    `state`: its arrays, an argument of the step; neither captured, donated nor checkpointed.
    `host_features(rows)`: on the host, in the prefetching threads, for the rows of this process; a cache adds what it
    stores of them, other teachers return them unchanged.
    `signal(state, batch, **options)`: inside the jitted step. Its options are those of `requires`: "taps" (names of
    features, where the objective has any), "step", and "own" (`TrainState.ema`, else the student's parameters).
    """

    state: PyTree
    host_features: Callable[[HostRows], HostRows]
    signal: Callable[..., Any]  # returns a `types.Signal`, or None without a teacher
    requires: tuple[str, ...] = ()


def untouched(rows: HostRows) -> HostRows:
    """The `host_features` of a teacher that stores nothing."""
    return rows


def row_keys(rows: HostRows) -> tuple[np.ndarray, np.ndarray]:
    """Domain and row index, int [B] each: a cache's address of the rows."""
    return np.asarray(rows["domain"]), np.asarray(rows["row"])
