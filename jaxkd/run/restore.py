"""A run's checkpoints: where they are, what a run goes on from, and the student in one of them."""

import sys
from pathlib import Path
from typing import Any

import jax

from jaxkd.config.schema import Experiment, leaves, plain
from jaxkd.core.types import PyTree
from jaxkd.run.job import Job
from jaxkd.train.checkpoint import COMMITTED, Checkpoints, Recovered
from jaxkd.train.retention import Keep, checkpoint_directory


def objective_params(job: Job) -> PyTree:
    """What `student.objective_from` hands on: parameters of the objective's terms by name, none where it is empty.

    Raises:
        ValueError: when no term has its name there, or its parameters have other shapes.
        FileNotFoundError: when there is no checkpoint.
    """
    where, wanted = job.experiment.student.objective_from, job.state.params["objective"]
    if not where:
        return {}
    try:
        path = checkpoint_directory(where)
        # A run's workdir, where its checkpoints are, or one of them.
        inner = path / "checkpoints"
        folder = path.parent if path.name.isdigit() else inner if inner.is_dir() else path
        if not folder.is_dir():
            raise FileNotFoundError(f"student.objective_from: {where} is no run's workdir and no checkpoint of one")
        checkpoints = Checkpoints(folder, read_only=True)
        read = lambda step: checkpoints.restore_objective(step, wanted)
        if path.name.isdigit():
            return read(int(path.name))
        if (found := checkpoints.newest(read)) is None:
            raise FileNotFoundError(f"student.objective_from: {where} has no checkpoint yet")
    except ValueError as error:
        raise ValueError(f"student.objective_from: {error}") from None
    return _said(found)[1]


def place_of_checkpoints(e: Experiment, workdir: Path) -> Path | str:
    """Where a run's checkpoints are."""
    return e.run.checkpoints or workdir / "checkpoints"


def checkpoints(e: Experiment, workdir: Path) -> Checkpoints:
    """A run's checkpoints, to be written.

    Raises:
        ValueError: when they cannot be where the config says.
    """
    keep = Keep(e.run.keep_checkpoints, e.run.keep_every, e.run.keep_best)
    return Checkpoints(place_of_checkpoints(e, workdir), keep)


def recover(job: Job, workdir: Path, there: Checkpoints) -> Recovered | None:
    """What a run goes on from: its newest whole checkpoint, None where it has made none.

    Raises:
        ValueError: as `Checkpoints.recover`, or when the workdir marks checkpoints that are not where they should be.
        OSError: as `Checkpoints.recover`.
    """
    found, e = there.recover(job.state), job.experiment
    if not e.run.checkpoints:
        return found
    marked = [path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    if found is None and marked:
        raise ValueError(
            f"{workdir} has made a checkpoint at step {max(map(int, marked))}, but there is none under "
            f"{there.directory}: put it back or make it reachable, or begin anew in another --workdir"
        )
    # A new machine goes on with an empty workdir: what is there must be this run's, and not another's.
    if found is not None and not marked and found.progress.get("config") != identity(e)["config"]:
        before, after = found.progress.get("config", {}), identity(e)["config"]
        keys = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
        raise ValueError(
            f"{there.directory} holds checkpoints of another run, whose {', '.join(keys[:6])} differ from this "
            "config: give run.checkpoints another place, or resume in that run's own workdir"
        )
    return found


def identity(e: Experiment) -> dict[str, Any]:
    """What a checkpoint says of its run where it is not in the workdir that belongs to it: the config, a leaf a key."""
    return {"config": leaves(plain(e))} if e.run.checkpoints else {}


def mark(e: Experiment, workdir: Path, there: Checkpoints) -> None:
    """Say in the workdir which steps are whole where they are kept elsewhere: who looks there sees a trained run."""
    if not e.run.checkpoints or jax.process_index():
        return
    marks, steps = workdir / "checkpoints", there.steps()
    marks.mkdir(exist_ok=True)
    for old in marks.iterdir():
        if old.name.isdigit() and int(old.name) not in steps and [file.name for file in old.iterdir()] == [COMMITTED]:
            (old / COMMITTED).unlink()  # a mark alone: a directory with anything else in it is a checkpoint
            old.rmdir()
    for step in steps:
        (marks / str(step)).mkdir(exist_ok=True)
        (marks / str(step) / COMMITTED).write_text(f"{there.directory / str(step)}\n", encoding="utf-8")


def trained(job: Job, workdir: Path, step: int | str | None) -> tuple[int, PyTree, PyTree]:
    """A run's student: the step of a checkpoint; its parameters; their average, where kept.

    Args:
        job: the run's.
        workdir: the run's.
        step: a number, also as text; "best" for the lowest held-out loss, None for the newest.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: when it cannot be read, or none was evaluated and the best is asked for.
    """
    there = Checkpoints(place_of_checkpoints(job.experiment, workdir), read_only=True)

    def read(step: int) -> tuple[PyTree, PyTree]:
        student = there.restore_student(step, job.state.params["student"])
        return student, there.restore_average(step, job.state.ema) if job.own else student

    if step is not None:
        number = numbered(there, workdir, str(step))
        return number, *read(number)
    if (found := there.newest(read)) is None:
        raise FileNotFoundError(f"{workdir} has no checkpoint yet: `jaxkd train` writes one")
    chosen, (student, average) = _said(found)
    return chosen, student, average


def numbered(there: Checkpoints, workdir: Path, step: str) -> int:
    """The step that `--step` names: a number, which need not be there, or "best" for the lowest held-out loss.

    Raises:
        ValueError: it is neither, or no step was evaluated.
    """
    if step == "best":
        best = there.best()
        if best is None:
            raise ValueError(
                f"{workdir} has no checkpoint of a step that was evaluated: run.eval_every and run.checkpoint_every "
                "say which steps are; give --step NUMBER"
            )
        return best
    if not step.isdigit():
        raise ValueError(f"--step {step} is no checkpoint: give a number of steps, or best")
    return int(step)


def _said(found: tuple[int, Any, dict[int, str]]) -> tuple[int, Any]:
    """What was read of the newest whole checkpoint, once it is said that later ones are not."""
    step, read, wrong = found
    for why in wrong.values():
        print(f"jaxkd: {why}; step {step} is used", file=sys.stderr)
    return step, read
