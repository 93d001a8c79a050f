"""The program of a run's step, as the loop and the planner compile it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.config import resolve
from jaxkd.config.schema import Experiment
from jaxkd.core import schedules
from jaxkd.core.types import Batch, Metrics, PyTree
from jaxkd.losses import divergences, group_dro
from jaxkd.models import flops
from jaxkd.run.job import Job
from jaxkd.run.open_models import Models
from jaxkd.teachers.base import Teacher
from jaxkd.train import optim
from jaxkd.train.state import TrainState
from jaxkd.train.step import make_step


def jitted_step(job: Job, teacher: Teacher) -> Any:
    """`step(state, frozen, teacher.state, batch) -> (state, metrics)`, jitted; the state is donated."""
    e = job.experiment
    plain = make_step(
        job.models.student.forward,
        teacher,
        job.objective,
        job.tx,
        e.optim.micro_batches,
        e.teacher.decay,
        None if (weights := job.rule.group_dro) is None else group_dro.reweighting(weights, job.objective),
        e.optim.spike,
    )

    def step(state: TrainState, frozen: PyTree, teacher_state: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        after, measured = plain(state, frozen, teacher_state, batch)
        # Inside the program, so that reading it never waits for the step in flight. Skipped steps do not advance the
        # optimizer's count, nor the schedule.
        rate = schedules.value(job.lr, optim.update_count(state.opt_state))
        measured["lr"] = (jnp.asarray(rate, jnp.float32), jnp.ones(()))
        return after, measured

    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, job.state), None))


def flops_of(e: Experiment, models: Models, uses_teacher: bool) -> flops.Step:
    """FLOPs of a step, counted from shapes: a cached body does not run, and heads only where a term needs them."""
    active = [t for t in e.objective.values() if t.divergence and t.weight != 0]
    terms = [resolve.call(t.divergence, divergences, "objective") for t in active]
    teacher_head = any(d.uses_teacher for d in terms)
    sides = []
    if models.is_self and uses_teacher:
        sides.append(flops.Side(models.teacher.config, head=teacher_head))
    for name, block in e.teacher.models.items():
        config = models.teachers[name].config
        if not block.cache and (uses_teacher or e.teacher.signal == "token"):
            sides.append(flops.Side(config, head=teacher_head or e.teacher.signal == "token"))
        elif block.cache and (e.teacher.members or e.teacher.signal == "hidden"):
            sides.append(flops.Side(config, body=False, head=teacher_head))
    return flops.step(
        sides,
        flops.Side(models.student.config, head=bool(terms)),
        e.data.batch * e.data.length,
        e.data.length,
        remat=e.run.remat != "none",
        trains=not e.student.frozen,
    )
