"""Progress bars on a terminal; elsewhere a plain line now and then, without carriage returns."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

_EVERY = 30.0  # seconds between two lines
_REDRAW = 0.5  # seconds between two drawings of a bar


def bar(
    items: Iterable[Any] | None = None,
    title: str = "",
    total: int | None = None,
    unit: str = "",
    *,
    initial: int = 0,
    shown: bool = True,
    leave: bool = True,
    at_once: bool = False,
) -> Any:
    """tqdm's bar where stderr is a terminal, else `Lines`, which has the methods that are used here.

    Without `items` to iterate over, `update` counts from `initial`, in a `unit` (a plural). `leave`: a complete bar
    stays on the terminal. `at_once`: the first item gives a line, and not only one after `_EVERY` seconds.
    """
    if shown and not sys.stderr.isatty():
        return Lines(items, title, total, unit, initial, at_once)
    return tqdm(
        items, title or None, total, leave, sys.stderr, dynamic_ncols=True, smoothing=0.1, mininterval=_REDRAW,
        unit=f" {unit}", initial=initial, disable=not shown,
    )  # fmt: skip


class Lines:
    """Lines such as `train: 120 of 2,000 steps, loss 3.210, 1,234 tokens/s, 12:30 left`, on stderr."""

    def __init__(
        self, items: Iterable[Any] | None, title: str, total: int | None, unit: str, initial: int, at_once: bool
    ):
        self._items, self._title, self._total, self._unit, self._count = items, title, total, unit, initial
        self._note, self._printed, self._lines = "", initial, 0
        self._time = time.monotonic()
        self._due = self._time if at_once else self._time + _EVERY

    def __iter__(self) -> Iterator[Any]:
        for item in self._items or ():
            yield item
            self.update()
        self.close()

    def set_postfix_str(self, note: str, refresh: bool = False) -> None:
        self._note = note

    def update(self, number: int = 1) -> None:
        """Count; print a line if one is due."""
        self._count += number
        if time.monotonic() >= self._due:
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        rate = (self._count - self._printed) / max(now - self._time, 1e-9)  # since the last line
        parts = [f"{self._count:,}{f' of {self._total:,}' if self._total else ''} {self._unit}", self._note]
        if self._total and rate and self._count < self._total:
            parts.append(f"{tqdm.format_interval((self._total - self._count) / rate)} left")
        print(f"{self._title}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)
        self._time, self._printed, self._due, self._lines = now, self._count, now + _EVERY, self._lines + 1

    def clear(self) -> None:
        """Nothing to clear: other output goes between the lines."""

    refresh = clear

    def close(self) -> None:
        """Print the last count, unless no line was printed or the last one had it."""
        if self._lines and self._printed != self._count:
            self._print()
