"""A run's checkpoints: where they are, which one it resumes from, and the student in one of them."""

import sys
from pathlib import Path
from typing import Any

import jax

from jaxkd.config.schema import Experiment, RunBlock, plain
from jaxkd.core.types import PyTree
from jaxkd.report.records import leaves
from jaxkd.run.open_models import Models
from jaxkd.train.checkpoint import COMMITTED, Checkpoints, Recovered
from jaxkd.train.retention import Keep, checkpoint_directory
from jaxkd.train.state import TrainState, assemble


def objective_params(source: str, abstract: PyTree) -> PyTree:
    """Parameters of the objective's terms by name, from the run that `student.objective_from` names; {} for none.

    `source` is a run's workdir, its checkpoints' directory, or one checkpoint; `abstract` is `params["objective"]`,
    ShapeDtypeStruct leaves with shardings. ValueError where no term has its name there, or other shapes;
    FileNotFoundError where there is no checkpoint.
    """
    if not source:
        return {}
    try:
        path = checkpoint_directory(source)
        inner = path / "checkpoints"
        folder = path.parent if path.name.isdigit() else inner if inner.is_dir() else path
        if not folder.is_dir():
            raise FileNotFoundError(f"student.objective_from: {source} is no run's workdir and no checkpoint of one")
        checkpoints = Checkpoints(folder, read_only=True)
        read = lambda step: checkpoints.restore_objective(step, abstract)
        if path.name.isdigit():
            return read(int(path.name))
        if (newest := checkpoints.newest(read)) is None:
            raise FileNotFoundError(f"student.objective_from: {source} has no checkpoint yet")
    except ValueError as error:
        raise ValueError(f"student.objective_from: {error}") from None
    return _report_damaged(newest)[1]


def directory(run: RunBlock, workdir: Path) -> Path | str:
    """Where a run's checkpoints are."""
    return run.checkpoints or workdir / "checkpoints"


def writer(run: RunBlock, workdir: Path) -> Checkpoints:
    """A run's checkpoints, opened for writing."""
    return Checkpoints(directory(run, workdir), Keep(run.keep_checkpoints, run.keep_every, run.keep_best))


def recover(checkpoints: Checkpoints, abstract: TrainState, e: Experiment, workdir: Path) -> Recovered | None:
    """The newest whole checkpoint, which the run resumes from; None where there is none yet.

    ValueError where `run.checkpoints` lacks those that the workdir marks, or holds another run's.
    """
    newest = checkpoints.recover(abstract)
    if not e.run.checkpoints:
        return newest
    marked = [path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    if newest is None and marked:
        raise ValueError(
            f"{workdir} has made a checkpoint at step {max(map(int, marked))}, but there is none under "
            f"{checkpoints.directory}: put it back or make it reachable, or begin anew in another --workdir"
        )
    # A new machine resumes with an empty workdir: the checkpoints must be this run's.
    if newest is not None and not marked and newest.progress.get("config") != identity(e)["config"]:
        before, after = newest.progress.get("config", {}), identity(e)["config"]
        keys = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
        raise ValueError(
            f"{checkpoints.directory} holds checkpoints of another run, whose {', '.join(keys[:6])} differ from this "
            "config: give run.checkpoints another directory, or resume in that run's own workdir"
        )
    return newest


def identity(e: Experiment) -> dict[str, Any]:
    """What a checkpoint outside the workdir records of its run: the config's leaves by dotted key."""
    return {"config": leaves(plain(e))} if e.run.checkpoints else {}


def mark(checkpoints: Checkpoints, run: RunBlock, workdir: Path) -> None:
    """Record in the workdir which steps `run.checkpoints` holds: the workdir of a trained run is recognised by them."""
    if not run.checkpoints or jax.process_index():
        return
    marks, steps = workdir / "checkpoints", checkpoints.steps()
    marks.mkdir(exist_ok=True)
    for old in marks.iterdir():
        if old.name.isdigit() and int(old.name) not in steps and [file.name for file in old.iterdir()] == [COMMITTED]:
            (old / COMMITTED).unlink()  # a directory with any other file in it is a checkpoint, and stays
            old.rmdir()
    for step in steps:
        (marks / str(step)).mkdir(exist_ok=True)
        (marks / str(step) / COMMITTED).write_text(f"{checkpoints.directory / str(step)}\n", encoding="utf-8")


def student(
    run: RunBlock, workdir: Path, models: Models, frozen: PyTree, step: int | str | None
) -> tuple[int, PyTree, PyTree]:
    """A run's student from a checkpoint: the step, its parameters, and their running average or the same parameters.

    `frozen` has the parameters that are in no checkpoint. `step` is as for `numbered`, or None for the newest.
    """
    checkpoints = Checkpoints(directory(run, workdir), read_only=True)
    abstract = {} if frozen else models.student.abstract

    def read(step: int) -> tuple[PyTree, PyTree]:
        params = assemble(checkpoints.restore_student(step, abstract), frozen)
        if not models.is_self:
            return params, params
        return params, assemble(checkpoints.restore_average(step, abstract), frozen)

    if step is not None:
        number = numbered(checkpoints, workdir, str(step))
        return number, *read(number)
    if (newest := checkpoints.newest(read)) is None:
        raise FileNotFoundError(f"{workdir} has no checkpoint yet: `jaxkd train` writes one")
    chosen, (params, average) = _report_damaged(newest)
    return chosen, params, average


def numbered(checkpoints: Checkpoints, workdir: Path, step: str) -> int:
    """The step that `--step` names: a number, which need not exist, or "best" for the lowest held-out loss."""
    if step.isdigit():
        return int(step)
    if step != "best":
        raise ValueError(f"--step {step} is no checkpoint: give a number of steps, or best")
    if (best := checkpoints.best()) is None:
        raise ValueError(f"{workdir} has no checkpoint of an evaluated step (run.eval_every): give --step NUMBER")
    return best


def _report_damaged(newest: tuple[int, Any, dict[int, str]]) -> tuple[int, Any]:
    """The newest whole checkpoint's step and content; later ones, which are damaged, are named on stderr."""
    step, content, damaged = newest
    for reason in damaged.values():
        print(f"jaxkd: {reason}; step {step} is used", file=sys.stderr)
    return step, content
