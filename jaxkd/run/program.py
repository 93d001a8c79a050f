"""The program of a job's step, as a run compiles it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.config import objective
from jaxkd.core import schedules
from jaxkd.core.types import Batch, Metrics, PyTree
from jaxkd.losses import divergences, group_dro
from jaxkd.models import flops
from jaxkd.run.job import Job, rule
from jaxkd.teachers.base import Teacher
from jaxkd.train import optim
from jaxkd.train.state import TrainState
from jaxkd.train.step import make_step


def jitted_step(job: Job, teacher: Teacher) -> Any:
    """`step(state, teacher.state, batch) -> (state, metrics)`, jitted: the state is donated and stays where it lies.

    Args:
        job: what to train.
        teacher: as the student learns from it.
    """
    e = job.experiment
    plain = make_step(
        job.student.forward,
        teacher,
        job.objective,
        job.tx,
        e.optim.micro_batches,
        e.teacher.decay,
        None if (weights := rule(job).group_dro) is None else group_dro.reweighting(weights, job.objective),
        e.optim.spike,
    )

    def step(state: TrainState, teacher_state: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        after, measured = plain(state, teacher_state, batch)
        # In the compiled program, so that reading it does not wait for the next step. Skipped steps do not advance the
        # optimiser's count, which the schedule is a function of.
        rate = schedules.value(job.lr, optim.update_count(state.opt_state))
        measured["lr"] = (jnp.asarray(rate, jnp.float32), jnp.ones(()))
        return after, measured

    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, job.state), None))


def flops_of(built: Job) -> flops.Step:
    """Of a job's step, counted from shapes: what is cached is not run, what no term needs is not multiplied."""
    e = built.experiment
    kept = [t for t in e.objective.values() if t.divergence and t.weight != 0]
    vocab = [objective.call(t.divergence, divergences, "objective") for t in kept]
    by_teacher = any(d.uses_teacher for d in vocab)
    sides = []
    if built.own and built.objective.uses_teacher:
        sides.append(flops.Side(built.teacher.config, head=by_teacher))
    for name, model in e.teacher.models.items():
        config = built.teachers[name].config
        if not model.cache and (built.objective.uses_teacher or e.teacher.signal == "token"):
            sides.append(flops.Side(config, head=by_teacher or e.teacher.signal == "token"))
        elif model.cache and (e.teacher.members or e.teacher.signal == "hidden"):
            sides.append(flops.Side(config, body=False, head=by_teacher))
    return flops.step(
        sides,
        flops.Side(built.student.config, head=bool(vocab)),
        e.data.batch * e.data.length,
        e.data.length,
        remat=e.run.remat != "none",
        trains=not e.student.frozen,
    )
