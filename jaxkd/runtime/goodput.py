"""goodput.jsonl: one line per phase of a process, from which the report sums up a run's wall clock."""

import time
from pathlib import Path
from typing import Any

from jaxkd.runtime import files

FILE = "goodput.jsonl"
STEPS, START, LOAD, END = "steps", "start", "load", "end"

Row = dict[str, Any]


class Recorder:
    """Appends a line when a phase ends, and every `every` seconds within the phase `steps`."""

    def __init__(self, workdir: Path, writes: bool = True, every: float = 10.0):
        """`writes` is true on one process of a job."""
        self._path, self._writes, self._every = workdir / FILE, writes, every

    def due(self, began: float) -> bool:
        """Whether a phase needs a line before it ends, so that a kill loses at most `every` seconds of it."""
        return time.time() - began >= self._every

    def add(self, phase: str, began: float, first: int, step: int, **more: Any) -> float:
        """Write that `phase` lasted from `began` until now and went from step `first` to `step`; returns now."""
        now = time.time()
        if self._writes and (now - began >= 1e-3 or step > first or phase == END):
            row = {"time": now, "seconds": now - began, "phase": phase, "first": first, "step": step}
            files.append_jsonl(self._path, [row | {name: value for name, value in more.items() if value}])
        return now
