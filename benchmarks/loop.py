"""What a run's loop costs beside its steps: input, logging and all else that is not on the devices.

    python benchmarks/loop.py --quick [--json]         # a step of some ten milliseconds
    python benchmarks/loop.py [--json] [--rows DIR]    # and the quickstart's; rows are kept in DIR

One process has a real run (rows on disk, threads that read ahead, metrics.jsonl with its sync, TensorBoard, bar,
watchdog) and the run's own compiled step. In each round four take turns: the step alone, on one batch that is in place
already ("bare"); the loop ("loop"); the loop with nothing to write down ("silent"); and the loop with a step that
waits for its result ("apart"), so that what the training thread does for itself has a core, as on the host of an
accelerator. The first three give seconds a step, between a turn's first result and its last. The fourth gives the
thread's own time: medians over all steps of `input` (the next batch, read and put in place), `log` (a line handed
over, and the bar) and `rest`.
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxkd.config.recipe import read_config
from jaxkd.config.schema import Experiment, experiment
from jaxkd.core import metrics
from jaxkd.run import job, load, loop
from jaxkd.runtime import log
from jaxkd.runtime.profiling import Profile

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"batch": 4, "length": 64, "embed": 192, "layers": 4, "mlp": 512}
TURNS = ("bare", "loop", "silent", "apart")
PARTS = ("input", "log", "rest")
MOST = 0.02  # of a step, for input and logging and all the rest


def small(steps: int, place: Path, rows: Path) -> Experiment:
    """A live teacher twice as deep as its student, on two domains of made-up text."""
    rng = random.Random(0)
    domains = {}
    for name in ("alpha", "beta"):
        texts = (" ".join(f"{rng.randrange(10**6):06d}" for _ in range(SMALL["length"])) for _ in range(200))
        domains[name] = str(place / f"{name}.jsonl")
        Path(domains[name]).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    width = SMALL["embed"]
    shape = {"vocab": 257, "embed": width, "heads": width // 64, "kv_heads": width // 64, "head_dim": 64}
    shape |= {"mlp": SMALL["mlp"], "layers": SMALL["layers"]}
    return experiment(
        {
            "teacher": {"path": "random", "shape": shape},
            "student": {"path": "random", "shape": shape | {"layers": SMALL["layers"] // 2}},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 1.0},
                "ce": {"divergence": "next_token", "weight": 0.1},
            },
            "data": {
                "domains": domains,
                "directory": str(rows),
                "tokenizer": "bytes",
                "batch": SMALL["batch"],
                "length": SMALL["length"],
                "interval": steps,
                "train_rows": 400,
                "valid_rows": SMALL["batch"],
            },
            "optim": {"lr": {"schedule": "cosine", "peak": 1e-4, "warmup": 2}},
            "run": {"steps": steps, "eval_batch": SMALL["batch"], "checkpoint_every": 10**6, "log_every": 1},
        }
    )


def quickstart(steps: int, place: Path, rows: Path) -> Experiment:
    """The recipe, in one interval and without checkpoints."""
    changes = {"data.directory": rows, "data.interval": steps, "run.steps": steps}
    changes |= {"run.checkpoint_every": 10**6, "run.eval_every": 0}
    recipe = [f"--config={ROOT / 'configs' / 'quickstart.py'}"]
    return experiment(read_config(recipe + [f"--config.{name}={value}" for name, value in changes.items()]))


RUNS: tuple[tuple[Callable[[int, Path, Path], Experiment], int, int], ...] = ((small, 3, 6), (quickstart, 2, 4))
"""Recipes, with rounds and steps of a turn."""


class Spans:
    """The training thread's own time by step: on the clock, and on its core."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] | None = None
        self._mark = self._core = 0.0

    def begin(self) -> None:
        """A turn begins: the time since the last one is no step's."""
        self._now = None

    def next(self) -> None:
        """A step has its result; the thread's own time until the next one begins."""
        self._now, self._mark, self._core = dict.fromkeys(PARTS, 0.0), time.perf_counter(), time.thread_time()

    def end(self) -> None:
        """The next step is about to begin."""
        if self._now is not None:
            own = time.perf_counter() - self._mark
            rest = own - self._now["input"] - self._now["log"]
            self.steps.append(self._now | {"rest": rest, "own": own, "core": time.thread_time() - self._core})

    def timed(self, part: str, function: Callable) -> Callable:
        """A function whose time is `part`."""

        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                if self._now is not None:
                    self._now[part] += time.perf_counter() - start

        return call


class Turns:
    """The run's real loop, held after every so many steps, and its step alone."""

    def __init__(self, run: loop.Run, output: log.TrainLog):
        """Nothing has been timed yet."""
        self.run, self.output, self.spans = run, output, Spans()
        self.batch = next(run._interval(0))
        self._step, self._write, self._interval = run.step, output.step, run._interval
        self._arrivals: list[float] = []
        read = metrics.read

        def arrived(measured):
            values = read(measured)
            self._arrivals.append(time.perf_counter())
            return values

        metrics.read = arrived

    def _each(self) -> float:
        return (self._arrivals[-1] - self._arrivals[0]) / (len(self._arrivals) - 1)

    def _apart(self, *arguments: Any) -> Any:
        self.spans.end()
        result = jax.block_until_ready(self._step(*arguments))
        self.spans.next()
        return result

    def _timed_interval(self, step: int) -> Iterator:
        taken = self.spans.timed("input", self._interval(step).__next__)
        with contextlib.suppress(StopIteration):
            while True:
                yield taken()

    def take(self, kind: str, first: int, last: int) -> float:
        """Seconds a step, of steps from `first` to `last` where it is the loop's turn."""
        run, output = self.run, self.output
        if kind == "bare":
            return self._bare(last - first)
        run.step, run._interval, output.step = self._step, self._interval, self._write
        if kind == "silent":
            output.step = lambda row, write: self._write(row, False)
        if kind == "apart":
            self.spans.begin()
            run.step, run._interval = self._apart, self._timed_interval
            output.step = self.spans.timed("log", self._write)
        self._arrivals.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            steps = itertools.count(first + 1)  # the loop asks after each whether to stop
            run._steps(first, run.job.experiment.run, output, lambda: next(steps) == last, Profile(run.workdir))
        return self._each()

    def _bare(self, steps: int) -> float:
        self._arrivals.clear()
        waiting = None
        for _ in range(steps):
            run = self.run
            run.state, measured = self._step(run.state, run.frozen, run.teachers.train.state, self.batch)
            if waiting is not None:
                jax.block_until_ready(waiting)
                self._arrivals.append(time.perf_counter())
            waiting = measured
        jax.block_until_ready(waiting)
        self._arrivals.append(time.perf_counter())
        return self._each()


def measure(name: str, e: Experiment, workdir: Path, rounds: int, steps: int) -> dict[str, Any]:
    """One row: seconds a step of the first three, and the fourth's parts."""
    built = job.build(e)
    workdir.mkdir()
    read = metrics.read
    with jax.set_mesh(built.mesh), contextlib.redirect_stdout(sys.stderr):
        rows = load.domains(e.data, built.models.tokenizer)
        with contextlib.closing(loop.Run(built, workdir, rows)) as run:
            run.checkpoints.save = lambda *_: None  # a checkpoint is no part of a step
            run.mixing.begin([])
            with contextlib.closing(log.TrainLog(workdir, e.run.steps, 0, 0)) as output:
                turns = Turns(run, output)
                turns.take("loop", 0, 2)  # compiles
                times: dict[str, list[float]] = {kind: [] for kind in TURNS}
                first = 2
                for number in range(rounds + 1):
                    if number == 1:  # the first round is not counted
                        times, turns.spans = {kind: [] for kind in TURNS}, Spans()
                    for kind in TURNS[number % 4 :] + TURNS[: number % 4]:
                        times[kind].append(turns.take(kind, first, first + steps))
                        first += steps * (kind != "bare")
    metrics.read = read
    middle = lambda part: statistics.median(span[part] for span in turns.spans.steps)
    share = lambda a, b: statistics.median((x - y) / y for x, y in zip(times[a], times[b]))
    parts = {f"{part}_ms": round(1e3 * middle(part), 3) for part in (*PARTS, "own", "core")}
    return {
        "name": name,
        "tokens": e.data.batch * e.data.length,
        **{f"{kind}_step_s": round(statistics.median(times[kind]), 5) for kind in TURNS[:3]},
        "loop_share": round(share("loop", "bare"), 4),
        "log_share": round(share("loop", "silent"), 4),
        **parts,
        "own_share": round(middle("own") / statistics.median(times["bare"]), 5),
        "enough_step_s": round(middle("own") / MOST, 4),
        "steps": len(turns.spans.steps),
    }


def told(row: dict[str, Any], step_s: float) -> str:
    """A row for people."""
    here, there = (f"{share:.2%}" for share in (row["own_share"], row["own_ms"] / 1e3 / step_s))
    parts = ", ".join(f"{part} {row[f'{part}_ms']:.2f}" for part in PARTS)
    return (
        f"{row['name']}, {row['tokens']} tokens: step alone {1e3 * row['bare_step_s']:.1f} ms, in the loop "
        f"{1e3 * row['loop_step_s']:.1f} ({row['loop_share']:+.1%}), with nothing written down "
        f"{1e3 * row['silent_step_s']:.1f}\n"
        f"  the training thread's own time a step, in ms: {parts}; together {row['own_ms']:.2f} "
        f"({row['core_ms']:.2f} of it on a core), {here} of this step, {there} of one of {step_s:g} s\n"
        f"  below {MOST:.0%} from steps of {row['enough_step_s']:.2f} s on"
    )


def main() -> None:
    """Print a row a run, as sentences or as JSON."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--quick", action="store_true", help="only the step of some ten milliseconds")
    options.add_argument("--json", action="store_true")
    options.add_argument("--rows", type=Path, metavar="DIR", help="where rows are kept")
    options.add_argument("--step-s", type=float, default=0.2, metavar="SECONDS", help="a step to compare with (0.2)")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxkd-loop-") as name:
        place = Path(name)
        for recipe, rounds, steps in RUNS[: 1 if given.quick else None]:
            e = recipe(2 + (rounds + 1) * 3 * steps, place, given.rows or place / "rows")
            row = measure(recipe.__name__, e, place / recipe.__name__, rounds, steps)
            print(json.dumps(row) if given.json else told(row, given.step_s), flush=True)


if __name__ == "__main__":
    main()
