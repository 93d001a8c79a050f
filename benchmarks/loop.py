"""What a run's loop costs beside its steps: input, logging and all else that is not on the devices.

    python benchmarks/loop.py [--quick] [--json]

One process has a real run (rows on disk, threads that read ahead, metrics.jsonl, TensorBoard, bar, watchdog) and the
run's own compiled step, bare, on one batch that is in place already. They take turns; a turn's time is that of its
last result less that of its first, over the steps between them. `loop_share` is the median over rounds of
(loop - bare) / bare, and `input_share` and `log_share` are the training thread's own time per step for them, most of
which the devices do not see, over the bare step's.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

from jaxkd import job, load, metrics
from jaxkd.data import loader
from jaxkd.experiment import Experiment, experiment
from jaxkd.train import log, loop
from jaxkd.train.profiling import Profile

FULL = {"steps": 6, "rounds": 5, "batch": 4, "length": 128, "embed": 512, "layers": 6, "mlp": 1536}
QUICK = {"steps": 6, "rounds": 3, "batch": 4, "length": 64, "embed": 192, "layers": 4, "mlp": 512}


def recipe(size: dict[str, int], place: Path) -> Experiment:
    """A live teacher twice as deep as its student, on two domains of made-up text."""
    rng = random.Random(0)
    domains = {}
    for name in ("alpha", "beta"):
        texts = (" ".join(f"{rng.randrange(10**6):06d}" for _ in range(size["length"])) for _ in range(200))
        domains[name] = str(place / f"{name}.jsonl")
        Path(domains[name]).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    width = size["embed"]
    shape = {"vocab": 257, "embed": width, "heads": width // 64, "kv_heads": width // 64, "head_dim": 64}
    shape |= {"mlp": size["mlp"], "layers": size["layers"]}
    steps = 2 + (size["rounds"] + 1) * size["steps"]
    return experiment(
        {
            "teacher": {"path": "random", "shape": shape},
            "student": {"path": "random", "shape": shape | {"layers": size["layers"] // 2}},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 1.0},
                "ce": {"divergence": "next_token", "weight": 0.1},
            },
            "data": {
                "domains": domains,
                "directory": str(place / "rows"),
                "tokenizer": "bytes",
                "batch": size["batch"],
                "length": size["length"],
                "interval": steps,
                "train_rows": 400,
                "valid_rows": size["batch"],
            },
            "optim": {"lr": {"schedule": "cosine", "peak": 1e-4, "warmup": 2}},
            "run": {"steps": steps, "eval_batch": size["batch"], "checkpoint_every": 10**6, "log_every": 1},
        }
    )


class Turns:
    """The run's real loop, held after every so many steps, and its step alone."""

    def __init__(self, run: loop.Run, output: log.TrainLog):
        """Nothing has been timed yet."""
        self.run, self.output, self.hosts = run, output, {"input": 0.0, "log": 0.0}
        self.arrivals: list[float] = []
        read, place, write = metrics.read, loader.place, log.TrainLog.step

        def arrived(measured):
            values = read(measured)
            self.arrivals.append(time.perf_counter())
            return values

        metrics.read = arrived
        loader.place = self._timed("input", place)
        log.TrainLog.step = self._timed("log", write)

    def _timed(self, name, function):
        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            self.hosts[name] += time.perf_counter() - start
            return result

        return call

    def loop(self, first: int, last: int) -> float:
        """Seconds a step of the real loop, from step `first` to step `last`."""
        self.arrivals.clear()
        stop = lambda step: step == last
        with contextlib.redirect_stdout(io.StringIO()):
            self.run._steps(first, self.run.job.experiment.run, self.output, stop, Profile(self.run.workdir))
        return (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1)

    def bare(self, batch, steps: int) -> float:
        """Seconds a step of the compiled program alone; the state goes on from where the loop left it."""
        arrived = []
        waiting = None
        for _ in range(steps):
            self.run.state, measured = self.run.step(self.run.state, self.run.teaching.train.state, batch)
            if waiting is not None:
                jax.block_until_ready(waiting)
                arrived.append(time.perf_counter())
            waiting = measured
        jax.block_until_ready(waiting)
        arrived.append(time.perf_counter())
        return (arrived[-1] - arrived[0]) / (len(arrived) - 1)


def measure(size: dict[str, int], place: Path) -> dict:
    """One row: the bare step, the loop's step, and their difference."""
    e = recipe(size, place)
    built = job.build(e)
    workdir = place / "run"
    workdir.mkdir()
    with jax.set_mesh(built.mesh), contextlib.redirect_stdout(sys.stderr):
        rows = load.domains(built)
        with contextlib.closing(loop.Run(built, workdir, rows)) as run:
            run.checkpoints.save = lambda *_: None  # a checkpoint is no part of a step
            run.mixing.begin([])
            output = log.TrainLog(workdir, e.run.steps, 0, 0)
            turns = Turns(run, output)
            batch = next(run._interval(0))
            turns.loop(0, 2)  # compiles
            bare, looped, first = [], [], 2
            for number in range(size["rounds"] + 1):
                last = first + size["steps"]
                if number == 1:  # the first round is not counted
                    turns.hosts = dict.fromkeys(turns.hosts, 0.0)
                    bare, looped = [], []
                for one in ("bare", "loop") if number % 2 else ("loop", "bare"):
                    if one == "bare":
                        bare.append(turns.bare(batch, size["steps"]))
                    else:
                        looped.append(turns.loop(first, last))
                first = last
            output.close()
    step = statistics.median(bare)
    counted = size["rounds"] * size["steps"]
    return {
        "tokens": size["batch"] * size["length"],
        "bare_step_s": round(step, 5),
        "loop_step_s": round(statistics.median(looped), 5),
        "loop_share": round(statistics.median((a - b) / b for a, b in zip(looped, bare)), 4),
        "input_share": round(turns.hosts["input"] / counted / step, 5),
        "log_share": round(turns.hosts["log"] / counted / step, 5),
        "rounds": size["rounds"],
    }


def main() -> None:
    """Print one row, as a sentence or as JSON."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--quick", action="store_true", help="steps of some ten milliseconds")
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxkd-loop-") as place:
        row = measure(QUICK if given.quick else FULL, Path(place))
    if given.json:
        print(json.dumps(row))
        return
    print(
        f"step alone {1e3 * row['bare_step_s']:.1f} ms, in the loop {1e3 * row['loop_step_s']:.1f} ms: the loop adds "
        f"{row['loop_share']:.1%}. Of the training thread's time, input is {row['input_share']:.2%} of a step and "
        f"logging {row['log_share']:.2%}"
    )


if __name__ == "__main__":
    main()
