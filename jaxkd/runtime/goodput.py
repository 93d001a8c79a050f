"""Records what a run's wall clock goes into, a line for each phase of a process."""

import time
from pathlib import Path
from typing import Any

from jaxkd.runtime import log

FILE = "goodput.jsonl"
STEPS, START, LOAD, END = "steps", "start", "load", "end"

Row = dict[str, Any]


class Recorder:
    """Appends a line for every phase that ends, and for the steps so far every few seconds."""

    def __init__(self, workdir: Path, writes: bool = True, every: float = 10.0):
        """Nothing is written yet.

        Args:
            workdir: of the run.
            writes: whether this process does; one of a job.
            every: seconds between two lines of one phase.
        """
        self._path, self._writes, self._every = workdir / FILE, writes, every

    def due(self, began: float) -> bool:
        """Whether a phase has lasted long enough for a line of its own, lest a kill take its time along."""
        return time.time() - began >= self._every

    def add(self, phase: str, began: float, first: int, step: int, **more: Any) -> float:
        """Write that `phase` went from `began` until now, and from step `first` to `step`; returns now."""
        now = time.time()
        if self._writes and (now - began >= 1e-3 or step > first or phase == END):
            row = {"time": now, "seconds": now - began, "phase": phase, "first": first, "step": step}
            log.append(self._path, [row | {name: value for name, value in more.items() if value}])
        return now
