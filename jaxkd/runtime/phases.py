"""The phase a run is in, reported to goodput.jsonl, heartbeat.json and the watchdog."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from jaxkd.runtime import goodput
from jaxkd.runtime.compile_cache import CompileCounter
from jaxkd.runtime.watchdog import Watchdog

_EVERY = 10.0  # seconds between two lines within the phase `steps`: what a kill loses at most


class Phases:
    """The consecutive phases of a process, from its start to `close`."""

    def __init__(self, workdir: Path, stall_s: float, started: float, process: int = 0):
        """End the phase `start`, which began at `time.time() == started`, and begin `load`."""
        self._counter, self._written = CompileCounter(), (0, 0, 0.0)
        self._workdir, self._writes = workdir, process == 0
        self._watchdog = Watchdog(workdir, stall_s, process)
        self._phase, self._began = goodput.START, started
        self._first, self._step, self._skipped = 0, 0, 0
        self._enter(goodput.LOAD)

    def _write(self, finished: bool = False) -> None:
        now, counts = time.time(), (self._counter.programs, self._counter.cached, self._counter.seconds)
        new = dict(zip(("programs", "cached", "compile_s"), (a - b for a, b in zip(counts, self._written))))
        if self._writes:
            more = {"skipped": self._skipped, **new, "finished": finished}
            goodput.append(self._workdir, self._phase, self._began, now, self._first, self._step, more)
        self._written, self._began, self._first, self._skipped = counts, now, self._step, 0

    def _enter(self, phase: str) -> None:
        self._write()
        self._phase = phase
        self._watchdog.phase(phase, self._step)

    def restored(self, step: int) -> None:
        self._first = self._step = step

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase that interrupts the current one."""
        before = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def alive(self) -> None:
        """Report progress within a phase to the watchdog."""
        self._watchdog.alive()

    def stepped(self, step: int, seconds: float, skipped: bool) -> None:
        self._step, self._skipped = step, self._skipped + skipped
        self._watchdog.stepped(step, seconds)
        if self._phase == goodput.STEPS and time.time() - self._began >= _EVERY:
            self._write()

    def close(self, finished: bool) -> None:
        """Write the last line; `finished` after the run's last step."""
        self._enter(goodput.END)
        self._write(finished=finished)
        self._watchdog.close()
        self._counter.close()
