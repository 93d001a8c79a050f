"""The train step, a pure function: teacher's signal, student's forward pass, objective, update."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxkd.core.sharding import constrain
from jaxkd.core.types import Batch, Forward, Metrics, PyTree
from jaxkd.losses.objective import Objective, Reweighting
from jaxkd.teachers.base import Teacher
from jaxkd.train import guard
from jaxkd.train.state import TrainState, assemble

_NONE: Mapping[str, jax.Array] = MappingProxyType({})
Step = Callable[[TrainState, PyTree, Any, Batch], tuple[TrainState, Metrics]]
Assemble = Callable[[PyTree, PyTree], PyTree]


def split(batch: PyTree, parts: int) -> PyTree:
    """Micro-batches of [B ...] arrays on a new leading axis, strided over the rows so that each spans every device."""

    def strided(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(strided, batch)


def _taps(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    # No keyword without taps, so that `forward(params, batch)` is enough then.
    return {"taps": names} if names else {}


def make_gradient(
    forward: Forward, teacher: Teacher, objective: Objective, micro_batches: int = 1, assemble: Assemble = assemble
):
    """`gradient(params, teacher_state, batch, step, frozen={}, ema=None, factors={}) -> (gradients, metrics)`.

    Values, gradients and metrics are summed over micro-batches and divided once, by the global token weight.

    Raises ValueError: a term needs features that the teacher's signal does not have.
    """
    if objective.teacher_taps and "taps" not in teacher.requires:
        taps = {name: ", ".join(term.teacher_taps) for name, term in objective.fields.items() if term.teacher_taps}
        needs = "; ".join(f"objective.{name} needs the teacher's {names}" for name, names in taps.items())
        raise ValueError(
            f"{needs}, but this teacher's signal has no features: take an online teacher, or leave the term out"
        )

    def value(params, frozen, teacher_state, batch, factors, step, ema):
        own = params["student"] if ema is None else ema
        signal = None
        if objective.uses_teacher:
            options = _taps(objective.teacher_taps) | {"step": step, "own": assemble(own, frozen)}
            options = {name: option for name, option in options.items() if name in teacher.requires}
            signal = teacher.signal(teacher_state, batch, **options)
        student = forward(assemble(params["student"], frozen), batch, **_taps(objective.student_taps))
        return objective.loss(params["objective"], student, signal, batch, step, factors)

    def gradient(
        params: PyTree,
        teacher_state: PyTree,
        batch: Batch,
        step: jax.Array,
        frozen: PyTree = _NONE,
        ema: PyTree = None,
        factors: Mapping[str, jax.Array] = _NONE,
    ) -> tuple[PyTree, Metrics]:
        gradient_fn = partial(jax.grad(value, has_aux=True), params, frozen)
        inputs = (batch, dict(factors))
        if micro_batches == 1:
            grads, metrics = gradient_fn(teacher_state, *inputs, step, ema)
        else:
            parts = split(inputs, micro_batches)
            part = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(gradient_fn, teacher_state, *part, step, ema)

            def accumulate(carry, part):
                return jax.tree.map(jnp.add, carry, gradient_fn(teacher_state, *part, step, ema)), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(accumulate, zeros, parts)
        tokens = metrics["loss"][1]
        return jax.tree.map(lambda g: g / jnp.where(tokens > 0, tokens, 1.0), grads), metrics

    return gradient


def make_step(
    forward: Forward,
    teacher: Teacher,
    objective: Objective,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
    decay: float = 1.0,
    reweighting: Reweighting | None = None,
    spike: float = 0.0,
    assemble: Assemble = assemble,
) -> Step:
    """`step(state, frozen, teacher.state, batch) -> (state, metrics)`, to be jitted with the state donated.

    `frozen` has the student's arrays that are not trained, {} for none. A step whose loss or gradient is not finite
    changes only `state.step`; its metric `skipped` is then 1.

    Args:
        forward: the student's.
        teacher: its state is the step's third argument.
        objective: the loss.
        tx: the optimiser.
        micro_batches: parts that the batch is split into to save memory; divides its number of rows.
        decay: d of ema <- d ema + (1 - d) params, if the state has an average.
        reweighting: factors of the terms, with state `state.group_dro`.
        spike: a step is skipped if its loss or gradient norm is this many standard deviations above the mean of
            `state.recent`, if the state has it.
        assemble: `assemble(state.params["student"], frozen)`, the parameters of `forward`.

    Raises ValueError: a term needs features that the teacher's signal does not have.
    """
    gradient = make_gradient(forward, teacher, objective, micro_batches, assemble)

    def step(state: TrainState, frozen: PyTree, teacher_state: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        factors = _NONE if reweighting is None else reweighting.factors(state.group_dro, batch)
        grads, metrics = gradient(state.params, teacher_state, batch, state.step, frozen, state.ema, factors)
        (total, tokens), norm, one = metrics["loss"], optax.tree.norm(grads), jnp.ones(())
        loss = total / jnp.where(tokens > 0, tokens, 1.0)
        # Both are global sums, so all devices agree.
        applied, recent = jnp.isfinite(loss) & jnp.isfinite(norm), state.recent
        if recent is not None:
            applied &= guard.is_usual(recent, loss, norm, spike)
            recent = guard.append(recent, loss, norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        after = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = guard.select(applied, after, (state.params, state.opt_state))
        metrics["grad_norm"] = (norm, one)
        metrics["param_norm"] = (optax.tree.norm(params), one)
        metrics["tokens"] = (tokens, one)
        metrics["skipped"] = (1.0 - applied, one)
        ema = state.ema
        if ema is not None and decay != 1:
            averaged = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params["student"])
            ema = guard.select(applied, averaged, ema)
        group_dro = state.group_dro
        if reweighting is not None:
            updated, measured = reweighting.update(group_dro, metrics, state.step)
            group_dro = guard.select(applied, updated, group_dro)
            metrics |= measured
        return TrainState(state.step + 1, params, opt_state, ema, group_dro, recent, state.texts), metrics

    return step
