"""Errors of reading and writing checkpoints: transient, permission or resource errors, or a damaged checkpoint."""

import errno
import gc
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxkd.runtime.cluster import Unavailable

# Codes of storage errors from TensorStore, the operating system and HTTP servers.
_TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH, errno.ETIMEDOUT)
_HTTP = (408, 429, 500, 502, 503, 504)
_REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")  # the last is out of device memory
T = TypeVar("T")


class DamagedCheckpoint(ValueError):
    """A checkpoint that differs from what was saved; an earlier one may be intact."""


BY_PRIORITY = (Unavailable, OSError, DamagedCheckpoint, ValueError)
"""Error classes of a read. Of several processes' errors the first in this order is raised."""


def is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed: storage or a host did not answer, or a resource was exhausted."""
    if isinstance(error, Unavailable | TimeoutError | ConnectionError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return True
    return getattr(error, "code", None) in _HTTP or any(word in str(error) for word in _TRANSIENT)


def classify(error: Exception) -> OSError | DamagedCheckpoint:
    """An exception of reading files as `Unavailable`, `OSError` or `DamagedCheckpoint`."""
    if is_transient(error):
        return Unavailable(first_line(error))
    refused = isinstance(error, PermissionError) or any(word in str(error) for word in _REFUSED)
    return OSError(first_line(error)) if refused else DamagedCheckpoint(first_line(error))


def call_orbax(read: Callable[[], T]) -> T:
    """`read()` with classified exceptions (see `classify`), without the noise of Orbax's other reads.

    When one read fails, concurrent ones end in threads whose exceptions are never retrieved; Python would print those.
    """
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        try:
            return read()
        except Exception as error:
            classified = classify(error)
        time.sleep(0.1)
        gc.collect()
        raise classified
    finally:
        sys.unraisablehook = before


def first_line(error: BaseException) -> str:
    """The first line of an exception's message without TensorStore's spec, or the class name."""
    text = re.sub(r" \[(?:tensorstore_spec|source locations)=.*", "", (str(error).strip().splitlines() or [""])[0])
    return textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__


def priority(error: Exception) -> int:
    """Index of the exception's class in `BY_PRIORITY`."""
    return next(i for i, kind in enumerate(BY_PRIORITY) if isinstance(error, kind))


def combine(reports: Sequence[Any]) -> Exception | None:
    """The exception that all processes raise, or None, from the (`priority`, message) or None of each."""
    failed = [(report[0], process, report[1]) for process, report in enumerate(reports) if report is not None]
    if not failed:
        return None
    number, process, text = min(failed)
    return BY_PRIORITY[number](f"{text} (process {process})" if len(reports) > 1 else text)
