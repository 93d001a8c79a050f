"""Scoring a student against a teacher outside of a run's loop: `jaxkd evaluate`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxkd.config.schema import Experiment, experiment, plain
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import PyTree
from jaxkd.data import build
from jaxkd.data.sources import open_source
from jaxkd.evals import compare, subject, tasks
from jaxkd.report import records
from jaxkd.report.records import TaskScore
from jaxkd.report.text import aligned, number
from jaxkd.run import generate, job, load, restore, saved_student, teacher
from jaxkd.run.open_models import Models, open_models
from jaxkd.runtime import files, multihost
from jaxkd.teachers.online import self_teacher


def values_of_models(student_path: str, teacher_path: str) -> dict[str, Any]:
    """A recipe's values for two models by path, without data."""
    return {
        "teacher": {"path": teacher_path},
        "student": {"path": student_path},
        "objective": {"kd": {"divergence": "forward_kl", "weight": 1.0}},
        "data": {"domains": {}, "batch": 1, "length": 512},
        "optim": {"lr": {"schedule": "constant", "peak": 0.0}},
        "run": {"steps": 1},
    }


def values_of_run(e: Experiment, sources: Sequence[str]) -> dict[str, Any]:
    """A run's values; with other text than its own, those by which the teacher is run and not read from a cache."""
    values = plain(e)
    if sources:
        values["data"] |= {"mixture": "uniform", "valid_rows": 0}
        values["teacher"] |= {"signal": "head", "cache": "", "stored": ""}
        for member in values["teacher"]["members"].values():
            member |= {"cache": "", "domains": {}}
    return values


def of_models(values: dict[str, Any], sources: Sequence[str]) -> str:
    """A table of one model against another, which a recipe's values name, on text that is read whole.

    `sources` are SOURCE or NAME=SOURCE, as in `data.domains`.
    """
    e = job.fit_devices(experiment(_with_domains(values, sources)))
    mesh = job.build_mesh(e.run.mesh, jax.devices())
    with jax.set_mesh(mesh), multihost.abort_on_error():
        models = open_models(e, mesh, {})
        rows = _whole(e, models)
        weights = load.weights(models, e.student, rows)
        scored = (weights.student, weights.student, 0)
        result = _score(e, models, mesh, rows, weights.teachers, scored, {})
    return f"{e.student.path} against {e.teacher.path}\n{compare.table(result, {})}"


def of_run(values: dict[str, Any], workdir: Path, step: str | None, sources: Sequence[str], log: bool) -> str:
    """A table of a run's checkpoint on its held-out rows or, given `sources` as for `of_models`, on their whole text.

    `step` is a number, "best", or None for the newest. `log` appends to evals.jsonl, where it has none of this step.
    """
    e = job.fit_devices(experiment(_with_domains(values, sources)))
    mesh = job.build_mesh(e.run.mesh, jax.devices())
    with jax.set_mesh(mesh), multihost.abort_on_error():
        models, missing = saved_student.open_run(e, workdir, mesh)
        number, student, average = restore.student(e.run, workdir, models, load.frozen(e, models), step)
        before = multihost.broadcast("evaluations", lambda: records.rows(workdir, records.EVALS))
        start = {row["domain"]: row["student_nats"] for row in before if row["step"] == 0 and not sources}
        rows = _whole(e, models) if sources else load.domains(e.data, models.tokenizer)
        scored = (student, average, number)
        teachers = load.teachers(models)[0]
        result = _score(e, models, mesh, rows, teachers, scored, {} if models.is_self else start)
    title = f"step {number} of {workdir}"
    if missing:
        shown = lambda name: name in ("step", "domain", "tokens") or name.startswith("student_")
        result = [{name: value for name, value in row.items() if shown(name)} for row in result]
        title = f"{title}, the student alone: {missing}"
    elif log and multihost.is_main() and not any(row["step"] == number for row in before):
        files.append_jsonl(workdir / records.EVALS, result)
    return f"{title}\n{compare.table(result, start)}"


def of_tasks(
    paths: Sequence[str], workdir: Path | None, step: str | None, model: str | None, output: Path | None
) -> list[TaskScore]:
    """Figures of a run's checkpoint or of a model on the tasks of files, each with its interval.

    In `output`, by default the workdir, rows are appended to tasks.jsonl and what the model wrote is put into
    tasks/NAME-STEP.jsonl; a task whose rows of the same weights are there is not run again. Raises ValueError, before a
    model is opened, for a bad file; ModuleNotFoundError for a missing library.
    """
    listed: dict[str, tasks.Task] = {}
    for path in paths:
        for task in tasks.read(Path(path)):
            if task.name in listed:
                raise ValueError(f"--tasks: {path} and {listed[task.name].source} both have a task '{task.name}'")
            listed[task.name] = task
    tasks.check(list(listed.values()))
    at: int | None
    if workdir is not None:
        at, [student] = generate.subjects_of_run(workdir, step)
    else:
        at, student = None, subject.of_model(str(model))
    folder = output or workdir
    before = [] if folder is None else records.rows(folder, records.TASKS)
    scores: list[TaskScore] = []
    for task in listed.values():
        identity = tasks.fingerprint(task, student)
        done = [TaskScore(**row) for row in before if row["fingerprint"] == identity]
        if not done:
            result = tasks.run(task, student, at, subject.of_model)
            done = result.scores
            if folder is not None:
                (folder / "tasks").mkdir(parents=True, exist_ok=True)
                name = task.name if at is None else f"{task.name}-{at}"
                files.write_jsonl(folder / "tasks" / f"{name}.jsonl", result.examples)
                files.append_jsonl(folder / records.TASKS, [score._asdict() for score in done])
        scores += done
    return scores


def task_table(scores: Sequence[TaskScore]) -> str:
    """Figures as aligned text."""
    lines = [["task", "figure", "value", "95% interval", "examples"]]
    for score in scores:
        between = f"{number(score.low)} to {number(score.high)}"
        lines.append([score.task, score.metric, number(score.value), between, f"{score.examples:,}"])
    return aligned(lines)


def _with_domains(values: dict[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """The sources as domains, each named by itself where it has no NAME=."""
    domains: dict[str, str] = {}
    for source in sources:
        if named := re.fullmatch(r"([\w.-]+)=(.+)", source):
            name, spec = named.groups()
        else:
            spec = source
            name = re.sub(r"[^\w.-]+", "_", Path(spec.partition("::")[0]).stem).strip("_.-") or "data"
        if name in domains:
            raise ValueError(f"--data {source}: the name '{name}' is taken: write NAME={spec}")
        domains[name] = spec
    return {**values, "data": {**values["data"], "domains": domains}} if sources else values


def _whole(e: Experiment, models: Models) -> load.Domains:
    """All text of every domain as rows in memory, up to `data.valid_rows`."""
    data = e.data
    rows = [
        build.read_whole(
            name,
            open_source(domain.source, domain.field or data.text_key),
            models.tokenizer,
            data.length,
            limit=data.valid_rows,
            bad_records=data.bad_records,
        )
        for name, domain in data.sources.items()
    ]
    multihost.assert_equal("the rows of the text", {n: str(len(r)) for n, r in zip(data.sources, rows, strict=True)})
    return load.Domains(tuple(data.sources), (), (), tuple(rows))


def _score(
    e: Experiment,
    models: Models,
    mesh: Mesh,
    rows: load.Domains,
    teacher_params: dict[str, PyTree],
    scored: tuple[PyTree, PyTree, int],
    start: dict[str, float],
) -> list[compare.Row]:
    """`scored`: the student's parameters, what a teacher that is the student itself reads, and the step."""
    student, average, step = scored
    if models.teachers:
        stores = teacher.open_stores(e, models, rows.fingerprints)
        teachers = teacher.build_teacher(e, models, teacher_params, stores)
    else:  # beside itself; `of_run` leaves out what is then without meaning
        alone = self_teacher(models.student.forward)
        teachers = teacher.Teachers(alone, alone)
    comparison, inputs = teachers.comparison(models), (teachers.evaluate.state, step, average)
    batches = load.held_out(rows, e.run.eval_batch, batch_sharding(mesh), teachers.evaluate.host_features)
    return compare.evaluate(lambda batch: comparison(student, inputs, batch), batches, step, start)
