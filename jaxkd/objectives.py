"""Terms of an objective, and the one fold that turns them into a value and its metrics.

A vocabulary term only *describes* what it wants; `total` makes all per-token weights first and calls the
fused kernel once. The value is a sum: the step divides it, with the gradients, once by the global token
weight.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkd import divergences, schedules
from jaxkd.divergences import Divergence
from jaxkd.kernels.api import linear_divergence
from jaxkd.metrics import per_domain
from jaxkd.types import Batch, Head, Metrics, Output, PyTree, Scalar, Signal

__all__ = ["match", "next_token"]


class Vocab(NamedTuple):
    """A term over the vocabulary: a divergence at a temperature, scaled by T^2."""

    divergence: Divergence
    temperature: Scalar = 1.0


class Objective(NamedTuple):
    """What a step minimises.

    `init(key) -> params["objective"]`; `loss(params, student, signal, batch, step) -> (value, metrics)` with
    `value` the weighted sum over the batch's tokens.
    """

    init: Callable[[jax.Array], PyTree]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    uses_teacher: bool


def match(divergence: Divergence, temperature: Scalar = 1.0) -> Vocab:
    """T^2 D(p^(T), q^(T)) with the teacher's distribution; T^2 keeps the gradient's scale (arXiv 1503.02531)."""
    return Vocab(divergence, temperature)


def next_token() -> Vocab:
    """Cross-entropy with the data's next token."""
    return Vocab(divergences.next_token())


def total(
    terms: Mapping[str, tuple[Scalar, Vocab]],
    *,
    vocab: int,
    domains: tuple[str, ...],
    chunk: int | None = None,
) -> Objective:
    """The weighted sum of named terms, every one of them in one kernel call.

        value = sum_terms weight(step) T^2 sum_tokens batch.weights D

    Each term reports its own un-weighted mean, over all tokens and per domain; `loss` is the weighted sum.
    A constant weight of zero removes a term, and with the last term that uses it the teacher's forward pass.

    Args:
        terms: name -> (weight, term); a weight is a number or a schedule of the step.
        vocab: true vocabulary size.
        domains: names of the batch's domains.
        chunk: tokens at a time in the kernel; None sizes it.

    Raises:
        ValueError: when no term is left.
    """
    kept = {name: term for name, term in terms.items() if callable(term[0]) or term[0] != 0}
    if not kept:
        raise ValueError(
            "the objective has no term: give at least one of " + (", ".join(terms) or "none") + " a weight"
        )
    divergence = tuple(term.divergence for _, term in kept.values())

    def loss(
        params: PyTree, student: Output, signal: Signal | None, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del params
        weight = [schedules.value(w, step) for w, _ in kept.values()]
        temperature = tuple(schedules.value(term.temperature, step) for _, term in kept.values())
        # T^2 is applied here and nowhere else.
        scale = jnp.stack([jnp.asarray(w * t**2, jnp.float32) for w, t in zip(weight, temperature, strict=True)])
        value, fields = linear_divergence(
            divergence,
            _clean(student.head, batch),
            None if signal is None else _clean(signal.head, batch),
            batch.targets,
            scale[:, None, None] * batch.weights,
            temperature,
            vocab=vocab,
            chunk=chunk,
        )
        tokens = batch.weights.sum(-1)
        metrics: Metrics = {"loss": (jax.lax.stop_gradient(value), tokens.sum())}
        for name, field in zip(kept, fields, strict=True):
            field = jnp.where(batch.weights != 0, field, 0.0)
            metrics |= per_domain(name, (field * batch.weights).sum(-1), tokens, batch.domain, domains)
        return value, metrics

    return Objective(lambda key: {}, loss, any(d.uses_teacher for d in divergence))


def _clean(head: Head, batch: Batch) -> Head:
    # Padding may hold anything; zero it, so that not even a NaN there can reach a gradient or a metric.
    return head._replace(hidden=jnp.where(batch.weights[..., None] != 0, head.hidden, 0))
