"""Scoring a student against a teacher outside of a run's loop: `jaxkd evaluate`."""

from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxkd.config.schema import Experiment
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import PyTree
from jaxkd.evals import compare
from jaxkd.run import job, load, restore, teacher
from jaxkd.run.open_models import Models
from jaxkd.runtime import files, multihost


class Evaluated(NamedTuple):
    """Rows as in evals.jsonl, the mean last, and what they are of."""

    title: str
    rows: list[compare.Row]
    start: dict[str, float]  # the student's nats per token at step 0 by domain, where they are known

    @property
    def text(self) -> str:
        """The title and a table."""
        return f"{self.title}\n{compare.table(self.rows, self.start)}"


def of_run(e: Experiment, workdir: Path, step: str | None) -> Evaluated:
    """A checkpoint on the run's held-out rows; a step without an evaluation in evals.jsonl gets one.

    Args:
        e: the run's experiment.
        workdir: of the run.
        step: of the checkpoint, "best", or None for the newest.

    Raises:
        ValueError, FileNotFoundError: no such checkpoint, or what the run was made from is missing or different.
    """
    built = job.build(job.fit_devices(e))
    e, models = built.experiment, built.models
    with jax.set_mesh(built.mesh), multihost.abort_on_error():
        number, student, average = restore.student(e.run, workdir, built.state, load.frozen(e, models), step)
        before = multihost.broadcast("evaluations", lambda: files.read_jsonl(workdir / "evals.jsonl"))
        start = {row["domain"]: row["student_nats"] for row in before if row["step"] == 0}
        rows = load.domains(e.data, models.tokenizer)
        scored = (student, average, number)
        result = _score(e, models, built.mesh, rows, scored, {} if models.is_self else start)
    if multihost.is_main() and not any(row["step"] == number for row in before):
        files.append_jsonl(workdir / "evals.jsonl", result)
    return Evaluated(f"step {number} of {workdir}", result, start)


def _score(
    e: Experiment,
    models: Models,
    mesh: Mesh,
    rows: load.Domains,
    scored: tuple[PyTree, PyTree, int],
    start: dict[str, float],
) -> list[compare.Row]:
    """`scored`: the student's parameters, what a teacher that is the student itself reads, and the step."""
    student, average, step = scored
    stores = teacher.open_stores(e, models, rows.fingerprints)
    teachers = teacher.build_teacher(e, models, load.teachers(models)[0], stores)
    comparison = jax.jit(compare.make_comparison(models.student.forward, teachers.evaluation_signal, models.vocab))
    inputs = (teachers.evaluate.state, step, average)
    batches = load.held_out(rows, e.run.eval_batch, batch_sharding(mesh), teachers.evaluate.host_features)
    return compare.evaluate(lambda batch: comparison(student, inputs, batch), batches, step, start)
