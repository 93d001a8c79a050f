"""The one train step: teacher's signal, student, objective, update, as a pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxkd.objectives import Objective
from jaxkd.sharding import constrain
from jaxkd.teachers.base import Teacher
from jaxkd.train.state import TrainState
from jaxkd.types import Batch, Forward, Metrics, PyTree

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def split(batch: Batch, parts: int) -> Batch:
    """Micro-batches on a leading axis, strided over the rows, so that each of them spans every device."""

    def strided(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(strided, batch)


def make_gradient(forward: Forward, teacher: Teacher, objective: Objective, micro_batches: int = 1):
    """`gradient(params, teacher_state, batch, step) -> (gradients, metrics)`, the mean over the batch's tokens.

    Values, gradients and metrics are summed over micro-batches and divided once by the global token weight.
    """

    def value(params, teacher_state, batch, step):
        signal = teacher.signal(teacher_state, batch) if objective.uses_teacher else None
        return objective.loss(params["objective"], forward(params["student"], batch), signal, batch, step)

    def gradient(params: PyTree, teacher_state: PyTree, batch: Batch, step: jax.Array) -> tuple[PyTree, Metrics]:
        slope = jax.grad(value, has_aux=True)
        if micro_batches == 1:
            grads, metrics = slope(params, teacher_state, batch, step)
        else:
            parts = split(batch, micro_batches)
            first = jax.eval_shape(slope, params, teacher_state, jax.tree.map(lambda x: x[0], parts), step)

            def accumulate(carry, part):
                return jax.tree.map(jnp.add, carry, slope(params, teacher_state, part, step)), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
            (grads, metrics), _ = jax.lax.scan(accumulate, zeros, parts)
        tokens = batch.weights.sum()
        return jax.tree.map(lambda g: g / jnp.where(tokens > 0, tokens, 1.0), grads), metrics

    return gradient


def make_step(
    forward: Forward,
    teacher: Teacher,
    objective: Objective,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
) -> Step:
    """`step(state, teacher.state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Args:
        forward: the student's.
        teacher: its state is the step's second argument.
        objective: what to minimise.
        tx: the optimiser.
        micro_batches: parts into which the batch is cut to save memory; it divides the batch's rows.
    """
    gradient = make_gradient(forward, teacher, objective, micro_batches)

    def step(state: TrainState, teacher_state: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = gradient(state.params, teacher_state, batch, state.step)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        one = jnp.ones(())
        metrics["grad_norm"] = (optax.tree.norm(grads), one)
        metrics["param_norm"] = (optax.tree.norm(params), one)
        metrics["tokens"] = (batch.weights.sum(), one)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step
