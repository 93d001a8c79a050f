"""Terms of an objective, and the one fold that turns them into a value and its metrics.

A vocabulary term only *describes* what it wants; `total` makes all per-token weights first and calls the
fused kernel once for all of them. A `FeatureTerm` (see `features.py`) brings its own value beside its field. The value
is a sum: the step divides it, with the gradients, once by the global token weight.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core import schedules
from jaxkd.core.metrics import per_domain
from jaxkd.core.types import Batch, Divergence, Ensemble, Head, Metrics, Output, PyTree, Scalar, Signal
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences
from jaxkd.losses.feature_term import FeatureTerm
from jaxkd.losses.hard_targets import excess_loss

__all__ = ["match", "next_token"]


class Vocab(NamedTuple):
    """A term over the vocabulary: a divergence at a temperature, of plain or standardised logits, scaled by T^2."""

    divergence: Divergence
    temperature: Scalar = 1.0
    standardize: bool = False


class Objective(NamedTuple):
    """What a step minimises.

    `init(key, student, teacher) -> params["objective"]` from the two sides' abstract outputs, which objectives without
    features do not need; `loss(params, student, signal, batch, step, by_domain=None) -> (value, metrics)` with `value`
    the weighted sum over the batch's tokens, `by_domain` [domains] a factor of every token's weight in it.
    """

    init: Callable[..., PyTree]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    uses_teacher: bool
    fields: Mapping[str, FeatureTerm] = MappingProxyType({})  # the terms that need features
    trains: tuple[str, ...] = ("student", "objective")  # what of the train state's `params` the step moves
    domains: tuple[str, ...] = ()  # the batch's, in their order

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Names of what the student's forward pass has to tap."""
        return tuple(dict.fromkeys(tap for field in self.fields.values() for tap in field.student_taps))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Names of what the teacher's forward pass has to tap."""
        return tuple(dict.fromkeys(tap for field in self.fields.values() for tap in field.teacher_taps))

    def needs_of_teacher(self) -> str:
        """A phrase on which term needs what, for messages."""
        needs = {name: ", ".join(field.teacher_taps) for name, field in self.fields.items() if field.teacher_taps}
        return "; ".join(f"objective.{name} needs the teacher's {taps}" for name, taps in needs.items())


def match(divergence: Divergence, temperature: Scalar = 1.0, standardize: bool = False) -> Vocab:
    """T^2 D(p^(T), q^(T)) with the teacher's distribution; T^2 keeps the gradient's scale (arXiv 1503.02531).

    Args:
        divergence: a function's result of `divergences.py`.
        temperature: T, a number or a schedule of the step.
        standardize: divide each side's logits by their standard deviation over the vocabulary first, so that T is
            relative to it (arXiv 2403.01427); the deviation carries no gradient here, in the authors' code it does.
    """
    return Vocab(divergence, temperature, standardize)


def next_token() -> Vocab:
    """Cross-entropy with the data's next token."""
    return Vocab(divergences.next_token())


def total(
    terms: Mapping[str, tuple[Scalar, Vocab | FeatureTerm]],
    *,
    vocab: int,
    domains: tuple[str, ...],
    tails: tuple[float, ...] = (1.0,),
    chunk: int | None = None,
    trains: tuple[str, ...] = ("student", "objective"),
    excess: bool = False,
) -> Objective:
    """The weighted sum of named terms, those over the vocabulary in one kernel call.

        value = sum_terms weight(step) T^2 sum_tokens batch.weights D      (T = 1 for a `FeatureTerm`)

    Each term reports its own un-weighted mean, over all tokens and per domain; `loss` is the weighted sum.
    A constant weight of zero removes a term, and with the last term that uses it the teacher's forward pass. A term's
    own parameters are `params["objective"][name]`; terms without any have no entry.

    Args:
        terms: name -> (weight, term); a weight is a number or a schedule of the step.
        vocab: true vocabulary size.
        domains: names of the batch's domains.
        tails: temperatures at which a top-k teacher's tail is stored.
        chunk: tokens at a time in the kernel; None sizes it.
        trains: what of `params` the step moves; without "student" it stands still and has no backward pass.
        excess: report `excess`, the mean of max(student's loss - teacher's, 0) per token, as what Group DRO scores.

    Raises:
        ValueError: when no term is left; from `init`, when a model does not have what a term needs.
    """
    kept = {name: term for name, term in terms.items() if callable(term[0]) or term[0] != 0}
    if not kept:
        raise ValueError(
            "the objective has no term: give at least one of " + (", ".join(terms) or "none") + " a weight"
        )
    weights = {name: weight for name, (weight, _) in kept.items()}
    vocabulary = {name: term for name, (_, term) in kept.items() if isinstance(term, Vocab)}
    features = {name: term for name, (_, term) in kept.items() if isinstance(term, FeatureTerm)}
    if excess:  # without a weight: in the same kernel call, and in no gradient
        weights["excess"], vocabulary["excess"] = 0.0, match(excess_loss())

    def loss(
        params: PyTree,
        student: Output,
        signal: Signal | None,
        batch: Batch,
        step: jax.Array,
        by_domain: jax.Array | None = None,
    ) -> tuple[jax.Array, Metrics]:
        counted = batch if by_domain is None else batch._replace(weights=_scaled(batch, by_domain))
        weight = {name: schedules.value(w, step) for name, w in weights.items()}
        values: list[jax.Array] = []
        fields: dict[str, jax.Array] = {}
        if vocabulary:
            terms = {name: (weight[name], term) for name, term in vocabulary.items()}
            value, found = _vocabulary(terms, student, signal, counted, step, vocab=vocab, tails=tails, chunk=chunk)
            values.append(value)
            fields |= dict(zip(vocabulary, found, strict=True))
        for name, term in features.items():
            own = params.get(name, {})
            value, fields[name] = term.fn(own, student, signal, counted, weight[name] * counted.weights, vocab)
            values.append(value)
        value = functools.reduce(operator.add, values)

        tokens = batch.weights.sum(-1)
        metrics: Metrics = {"loss": (jax.lax.stop_gradient(value), tokens.sum())}
        for name in weights:
            field = jnp.where(batch.weights != 0, fields[name], 0.0)
            metrics |= per_domain(name, (field * batch.weights).sum(-1), tokens, batch.domain, domains)
        return value, metrics

    uses_teacher = any(t.divergence.uses_teacher for t in vocabulary.values())
    uses_teacher |= any(t.uses_teacher for t in features.values())
    return Objective(functools.partial(_init, features), loss, uses_teacher, features, trains, domains)


def _init(
    features: Mapping[str, FeatureTerm], key: jax.Array, student: Output | None = None, teacher: Output | None = None
) -> PyTree:
    """Parameters of the terms that have any, by name."""
    params = {}
    for i, (name, term) in enumerate(features.items()):
        if student is None or (teacher is None and term.uses_teacher):
            raise ValueError(f"objective.{name} needs the models' abstract outputs: call init(key, student, teacher)")
        for side, output, taps in (("student", student, term.student_taps), ("teacher", teacher, term.teacher_taps)):
            there = {} if output is None else output.taps
            missing = [tap for tap in taps if tap not in there]
            if missing:
                raise ValueError(
                    f"objective.{name} needs the {side}'s {', '.join(missing)}, but its output has "
                    f"{', '.join(there) or 'no taps'}"
                )
        try:
            made = term.init(jax.random.fold_in(key, i), student, teacher)
        except ValueError as error:
            raise ValueError(f"objective.{name}: {error}") from None
        if jax.tree.leaves(made):
            params[name] = made
    return params


def _vocabulary(
    terms: Mapping[str, tuple], student: Output, signal: Signal | None, batch: Batch, step, **options
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the terms over the vocabulary, and their fields [terms B L]."""
    temperature = tuple(schedules.value(term.temperature, step) for _, term in terms.values())
    # T^2 is applied here and nowhere else.
    scale = [jnp.asarray(w * t**2, jnp.float32) for (w, _), t in zip(terms.values(), temperature, strict=True)]
    return linear_divergence(
        tuple(term.divergence for _, term in terms.values()),
        _clean(student.head, batch),
        _cleaned(signal, batch),
        batch.targets,
        jnp.stack(scale)[:, None, None] * batch.weights,
        temperature,
        standardized=tuple(term.standardize for _, term in terms.values()),
        **options,
    )


def _scaled(batch: Batch, by_domain: jax.Array) -> jax.Array:
    return batch.weights * by_domain[batch.domain][:, None]


def _cleaned(signal: Any, batch: Batch) -> Any:
    if isinstance(signal, Output):
        return _clean(signal.head, batch)
    if isinstance(signal, Ensemble):
        return dataclasses.replace(signal, heads=tuple(_clean(head, batch) for head in signal.heads))
    return signal


def _clean(head: Head, batch: Batch) -> Head:
    # Padding may hold anything; zero it, so that not even a NaN there can reach a gradient or a metric.
    return head._replace(hidden=jnp.where(batch.weights[..., None] != 0, head.hidden, 0))
