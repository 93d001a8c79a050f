"""The one train step: teacher's signal, student, objective, update, as a pure function."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxkd.core.sharding import constrain
from jaxkd.core.types import Batch, Forward, Metrics, PyTree
from jaxkd.losses import group_dro as dro
from jaxkd.losses.group_dro import GroupDRO, Groups
from jaxkd.losses.objective import Objective
from jaxkd.teachers.base import Teacher
from jaxkd.train import guard
from jaxkd.train.state import TrainState, trained

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def split(batch: Batch, parts: int) -> Batch:
    """Micro-batches on a leading axis, strided over the rows, so that each of them spans every device."""

    def strided(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(strided, batch)


def _taps(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    # Not asked for where there are none, so that any `forward(params, batch)` will do.
    return {"taps": names} if names else {}


def make_gradient(forward: Forward, teacher: Teacher, objective: Objective, micro_batches: int = 1):
    """`gradient(params, teacher_state, batch, step, ema=None, groups=None) -> (gradients, metrics)`, means over tokens.

    Values, gradients and metrics are summed over micro-batches and divided once by the global token weight. The
    domains' weights `groups` are traced arrays: as they move, nothing is compiled again.

    Raises:
        ValueError: when a term needs features that the teacher's signal does not have.
    """
    if objective.teacher_taps and "taps" not in teacher.requires:
        raise ValueError(
            f"{objective.needs_of_teacher()}, but this teacher's signal has no features: give a live teacher, or leave "
            "the term out"
        )

    def value(moving, params, teacher_state, batch, step, ema, by_domain):
        params = params | moving
        signal = None
        if objective.uses_teacher or teacher.writes:
            known = _taps(objective.teacher_taps) | {"step": step, "own": params["student"] if ema is None else ema}
            given = {name: each for name, each in known.items() if name in teacher.requires}
            signal = teacher.signal(teacher_state, batch, **given)
        if isinstance(signal, Batch):  # the teacher's own text, in the place of the data's
            batch, signal = signal, None
        student = forward(params["student"], batch, **_taps(objective.student_taps))
        return objective.loss(params["objective"], student, signal, batch, step, by_domain)

    def gradient(
        params: PyTree,
        teacher_state: PyTree,
        batch: Batch,
        step: jax.Array,
        ema: PyTree = None,
        groups: Groups | None = None,
    ) -> tuple[PyTree, Metrics]:
        moving = trained(params, objective.trains)
        slope = partial(jax.grad(value, has_aux=True), moving, params)
        # Of the whole batch, before it is cut: a micro-batch alone would weigh its domains otherwise.
        by_domain = None if groups is None else dro.factors(groups, dro.tokens(batch, len(groups.sampling)))
        if micro_batches == 1:
            grads, metrics = slope(teacher_state, batch, step, ema, by_domain)
        else:
            parts = split(batch, micro_batches)
            first = jax.eval_shape(slope, teacher_state, jax.tree.map(lambda x: x[0], parts), step, ema, by_domain)

            def accumulate(carry, part):
                return jax.tree.map(jnp.add, carry, slope(teacher_state, part, step, ema, by_domain)), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
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
    group_dro: GroupDRO | None = None,
    spike: float = 0.0,
) -> Step:
    """`step(state, teacher.state, batch) -> (state, metrics)`, to be jitted with the state donated.

    A step whose loss or gradient is not finite leaves everything as it was but `state.step`, which the next batch
    follows from; the metric `skipped` is then 1.

    Args:
        forward: the student's.
        teacher: its state is the step's second argument.
        objective: what to minimise.
        tx: the optimiser.
        micro_batches: parts into which the batch is cut to save memory; it divides the batch's rows.
        decay: d of ema <- d ema + (1 - d) params, where the state keeps an average of the student.
        group_dro: how the domains' weights move, where the state keeps them; the objective then reports `excess`. A
            step's gradient has the weights of the step before, since its own losses are made together with it.
        spike: standard deviations above the mean of `state.recent`, where the state keeps it, from which on a loss or
            gradient norm is left out too.

    Raises:
        ValueError: when a term needs features that the teacher's signal does not have.
    """
    gradient = make_gradient(forward, teacher, objective, micro_batches)

    def step(state: TrainState, teacher_state: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = gradient(state.params, teacher_state, batch, state.step, state.ema, state.groups)
        (total, tokens), norm, one = metrics["loss"], optax.tree.norm(grads), jnp.ones(())
        loss = total / jnp.where(tokens > 0, tokens, 1.0)
        # Both are sums over all devices, so that all of them decide alike.
        taken, recent = jnp.isfinite(loss) & jnp.isfinite(norm), state.recent
        if recent is not None:
            taken &= guard.usual(recent, loss, norm, spike)
            recent = guard.remember(recent, loss, norm)
        moving = trained(state.params, objective.trains)
        updates, opt_state = tx.update(grads, state.opt_state, moving)
        moved = (optax.apply_updates(moving, updates), opt_state)
        moved, opt_state = guard.choose(taken, moved, (moving, state.opt_state))
        params = state.params | moved
        metrics["grad_norm"] = (norm, one)
        metrics["param_norm"] = (optax.tree.norm(params), one)
        metrics["tokens"] = (tokens, one)
        metrics["skipped"] = (1.0 - taken, one)
        ema = state.ema
        if ema is not None and decay != 1:
            averaged = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params["student"])
            ema = guard.choose(taken, averaged, ema)
        groups = state.groups
        if groups is not None and group_dro is not None:
            groups, weights = _moved(groups, metrics, objective.domains, state.step, group_dro)
            groups = guard.choose(taken, groups, state.groups)
            metrics |= weights
        return TrainState(state.step + 1, params, opt_state, ema, groups, recent), metrics

    return step


def _moved(
    groups: Groups, metrics: Metrics, names: tuple[str, ...], step: jax.Array, how: GroupDRO
) -> tuple[Groups, Metrics]:
    """The domains' weights after a step, and as metrics those that it was made with."""
    excess, found = (jnp.stack([metrics[f"excess/{name}"][i] for name in names]) for i in (0, 1))
    used = {f"weight/{name}": (jnp.exp(groups.log_weights[i]), jnp.ones(())) for i, name in enumerate(names)}
    return dro.update(groups, excess, found, step, how), used
