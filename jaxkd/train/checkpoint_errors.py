"""What can be wrong with a checkpoint, the same for all processes that read it."""

import errno
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxkd.runtime.cluster import Unavailable

# What TensorStore, the system and servers say when it is not the checkpoint that is at fault, and may soon be over.
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
_SYSTEM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH, errno.ETIMEDOUT)
_HTTP = (408, 429, 500, 502, 503, 504)
_REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")  # the last is of a device's memory
T = TypeVar("T")


class Damaged(ValueError):
    """A checkpoint that is not what was saved; an earlier one may be whole."""


KINDS = (Unavailable, OSError, Damaged, ValueError)
"""What reading raises. Of several processes the first kind decides: a step that cannot be read now is not bad."""


def passes(error: BaseException) -> bool:
    """Whether the same may succeed in a while: storage or a host that did not answer."""
    gone = isinstance(error, Unavailable | TimeoutError | ConnectionError | MemoryError)
    gone |= isinstance(error, OSError) and error.errno in _SYSTEM
    return gone or getattr(error, "code", None) in _HTTP or any(word in str(error) for word in _PASSING)


def judged(error: Exception) -> OSError | Damaged:
    """What went wrong while files were read: the checkpoint, or what holds it, which may be mended or pass."""
    if passes(error):
        return Unavailable(reason(error))
    refused = isinstance(error, PermissionError) or any(word in str(error) for word in _REFUSED)
    return OSError(reason(error)) if refused else Damaged(reason(error))


def attempt(read: Callable[[], T]) -> T:
    """What Orbax reads.

    Other reads that it began are still under way when one fails, and end in threads that nobody listens to any more:
    what Python would print of those is kept back, for the error itself is told in one sentence.

    Raises:
        Unavailable, OSError, Damaged: as `judged`.
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


def shared(told: Sequence[Any]) -> Exception | None:
    """The error that goes for all processes, None when none has one.

    Args:
        told: by process, None or the `kind` of its error and the message.
    """
    wrong = [(one[0], process, one[1]) for process, one in enumerate(told) if one is not None]
    if not wrong:
        return None
    number, process, text = min(wrong)
    return KINDS[number](f"{text} (process {process})" if len(told) > 1 else text)
