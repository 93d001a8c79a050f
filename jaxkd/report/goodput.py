"""What a run's wall clock went into, added up from goodput.jsonl."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxkd.report.charts import escape, number, percent, table
from jaxkd.runtime import files
from jaxkd.runtime.goodput import END, FILE, LOAD, START, STEPS, Row

AGAIN, SKIPPED, DOWN = "again", "skipped", "down"


NAMES = {
    STEPS: "steps that count",
    AGAIN: "steps made again after a restart",
    SKIPPED: "steps left out",
    DOWN: "between processes, and what a kill cut short",
    START: "starting, and rows",
    LOAD: "models and checkpoint",
    "check": "checks",
    "compile": "compiling the step",
    "evaluation": "evaluations",
    "mixture": "re-weighting",
    "checkpoint": "waiting for checkpoints",
}


"""Of what a second may have gone into; the first is the productive part."""


class Account(NamedTuple):
    """Seconds by what they went into."""

    seconds: dict[str, float]
    processes: int
    programs: int  # compiled or found
    cached: int  # of them found in JAX's cache
    compile_s: float  # for all of them, wherever they were made

    @property
    def wall(self) -> float:
        """From the first process's start to the last one's end."""
        return sum(self.seconds.values())

    @property
    def productive(self) -> float:
        """Share of the wall clock in which the run moved on."""
        return self.seconds[STEPS] / self.wall if self.wall else 0.0


def account(rows: Sequence[Row]) -> Account | None:
    """Add up what `goodput.jsonl` holds; None when it holds nothing.

    A process that goes on from an earlier step than its predecessor had reached makes steps again: what they took the
    first time counts as lost. The time of a step is that of its line divided by its steps. What a finished run is
    asked again, and the time until then, are left out.
    """
    seconds: dict[str, float] = dict.fromkeys(NAMES, 0.0)
    done: list[Row] = []  # lines of steps, as far as they still count
    over: float | None = None
    finished, counted = False, []
    for process in _processes(rows):
        if finished and not any(row["step"] > row["first"] for row in process):
            continue
        began = process[0]["time"] - process[0]["seconds"]
        if over is not None and not finished:
            seconds[DOWN] += max(0.0, began - over)
        over, finished = process[-1]["time"], bool(process[-1].get("finished"))
        # One that ended while it loaded never knew from where to go on, and made no step again.
        restored = any(row["phase"] not in (START, LOAD, END) for row in process)
        for row in process:
            counted.append(row)
            if row["phase"] == END:
                continue
            seconds[row["phase"]] = seconds.get(row["phase"], 0.0) + row["seconds"]
            if row["phase"] == LOAD and restored:
                seconds[AGAIN] += sum(_undone(line, row["step"]) for line in done)
            if row["phase"] == STEPS:
                done.append(dict(row))
    if not counted:
        return None
    seconds[SKIPPED] = sum(_each(row) * row.get(SKIPPED, 0) for row in done)
    seconds[STEPS] -= seconds[AGAIN] + seconds[SKIPPED]
    total = lambda name: sum(row.get(name, 0) for row in counted)
    processes = sum(row["phase"] == START for row in counted)
    seconds = {name: value for name, value in seconds.items() if value > 0 or name == STEPS}
    return Account(seconds, processes, total("programs"), total("cached"), total("compile_s"))


def _processes(rows: Iterable[Row]) -> list[list[Row]]:
    found: list[list[Row]] = []
    for row in rows:
        if row["phase"] == START or not found:
            found.append([])
        found[-1].append(row)
    return found


def _each(row: Row) -> float:
    """Seconds of one step of a line."""
    return row["seconds"] / (row["step"] - row["first"]) if row["step"] > row["first"] else 0.0


def _undone(row: Row, step: int) -> float:
    """Seconds of a line's steps after `step`, which it then loses."""
    beyond = row["step"] - max(row["first"], step)
    if beyond <= 0:
        return 0.0
    lost, left = _each(row) * beyond, row["step"] - beyond
    row["seconds"], row["step"] = row["seconds"] - lost, left
    row[SKIPPED] = min(row.get(SKIPPED, 0), left - row["first"])
    return lost


def read(workdir: Path) -> Account | None:
    """The account of a run so far."""
    return account(files.read_jsonl(workdir / FILE))


def sentence(found: Account | None) -> str:
    """The productive share, what took the rest, and what was compiled; nothing where nothing is known."""
    if found is None:
        return ""
    rest = sorted((item for item in found.seconds.items() if item[0] != STEPS), key=lambda item: -item[1])
    shares = [f"{NAMES.get(name, name)} {value / found.wall:.0%}" for name, value in rest]
    again = f" in {found.processes} processes" if found.processes > 1 else ""
    return (
        f"goodput: {found.productive:.0%} of {found.wall:,.0f} s{again}; {', '.join(shares[:4])}; programs compiled: "
        f"{found.programs - found.cached}, from the cache: {found.cached}, in {found.compile_s:,.0f} s"
    )


def page(rows: Sequence[Row]) -> str:
    """The report's table of the wall clock, empty where nothing is known."""
    found = account(rows)
    if found is None:
        return ""
    cells = [
        [escape(NAMES.get(name, name)), number(value), percent(value / found.wall if found.wall else 0.0)]
        for name, value in found.seconds.items()
    ]
    cells.append(["total", number(found.wall), percent(1.0)])
    many = f"{found.processes} processes" if found.processes != 1 else "one process"
    note = (
        f'<p class="note">{percent(found.productive)} of the wall clock was productive, in {many}. Programs: '
        f"{found.programs}, of which {found.cached} came from the compilation cache; {number(found.compile_s, 3)} s to "
        "compile or read them, wherever in the table they were needed.</p>"
    )
    return table(["the wall clock", "seconds", "share"], cells, last=True) + note
