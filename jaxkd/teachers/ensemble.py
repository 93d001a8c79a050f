"""Several teachers as one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.core import schedules
from jaxkd.core.types import Batch, Ensemble, Output, PyTree, Scalar
from jaxkd.teachers.base import HostRows, Teacher

Weigh = Callable[[Batch, Any], jax.Array]
"""`weigh(batch, step) -> [B T]`, at least 0; the teachers' shares of each row, up to a factor."""


def ensemble(teachers: Sequence[Teacher], weigh: Weigh, *, geometric: bool = False) -> Teacher:
    """The average of several teachers' distributions, weighted row by row.

        p = sum_t w_t p_t     or, geometric,     log p = sum_t w_t log p_t + constant

    The loss kernel mixes them chunk by chunk; no mixture of logits is ever built. A teacher that weighs nothing in a
    whole micro-batch is not run.

    Args:
        teachers: whose signals are heads: live ones, or cached hidden states.
        weigh: of every row; normalised here.
        geometric: average log-probabilities, which asks for agreement, rather than probabilities.

    Raises:
        ValueError: for no teachers; when a signal is traced that is not a head.
    """
    if not teachers:
        raise ValueError("a blend needs at least one teacher")

    def host_features(rows: HostRows) -> HostRows:
        found = [teacher.host_features(rows) for teacher in teachers]
        kept = tuple(each.get("teacher") for each in found)
        return rows if all(each is None for each in kept) else {**rows, "teacher": kept}

    def signal(state: Sequence[PyTree], batch: Batch, *, step: Any, **options: Any) -> Ensemble:
        shares = weigh(batch, step)
        shares = shares / jnp.maximum(shares.sum(-1, keepdims=True), 1e-30)
        kept = batch.teacher or (None,) * len(teachers)
        heads = []
        for t, teacher in enumerate(teachers):
            mine = {name: value for name, value in {"step": step, **options}.items() if name in teacher.requires}
            heads.append(_head(teacher, state[t], batch._replace(teacher=kept[t]), shares[:, t], mine))
        weights = jnp.broadcast_to(shares[:, None], (*batch.tokens.shape, len(teachers)))
        return Ensemble(tuple(heads), jax.lax.stop_gradient(weights), geometric)

    asks = tuple(dict.fromkeys(["step", *(a for t in teachers for a in t.requires if a != "taps")]))
    return Teacher(tuple(t.state for t in teachers), host_features, signal, asks)


def _head(teacher: Teacher, state: PyTree, batch: Batch, share: jax.Array, options: dict[str, Any]) -> Any:
    output = teacher.signal(state, batch, **options)
    if not isinstance(output, Output):
        raise ValueError(
            f"a blend is of heads, and one of its teachers gives {type(output).__name__}: use live teachers, or cached "
            "hidden states"
        )
    head = output.head
    # The forward pass above is left only its unembedding: what is not used, the compiler drops.
    hidden = jax.lax.cond(
        jnp.any(share > 0),
        lambda: teacher.signal(state, batch, **options).head.hidden,
        lambda: jnp.zeros(head.hidden.shape, head.hidden.dtype),
    )
    return head._replace(hidden=hidden)


def route(teachers: Sequence[Teacher], by: Callable[[Batch], jax.Array]) -> Teacher:
    """Each row has one teacher.

    Args:
        teachers: as for `blend`.
        by: `by(batch) -> [B] int`, the number of each row's teacher, such as `lambda batch: table[batch.domain]`.

    Raises:
        ValueError: as `blend`.
    """
    return ensemble(teachers, lambda batch, step: jax.nn.one_hot(by(batch), len(teachers)))


def shares(weights: Sequence[Scalar], factors: Sequence[Mapping[str, float]], domains: Sequence[str]) -> Weigh:
    """Weights by the step and by the row's domain: w_t(step) f_t(domain).

    Args:
        weights: a number or a schedule per teacher.
        factors: per teacher its factor in each domain, 0 where a domain is not named; empty for 1 in all.
        domains: names, in the batch's numbering.

    Raises:
        ValueError: for a domain that is not there, or one that no teacher serves.
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
        now = jnp.stack([jnp.asarray(schedules.value(w, step), jnp.float32) for w in weights])
        return by_domain[batch.domain] * now

    return weigh
