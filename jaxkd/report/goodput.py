"""Where a run's wall-clock time went, added up from goodput.jsonl."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from jaxkd.report.text import escape, number, percent, table
from jaxkd.runtime.goodput import END, LOAD, START, STEPS, Row

AGAIN, SKIPPED, DOWN = "again", "skipped", "down"
NAMES = {  # of the phases, the productive one first
    STEPS: "productive steps",
    AGAIN: "steps repeated after a restart",
    SKIPPED: "skipped steps",
    DOWN: "down between starts, or lost to a kill",
    START: "starting and building rows",
    LOAD: "loading models and checkpoint",
    "check": "checks",
    "compile": "compiling the step",
    "evaluation": "evaluations",
    "mixture": "re-weighting",
    "checkpoint": "waiting for checkpoints",
}


class Account(NamedTuple):
    """A run's wall-clock seconds by phase, and what it compiled."""

    seconds: dict[str, float]
    starts: int  # times that the command was started
    programs: int  # compiled, or read from the compilation cache
    cached: int  # of these, read from the cache
    compile_s: float  # to compile or read them, in whatever phase

    @property
    def wall(self) -> float:
        """Seconds from the first start to the last end."""
        return sum(self.seconds.values())

    def share(self, phase: str) -> float:
        return self.seconds[phase] / self.wall if self.wall else 0.0


def account(rows: Sequence[Row]) -> Account | None:
    """Add up the rows of goodput.jsonl; None when there are none.

    A start that resumes from an earlier step than its predecessor had reached repeats steps: the time of their first
    execution counts as lost. A row's steps are taken to be equally long. A start after the run had finished that makes
    no further step (such as a repeated command) is left out, with the time before it.
    """
    seconds: dict[str, float] = dict.fromkeys(NAMES, 0.0)
    step_rows: list[Row] = []  # shortened when their steps are repeated
    last_end: float | None = None
    finished, counted = False, []
    first_rows = [index for index, row in enumerate(rows) if row["phase"] == START or index == 0]
    for start, stop in pairwise([*first_rows, len(rows)]):
        rows_of_start = rows[start:stop]
        if finished and not any(row["step"] > row["first"] for row in rows_of_start):
            continue
        began = rows_of_start[0]["time"] - rows_of_start[0]["seconds"]
        if last_end is not None and not finished:
            seconds[DOWN] += max(0.0, began - last_end)
        last_end, finished = rows_of_start[-1]["time"], bool(rows_of_start[-1].get("finished"))
        # A start that ended while loading never restored a checkpoint, so it repeats no step.
        restored = any(row["phase"] not in (START, LOAD, END) for row in rows_of_start)
        for row in rows_of_start:
            counted.append(row)
            if row["phase"] == END:
                continue
            seconds[row["phase"]] = seconds.get(row["phase"], 0.0) + row["seconds"]
            if row["phase"] == LOAD and restored:
                seconds[AGAIN] += sum(_cut_after(earlier, row["step"]) for earlier in step_rows)
            if row["phase"] == STEPS:
                step_rows.append(dict(row))
    if not counted:
        return None
    seconds[SKIPPED] = sum(_seconds_per_step(row) * row.get(SKIPPED, 0) for row in step_rows)
    seconds[STEPS] -= seconds[AGAIN] + seconds[SKIPPED]
    total = lambda name: sum(row.get(name, 0) for row in counted)
    starts = sum(row["phase"] == START for row in counted)
    seconds = {name: value for name, value in seconds.items() if value > 0 or name == STEPS}
    return Account(seconds, starts, total("programs"), total("cached"), total("compile_s"))


def _seconds_per_step(row: Row) -> float:
    return row["seconds"] / (row["step"] - row["first"]) if row["step"] > row["first"] else 0.0


def _cut_after(row: Row, step: int) -> float:
    """Remove the steps after `step` from a row, in place; returns their seconds."""
    repeated = row["step"] - max(row["first"], step)
    if repeated <= 0:
        return 0.0
    lost, last = _seconds_per_step(row) * repeated, row["step"] - repeated
    row["seconds"], row["step"] = row["seconds"] - lost, last
    row[SKIPPED] = min(row.get(SKIPPED, 0), last - row["first"])
    return lost


def sentence(rows: Sequence[Row]) -> str:
    """One console line: the productive share, the largest others, programs compiled; empty without rows."""
    if (total := account(rows)) is None:
        return ""
    others = sorted((name for name in total.seconds if name != STEPS), key=lambda name: -total.seconds[name])
    shares = [f"{NAMES.get(name, name)} {total.share(name):.0%}" for name in others[:4]]
    starts = f" in {total.starts} starts" if total.starts > 1 else ""
    return (
        f"goodput: {total.share(STEPS):.0%} of {total.wall:,.0f} s{starts}; {', '.join(shares)}; programs compiled: "
        f"{total.programs - total.cached}, from the cache: {total.cached}, in {total.compile_s:,.0f} s"
    )


def page(rows: Sequence[Row]) -> str:
    """The report's table of the wall clock, empty without rows."""
    if (total := account(rows)) is None:
        return ""
    cells = [
        [escape(NAMES.get(name, name)), number(value), percent(total.share(name))]
        for name, value in total.seconds.items()
    ]
    cells.append(["total", number(total.wall), percent(1.0)])
    starts = f"{total.starts} starts" if total.starts != 1 else "one start"
    note = (
        f'<p class="note">{percent(total.share(STEPS))} of the wall clock was productive, in {starts}. Programs: '
        f"{total.programs}, of which {total.cached} came from the compilation cache; {number(total.compile_s, 3)} s to "
        "compile or read them, in whatever phase they were needed.</p>"
    )
    return table(["phase", "seconds", "share"], cells, last=True) + note
