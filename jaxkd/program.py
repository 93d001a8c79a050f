"""The program of a job's step, as a run compiles it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkd import schedules
from jaxkd.job import Job, rule
from jaxkd.teachers.base import Teacher
from jaxkd.train import optim
from jaxkd.train.state import TrainState
from jaxkd.train.step import make_step
from jaxkd.types import Batch, Metrics, PyTree


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
        rule(job).group_dro,
        e.optim.spike,
    )

    def step(state: TrainState, teacher_state: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        after, measured = plain(state, teacher_state, batch)
        # In the program, so that reading it never waits for the step that is running. A step that was left out is none
        # to the optimiser, whose schedule stands still with it.
        rate = schedules.value(job.lr, optim.updates(state.opt_state))
        measured["lr"] = (jnp.asarray(rate, jnp.float32), jnp.ones(()))
        return after, measured

    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, job.state), None))
