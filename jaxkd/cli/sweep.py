"""Variants of a recipe times seeds, each a `jaxkd train` of its own, one after another: `jaxkd sweep`.

JAX is never started here: the accelerator belongs to the run that is training.
"""

import json
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

from jaxkd.config.recipe import read_config
from jaxkd.config.schema import Experiment, experiment
from jaxkd.run.workdir import saved_experiment
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
    """The runs of a sweep, seed by seed, so that a sweep that is cut has compared like with like.

    Args:
        recipe: FILE or FILE:ARGUMENT.
        overrides: `--config.KEY=VALUE`, for all.
        workdir: of the sweep; a run gets VARIANT/seed-N in it.
        variants: recipe arguments, each put behind the recipe's own: `small` and `kd` make `small,kd`.
        runs: "NAME: [:ARGUMENT] [--config.KEY=VALUE ...]".
        seeds: values of `run.seed`.

    Raises:
        ValueError: when a variant cannot be read, two have one name, or a config is wrong; nothing has been run then.
    """
    given = [(name, name, ()) for name in variants] + [_parse(line) for line in runs]
    if not given:
        given = [(recipe.partition(":")[2] or Path(recipe).stem, "", ())]
    names = [name for name, _, _ in given]
    for name in names:
        if not re.fullmatch(r"[^\s./\\][^\s/\\]*", name):
            raise ValueError(f"'{name}' cannot be a variant's name: it becomes a directory; write NAME: :ARGUMENT")
        if names.count(name) > 1:
            raise ValueError(f"two variants are called '{name}': give each a name of its own")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a seed is given twice: {' '.join(map(str, seeds))}")
    found = []
    for seed in seeds:
        for name, argument, more in given:
            config = (f"--config={_with(recipe, argument)}", *overrides, *more, f"--config.run.seed={seed}")
            try:
                e = experiment(read_config(config))
            except ValueError as error:
                raise ValueError(f"variant '{name}': {error}") from None
            found.append(Run(name, seed, workdir / name / f"seed-{seed}", config, e))
    return found


def _with(recipe: str, argument: str) -> str:
    file, _, own = recipe.partition(":")
    both = ",".join(part for part in (own, argument) if part)
    return f"{file}:{both}" if both else file


def _parse(line: str) -> tuple[str, str, tuple[str, ...]]:
    """A variant's name, its recipe argument and its overrides."""
    name, colon, rest = line.partition(":")
    words = shlex.split(rest)
    arguments = [word[1:] for word in words if word.startswith(":")]
    overrides = tuple(word for word in words if not word.startswith(":"))
    wrong = [word for word in overrides if not (word.startswith("--config.") and "=" in word)]
    if not colon or wrong or len(arguments) > 1:
        what = f"'{wrong[0]}' in '{line}'" if wrong else f"'{line}'"
        raise ValueError(f'{what} describes no run: write "NAME: :ARGUMENT --config.KEY=VALUE ...", or less of it')
    return name.strip(), "".join(arguments), overrides


def read_runs(file: Path) -> list[str]:
    """The runs of a file, one a line; empty lines and those that begin with # are left out."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# ------------------------------------------------------------------------------------ what is there


def result(run: Run) -> dict[str, Any] | None:
    """The last evaluation's mean of a run that is finished, None of any other.

    It is finished when its workdir holds this experiment, the checkpoint of its last step and the evaluation of that.
    """
    steps = run.experiment.run.steps
    try:
        same = saved_experiment(run.workdir) == run.experiment
        lines = (run.workdir / "evals.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError):
        return None
    last = [row for row in rows if row["step"] == steps and row["domain"] == "mean"]
    saved = (run.workdir / "checkpoints" / str(steps) / _COMMITTED).is_file()
    return last[-1] if same and saved and last else None


def _cached(e: Experiment) -> bool:
    """Whether nothing is left to store of the teacher's signal."""
    if not e.teacher.cache:
        return True
    try:
        manifest = json.loads((Path(e.teacher.cache).expanduser() / "manifest.json").read_text(encoding="utf-8"))
        return bool(manifest["complete"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ---------------------------------------------------------------------------------------- commands


class Command(NamedTuple):
    """Something to be run in a process of its own, and whose output goes to a file."""

    words: tuple[str, ...]  # without the program
    log: Path
    run: Run | None  # None for the cache that runs share


def commands(runs: Sequence[Run], workdir: Path) -> Iterator[Command]:
    """What is left to do, in its order; looked at anew before each one."""
    asked = set()
    for run in runs:
        if result(run) is not None:
            continue
        where = run.experiment.teacher.cache
        if where not in asked and not _cached(run.experiment):
            asked.add(where)
            yield Command(("cache", *run.config), workdir / f"cache-{len(asked)}.log", None)
        # Only the seed is another: what has been looked at for a finished run holds.
        known = any(other.variant == run.variant and result(other) is not None for other in runs)
        words = ("train", "--workdir", str(run.workdir), *run.config, *(["--no-check"] if known else []))
        yield Command(words, run.workdir.with_suffix(".log"), run)


def environment(workdir: Path) -> dict[str, str]:
    """What the runs share beside rows and caches: compiled programs."""
    return {} if _COMPILED in os.environ else {_COMPILED: str((workdir / "compiled").absolute())}


def printed(runs: Sequence[Run], workdir: Path) -> Iterator[str]:
    """The commands for a launcher, a line each, those of a cache first."""
    setting = [f"{name}={shlex.quote(value)}" for name, value in environment(workdir).items()]
    for command in sorted(commands(runs, workdir), key=lambda c: c.run is not None):
        yield " ".join([*setting, shlex.join(["jaxkd", *command.words])])


# ----------------------------------------------------------------------------------------- running


class Child:
    """The process that is running, and the signals that are passed on to it."""

    def __init__(self) -> None:
        """None yet."""
        self.stopped = 0
        self._told = False
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Child":
        self._before = {n: signal.signal(n, self._pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: Any) -> None:
        self.stopped = number
        if self._process is not None and self._process.poll() is None:
            self._told = True
            self._process.send_signal(number)

    def wait(self, command: Command, more: Mapping[str, str]) -> int:
        """Run a command to its end; its exit code."""
        if self.stopped:  # between two runs
            return 128 + self.stopped
        command.log.parent.mkdir(parents=True, exist_ok=True)
        self._told = False
        with command.log.open("a") as log:
            # In a session of its own, a terminal's Ctrl-C comes once, from here; twice would interrupt the saving.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jaxkd", *command.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **more},
                start_new_session=True,
            )
            if self.stopped and not self._told:  # while it was being started
                self._process.send_signal(self.stopped)
            return self._process.wait()


def go(runs: Sequence[Run], workdir: Path, say: Callable[[str], None] = print) -> int:
    """Run what is left, and go on behind a run that fails.

    Returns:
        The exit code: 0 when all runs are done, 1 when some are not, after SIGTERM the one on which launchers start the
        same command again, after Ctrl-C 130.
    """
    done = [run for run in runs if result(run) is not None]
    say(f"{len(runs)} runs in {workdir}: {len(done)} are done, {len(runs) - len(done)} to go")
    failed: dict[str, str] = {}
    with Child() as child:
        for command in commands(runs, workdir):
            name = str(command.run) if command.run else "the teacher's signal"
            say(f"{name}: output in {command.log}")
            started = time.monotonic()
            code = child.wait(command, environment(workdir))
            took = f"{time.monotonic() - started:,.0f} s"
            if child.stopped:
                say(f"{name}: stopped; the same command goes on from here")
                return EXIT_STOPPED if child.stopped == signal.SIGTERM else 128 + child.stopped
            found = result(command.run) if command.run else {}
            if code or found is None:
                failed[name] = _last_line(command.log) or f"exit code {code}"
                say(f"{name}: failed after {took}: {failed[name]}")
            elif found:
                say(
                    f"{name}: done in {took}: {found['student_nats']:.3f} nats/token (teacher "
                    f"{found['teacher_nats']:.3f}), KL {found['kl']:.3f}, agreement {found['agreement']:.1%}"
                )
    left = [run for run in runs if result(run) is None]
    say(f"{len(runs) - len(left)} of {len(runs)} runs are done: jaxkd compare {workdir}")
    for name, why in failed.items():
        say(f"failed: {name}: {why}")
    return 1 if left else 0


def _last_line(log: Path) -> str:
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip())
    return lines[-1][:300]
