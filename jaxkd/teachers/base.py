"""A teacher is a pair of pure functions and its arrays, as an optax transformation is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxkd.core.types import PyTree

HostRows = dict[str, Any]
"""Fields of a `Batch` as numpy arrays, before they are put on devices."""


class Teacher(NamedTuple):
    """Where the teacher's signal comes from.

    `state` holds its arrays and is an argument of the step: not captured, not donated, not checkpointed.
    `host_features(rows)` runs on the host, in the threads that read ahead, on the rows that a process holds: the
    identity, or what a cache adds to them. `signal(state, batch)` runs inside the step; of `requires` it gets by
    keyword
    "taps" (names of features, where the objective has any), "step", and "own" (`TrainState.ema`, or the student's
    parameters where there is none).
    """

    state: PyTree
    host_features: Callable[[HostRows], HostRows]
    signal: Callable[..., Any]  # a `types.Signal`, or None where there is no teacher
    requires: tuple[str, ...] = ()
    writes: bool = False  # whether `signal` is a `Batch` of the teacher's own text, to be learned from instead


def untouched(rows: HostRows) -> HostRows:
    """The `host_features` of a teacher that needs nothing from the host."""
    return rows


def place(rows: HostRows) -> tuple[np.ndarray, np.ndarray]:
    """Domain and row [B] of a batch's rows: what a cache is addressed by."""
    return np.asarray(rows["domain"]), np.asarray(rows["row"])
