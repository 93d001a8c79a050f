"""goodput.jsonl: one line per phase of a process, from which the report sums up a run's wall clock."""

from pathlib import Path
from typing import Any

from jaxkd.runtime import files

FILE = "goodput.jsonl"
STEPS, START, LOAD, END = "steps", "start", "load", "end"

Row = dict[str, Any]


def append(workdir: Path, phase: str, began: float, now: float, first: int, step: int, more: Row) -> None:
    """Write that `phase` lasted from `began` until `now`, from step `first` to `step`, and `more` that is not 0."""
    if now - began >= 1e-3 or step > first or phase == END:
        row = {"time": now, "seconds": now - began, "phase": phase, "first": first, "step": step}
        files.append_jsonl(workdir / FILE, [row | {name: value for name, value in more.items() if value}])
