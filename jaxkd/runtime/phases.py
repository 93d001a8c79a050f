"""What a run is doing and since when: one account for goodput.jsonl, heartbeat.json and the watchdog."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxkd.runtime import goodput
from jaxkd.runtime.compile_cache import Tally
from jaxkd.runtime.watchdog import STEPS, Watchdog


class Phases:
    """The phases of a process, one after the other, from its start to `close`."""

    def __init__(self, workdir: Path, patience: float, started: float, process: int = 0):
        """The start is over: models are loaded next.

        Args:
            workdir: of the run.
            patience: seconds that a step may take at least before the watchdog ends the process, 0 for any.
            started: `time.time()` at which the process began.
            process: number of this one; process 0 keeps the account.
        """
        self._tally, self._told = Tally(), (0, 0, 0.0)
        self._recorder = goodput.Recorder(workdir, process == 0)
        self._watchdog = Watchdog(workdir, patience, process)
        self._phase, self._began = goodput.START, started
        self._first, self._step, self._skipped = 0, 0, 0
        self._once: set[str] = set()
        self._enter(goodput.LOAD)

    def _write(self, **more) -> None:
        now = (self._tally.programs, self._tally.cached, self._tally.seconds)
        new = dict(zip(("programs", "cached", "compile_s"), (a - b for a, b in zip(now, self._told)), strict=True))
        end = self._recorder.add(
            self._phase, self._began, self._first, self._step, skipped=self._skipped, **new, **more
        )
        self._told, self._began, self._first, self._skipped = now, end, self._step, 0

    def _enter(self, phase: str, **more) -> None:
        self._write()
        self._phase = phase
        self._watchdog.phase(phase, self._step)

    def restored(self, step: int) -> None:
        """The state that the process goes on from is there."""
        self._first = self._step = step

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase within another, which goes on afterwards."""
        before = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def once(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """`during`, the first time that it is asked for; afterwards nothing."""
        if phase in self._once:
            return contextlib.nullcontext()
        self._once.add(phase)
        return self.during(phase)

    def alive(self) -> None:
        """There was progress within a phase."""
        self._watchdog.alive()

    def stepped(self, step: int, seconds: float, skipped: bool) -> None:
        """A step's numbers are there."""
        self._step, self._skipped = step, self._skipped + skipped
        self._watchdog.stepped(step, seconds)
        if self._phase == STEPS and self._recorder.due(self._began):
            self._write()

    def close(self, finished: bool) -> None:
        """The process is done with the run; `finished` when it made the last step."""
        self._enter(goodput.END)
        self._recorder.add(goodput.END, self._began, self._step, self._step, finished=finished)
        self._watchdog.close()
        self._tally.close()
