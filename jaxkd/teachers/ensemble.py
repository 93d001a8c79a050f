"""Several teachers as one: weighted averages and routing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.core import schedules
from jaxkd.core.types import Batch, Ensemble, Output, PyTree, Scalar
from jaxkd.teachers.base import HostRows, Teacher

Weigh = Callable[[Batch, Any], jax.Array]
"""`weigh(batch, step) -> [B T]`: the teachers' weights in each row, at least 0, not normalised."""


def ensemble(teachers: Sequence[Teacher], weigh: Weigh, *, geometric: bool = False) -> Teacher:
    """The average of several teachers' distributions, weighted per row.

        p = sum_t w_t p_t     or, geometric,     log p = sum_t w_t log p_t + constant

    The loss kernel mixes the heads chunk by chunk. A teacher whose weight is 0 in a whole micro-batch is not run.
    Teachers' signals must be heads: online ones, or cached hidden states. Weights of `weigh` are normalised here.

    Raises ValueError: there are no teachers, or (when traced) a signal is not a head.
    """
    if not teachers:
        raise ValueError("an ensemble needs at least one teacher")

    def host_features(rows: HostRows) -> HostRows:
        stored = tuple(teacher.host_features(rows).get("teacher") for teacher in teachers)
        return rows if all(payload is None for payload in stored) else {**rows, "teacher": stored}

    def signal(state: Sequence[PyTree], batch: Batch, *, step: Any, **options: Any) -> Ensemble:
        shares = weigh(batch, step)
        shares = shares / jnp.maximum(shares.sum(-1, keepdims=True), 1e-30)
        stored = batch.teacher or (None,) * len(teachers)
        heads = []
        for t, teacher in enumerate(teachers):
            required = {name: value for name, value in {"step": step, **options}.items() if name in teacher.requires}
            heads.append(_head(teacher, state[t], batch._replace(teacher=stored[t]), shares[:, t], required))
        weights = jnp.broadcast_to(shares[:, None], (*batch.tokens.shape, len(teachers)))
        return Ensemble(tuple(heads), jax.lax.stop_gradient(weights), geometric)

    requires = tuple(dict.fromkeys(["step", *(name for t in teachers for name in t.requires if name != "taps")]))
    return Teacher(tuple(t.state for t in teachers), host_features, signal, requires)


def _head(teacher: Teacher, state: PyTree, batch: Batch, share: jax.Array, options: dict[str, Any]) -> Any:
    output = teacher.signal(state, batch, **options)
    if not isinstance(output, Output):
        raise ValueError(
            f"an ensemble averages heads, and one of its teachers gives {type(output).__name__}: use online teachers, "
            "or cached hidden states"
        )
    head = output.head
    # Only the unembedding of the forward pass above is used; the compiler removes the rest.
    hidden = jax.lax.cond(
        jnp.any(share > 0),
        lambda: teacher.signal(state, batch, **options).head.hidden,
        lambda: jnp.zeros(head.hidden.shape, head.hidden.dtype),
    )
    return head._replace(hidden=hidden)


def route(teachers: Sequence[Teacher], by: Callable[[Batch], jax.Array]) -> Teacher:
    """An `ensemble` in which row b has the teacher `by(batch)[b]`, such as `lambda batch: table[batch.domain]`."""
    return ensemble(teachers, lambda batch, step: jax.nn.one_hot(by(batch), len(teachers)))


def shares(weights: Sequence[Scalar], factors: Sequence[Mapping[str, float]], domains: Sequence[str]) -> Weigh:
    """Weights w_t(step) f_t(domain of the row).

    Args:
        weights: a number or a schedule per teacher.
        factors: f_t of each teacher by domain, 0 for a domain that is not named; an empty one is 1 everywhere.
        domains: names, in the batch's numbering.

    Raises ValueError: an unknown domain, or one that no teacher serves.
    """
    table = []
    for factor in factors:
        if unknown := [name for name in factor if name not in domains]:
            raise ValueError(f"a teacher's domains name '{unknown[0]}', and the data has {', '.join(domains)}")
        table.append([float(factor.get(name, 0.0)) if factor else 1.0 for name in domains])
    idle = [t for t, w in enumerate(weights) if not callable(w) and w == 0]
    for d, name in enumerate(domains):
        if not any(row[d] > 0 for t, row in enumerate(table) if t not in idle):
            raise ValueError(f"no teacher serves the domain '{name}'")
    by_domain = jnp.asarray(table, jnp.float32).T  # [domains T]

    def weigh(batch: Batch, step: Any) -> jax.Array:
        current = jnp.stack([jnp.asarray(schedules.value(w, step), jnp.float32) for w in weights])
        return by_domain[batch.domain] * current

    return weigh
