"""What can be wrong with a checkpoint, the same for all processes that read it."""

import errno
import gc
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# What TensorStore and the system say when it is not the checkpoint that is at fault.
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")
_SYSTEM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH)
T = TypeVar("T")
_BYTES = 1000  # of a message from another process


class Damaged(ValueError):
    """A checkpoint that is not what was saved; an earlier one may be whole."""


KINDS = (OSError, Damaged, ValueError)
"""What reading raises. Of several processes the first kind decides: a step that cannot be read now is not bad."""


def judged(error: Exception) -> OSError | Damaged:
    """What went wrong while files were read: the checkpoint, or the machine, which may be mended."""
    outside = isinstance(error, PermissionError | TimeoutError | ConnectionError | MemoryError)
    outside |= isinstance(error, OSError) and error.errno in _SYSTEM
    outside |= any(word in str(error) for word in _PASSING)
    return OSError(reason(error)) if outside else Damaged(reason(error))


def attempt(read: Callable[[], T]) -> T:
    """What Orbax reads.

    Other reads that it began are still under way when one fails, and end in threads that nobody listens to any more:
    what Python would print of those is kept back, for the error itself is told in one sentence.

    Raises:
        OSError, Damaged: as `judged`.
    """
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        try:
            return read()
        except Exception as error:
            wrong = judged(error)
        time.sleep(0.1)
        gc.collect()
        raise wrong
    finally:
        sys.unraisablehook = before


def reason(error: BaseException) -> str:
    """The first line of a message, or the error's name."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def kind(error: Exception) -> int:
    """The place of an error's class in `KINDS`."""
    return next(i for i, one in enumerate(KINDS) if isinstance(error, one))


def shared(error: Exception | None) -> Exception | None:
    """The error of any process, the same one in all; None when none has one. All processes call it together."""
    if jax.process_count() == 1:
        return error
    text = b"" if error is None else f"{error} (process {jax.process_index()})".encode()
    kinds = np.asarray(multihost_utils.process_allgather(np.int32(-1 if error is None else kind(error))))
    texts = multihost_utils.process_allgather(np.frombuffer(text[:_BYTES].ljust(_BYTES), np.uint8))
    if (kinds < 0).all():
        return None
    number, process = min((int(k), i) for i, k in enumerate(kinds) if k >= 0)
    return KINDS[number](bytes(np.asarray(texts)[process]).decode(errors="replace").strip())


def first(numbers: list[int]) -> list[int]:
    """Process 0's list in all processes, which call it together."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = numbers if jax.process_index() == 0 else [0] * count
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(mine, np.int32))).tolist() if count else []
