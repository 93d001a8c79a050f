"""`jaxkd sweep`: variants of a recipe times seeds, one `jaxkd train` process after another.

This process never initialises JAX: the accelerator belongs to the run that is training.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxkd.config.recipe import read_config, split
from jaxkd.config.schema import Experiment, experiment
from jaxkd.report import records
from jaxkd.run.workdir import saved_experiment
from jaxkd.runtime import files
from jaxkd.runtime.cluster import EXIT_STOPPED

_COMMITTED = "commit_success.txt"  # Orbax writes it last
_COMPILED = "JAX_COMPILATION_CACHE_DIR"


class Run(NamedTuple):
    """One training of a sweep."""

    variant: str
    seed: int
    workdir: Path
    config: tuple[str, ...]  # `--config...` arguments
    experiment: Experiment

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def plan(
    recipe: str,
    overrides: Sequence[str],
    workdir: Path,
    variants: Sequence[str],
    runs: Sequence[str],
    seeds: Sequence[int],
) -> list[Run]:
    """The runs of a sweep, seed by seed: an interrupted sweep has about as many seeds of each variant.

    `variants` are recipe arguments, each appended to the recipe's own: `small` and `kd` give `small,kd`. `runs` are
    lines "NAME: [:ARGUMENT] [--config.KEY=VALUE ...]". ValueError for a bad line or config, or two variants of a name.
    """
    lines = [(name, name, ()) for name in variants] + [_parse(line) for line in runs]
    if not lines:
        lines = [(recipe.partition(":")[2] or Path(recipe).stem, "", ())]
    names = [name for name, _, _ in lines]
    for name in names:
        if not re.fullmatch(r"[^\s./\\][^\s/\\]*", name):
            raise ValueError(f"'{name}' cannot be a variant's name: it names a directory; write NAME: :ARGUMENT")
        if names.count(name) > 1:
            raise ValueError(f"two variants are named '{name}'")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds repeats a seed: {' '.join(map(str, seeds))}")
    planned = []
    file, _, own = recipe.partition(":")
    for seed in seeds:
        for name, argument, more in lines:
            path = ":".join(filter(None, [file, ",".join(filter(None, [own, argument]))]))
            config = (f"--config={path}", *overrides, *more, f"--config.run.seed={seed}")
            try:
                e = experiment(read_config(config))
            except ValueError as error:
                raise ValueError(f"variant '{name}': {error}") from None
            planned.append(Run(name, seed, workdir / name / f"seed-{seed}", config, e))
    return planned


def _parse(line: str) -> tuple[str, str, tuple[str, ...]]:
    """A variant's name, its recipe argument and its overrides."""
    name, colon, rest = line.partition(":")
    words, overrides = split(shlex.split(rest))
    arguments = [word[1:] for word in words if word.startswith(":")]
    if not colon or len(words) > len(arguments) or len(arguments) > 1:
        raise ValueError(f'--run "{line}" is not of the form "NAME: [:ARGUMENT] [--config.KEY=VALUE ...]"')
    return name.strip(), "".join(arguments), tuple(overrides)


def read_runs(file: Path) -> list[str]:
    """The `--run` lines of a file, without empty lines and comments (#)."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def result(run: Run) -> dict[str, Any] | None:
    """The mean row of a finished run's last evaluation, or None.

    Finished: the workdir holds the same experiment, and the checkpoint and the evaluation of its last step.
    """
    steps = run.experiment.run.steps
    try:
        same = saved_experiment(run.workdir) == run.experiment
        rows = records.rows(run.workdir, records.EVALS)
    except (OSError, ValueError):
        return None
    last = [row for row in rows if row["step"] == steps and row["domain"] == "mean"]
    saved = (run.workdir / "checkpoints" / str(steps) / _COMMITTED).is_file()
    return last[-1] if same and saved and last else None


def _complete(cache: str) -> bool:
    try:
        return bool(files.read_json(Path(cache).expanduser() / "manifest.json")["complete"])
    except (OSError, ValueError, KeyError):
        return False


class Command(NamedTuple):
    """A `jaxkd` process to run."""

    words: tuple[str, ...]  # its arguments
    log: Path  # its output
    run: Run | None  # None for `jaxkd cache`, which runs share


def commands(runs: Sequence[Run], workdir: Path) -> Iterator[Command]:
    """The remaining commands in order; the disk is read again before each."""
    caches = set()
    for run in runs:
        if result(run) is not None:
            continue
        cache = run.experiment.teacher.cache
        if cache and cache not in caches and not _complete(cache):
            caches.add(cache)
            yield Command(("cache", *run.config), workdir / f"cache-{len(caches)}.log", None)
        # A finished run that differs only in its seed has passed the same checks.
        checked = any(other.variant == run.variant and result(other) is not None for other in runs)
        words = ("train", "--workdir", str(run.workdir), *run.config, *(["--no-check"] if checked else []))
        yield Command(words, run.workdir.with_suffix(".log"), run)


def environment(workdir: Path) -> dict[str, str]:
    """Environment variables of the runs: they share compiled programs."""
    return {} if _COMPILED in os.environ else {_COMPILED: str((workdir / "compiled").absolute())}


def printed(runs: Sequence[Run], workdir: Path) -> Iterator[str]:
    """Shell commands for a launcher, those that write caches first."""
    setting = [f"{name}={shlex.quote(value)}" for name, value in environment(workdir).items()]
    for command in sorted(commands(runs, workdir), key=lambda c: c.run is not None):
        yield " ".join([*setting, shlex.join(["jaxkd", *command.words])])


class Child:
    """The running process; SIGINT and SIGTERM are forwarded to it."""

    def __init__(self) -> None:
        self.stopped = 0
        self._forwarded = False
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Child":
        self._before = {n: signal.signal(n, self._forward) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: Any) -> None:
        self.stopped = number
        if self._process is not None and self._process.poll() is None:
            self._forwarded = True
            self._process.send_signal(number)

    def wait(self, command: Command, more: Mapping[str, str]) -> int:
        """Run a command with more environment variables; returns its exit code."""
        if self.stopped:  # between two runs
            return 128 + self.stopped
        command.log.parent.mkdir(parents=True, exist_ok=True)
        self._forwarded = False
        with command.log.open("a") as log:
            # A session of its own: Ctrl-C then reaches it once, from `_forward`; a second would interrupt saving.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jaxkd", *command.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **more},
                start_new_session=True,
            )
            if self.stopped and not self._forwarded:  # during Popen
                self._process.send_signal(self.stopped)
            return self._process.wait()


def run_all(runs: Sequence[Run], workdir: Path, say: Callable[[str], None] = print) -> int:
    """Run the remaining commands; a failed one does not stop the others.

    The exit code is 0 when all runs are finished, 1 when some are not, 130 after Ctrl-C, and after SIGTERM
    `cluster.EXIT_STOPPED`, on which launchers restart the command.
    """
    done = [run for run in runs if result(run) is not None]
    say(f"{len(runs)} runs in {workdir}: {len(done)} finished, {len(runs) - len(done)} to go")
    failed: dict[str, str] = {}
    with Child() as child:
        for command in commands(runs, workdir):
            name = str(command.run) if command.run else "the teacher's signal"
            say(f"{name}: output in {command.log}")
            started = time.monotonic()
            code = child.wait(command, environment(workdir))
            seconds = f"{time.monotonic() - started:,.0f} s"
            if child.stopped:
                say(f"{name}: stopped; the same command resumes")
                return EXIT_STOPPED if child.stopped == signal.SIGTERM else 128 + child.stopped
            row = result(command.run) if command.run else {}
            if code or row is None:
                output = command.log.read_text(encoding="utf-8", errors="replace")
                failed[name] = re.split(r"[\r\n]+", output.strip())[-1][:300] or f"exit code {code}"
                say(f"{name}: failed after {seconds}: {failed[name]}")
            elif row:
                say(
                    f"{name}: done in {seconds}: {row['student_nats']:.3f} nats/token (teacher "
                    f"{row['teacher_nats']:.3f}), KL {row['kl']:.3f}, agreement {row['agreement']:.1%}"
                )
    left = [run for run in runs if result(run) is None]
    say(f"{len(runs) - len(left)} of {len(runs)} runs are finished: jaxkd compare {workdir}")
    for name, reason in failed.items():
        say(f"failed: {name}: {reason}")
    return 1 if left else 0
