"""Terms of an objective, and their weighted sum with its metrics.

All vocabulary terms go through one call of the fused kernel; a `FeatureTerm` computes its own value. The value is a
sum: the step divides it, with the gradients, once by the global token weight.
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
from jaxkd.kernels.api import linear_divergence, token_values
from jaxkd.losses import divergences
from jaxkd.losses.feature_term import FeatureTerm, TokenWeights

__all__ = ["match", "next_token"]

_NONE: Mapping[str, Any] = MappingProxyType({})


class Vocab(NamedTuple):
    """A term over the vocabulary: a divergence at a temperature, of plain or standardised logits, scaled by T^2."""

    divergence: Divergence
    temperature: Scalar = 1.0
    standardize: bool = False
    token_weights: TokenWeights | None = None


class Objective(NamedTuple):
    """A loss: `init` and `loss` of its terms.

    `init(key, student, teacher) -> params["objective"]` from the models' abstract outputs, which only features need.
    `loss(params, student, signal, batch, step, factors={}) -> (value, metrics)`: `value` is the weighted sum over the
    batch's tokens. `factors` (name of a term -> [B L] or [B 1]) scale that term's weight of each token in `value`, and
    neither the metrics nor the token weight that the step divides by.
    """

    init: Callable[..., PyTree]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    uses_teacher: bool
    fields: Mapping[str, FeatureTerm] = _NONE  # the terms over features
    domains: tuple[str, ...] = ()  # names of the batch's domains, in its numbering
    terms: tuple[str, ...] = ()  # names of the terms in `value`
    student_taps: tuple[str, ...] = ()  # features that the student's forward pass must return
    teacher_taps: tuple[str, ...] = ()


class Reweighting(NamedTuple):
    """Factors of the terms that depend on the training metrics, with a small state that `make_step` updates.

    `factors(state, batch) -> {name of a term: [B L] or [B 1]}` before a step, for `Objective.loss`;
    `update(state, metrics, step) -> (state, metrics to log)` after it.
    """

    factors: Callable[[PyTree, Batch], dict[str, jax.Array]]
    update: Callable[[PyTree, Metrics, jax.Array], tuple[PyTree, Metrics]] = lambda state, metrics, step: (state, {})


def match(
    divergence: Divergence,
    temperature: Scalar = 1.0,
    standardize: bool = False,
    token_weights: TokenWeights | None = None,
) -> Vocab:
    """T^2 D(p^(T), q^(T)) with the teacher's distribution; T^2 keeps the gradient's scale (arXiv 1503.02531).

    `divergence` is one of `divergences.py`; `temperature` T a number or a schedule of the step. `standardize` first
    divides each model's logits by their standard deviation over the vocabulary, so that T is relative to it (arXiv
    2403.01427); it carries no gradient here, unlike in the authors' code. `token_weights`, such as `prefix(0.3)` of
    `losses/token_weights.py`, scale the term per token and never normalise.
    """
    return Vocab(divergence, temperature, standardize, token_weights)


def next_token() -> Vocab:
    """Cross-entropy with the data's next token."""
    return Vocab(divergences.next_token())


def objective(
    terms: Mapping[str, tuple[Scalar, Vocab | FeatureTerm]],
    *,
    vocab: int,
    domains: tuple[str, ...],
    tails: tuple[float, ...] = (1.0,),
    chunk: int | None = None,
    measured: Mapping[str, Vocab] = _NONE,
) -> Objective:
    """The weighted sum of named terms, those over the vocabulary in one kernel call.

        value = sum_terms weight(step) T^2 sum_tokens batch.weights token_weights D      (T = 1 for a `FeatureTerm`)

    Metrics have each term's mean without its weight and `token_weights`, over all tokens and per domain; `loss` is the
    weighted sum. A constant weight of 0 removes a term, and with the last term that uses it the teacher's forward pass.
    A term's own parameters are `params["objective"][name]`; terms without parameters have no entry.

    Args:
        terms: name -> (weight, term); a weight is a number or a schedule of the step.
        vocab: true vocabulary size.
        domains: names of the batch's domains.
        tails: temperatures at which a top-k teacher's tail is stored.
        chunk: tokens per chunk in the kernel; None derives it.
        measured: further vocabulary terms that are reported but not minimised, in the same kernel call.

    Raises ValueError: no term is left; from `init`, a model lacks a feature; from `loss`, `factors` name an unknown
    term.
    """
    active = {name: term for name, term in terms.items() if callable(term[0]) or term[0] != 0}
    if not active:
        raise ValueError(f"the objective has no term: give at least one of {', '.join(terms) or 'none'} a weight")
    weights = {name: weight for name, (weight, _) in active.items()}
    vocabulary = {name: term for name, (_, term) in active.items() if isinstance(term, Vocab)}
    features = {name: term for name, (_, term) in active.items() if isinstance(term, FeatureTerm)}
    by_token = {name: term.token_weights for name, (_, term) in active.items() if term.token_weights is not None}
    options: dict[str, Any] = {"vocab": vocab, "tails": tails, "chunk": chunk}
    weights |= dict.fromkeys(measured, 0.0)
    vocabulary |= measured

    def loss(
        params: PyTree,
        student: Output,
        signal: Signal | None,
        batch: Batch,
        step: jax.Array,
        factors: Mapping[str, jax.Array] = _NONE,
    ) -> tuple[jax.Array, Metrics]:
        if unknown := factors.keys() - terms.keys():
            raise ValueError(f"factors name '{min(unknown)}', and the objective's terms are {', '.join(terms)}")
        scales = _token_weights(by_token, student, signal, batch, **options)
        token_weights = lambda name: batch.weights * factors.get(name, 1.0) * scales.get(name, 1.0)
        weight = {name: schedules.value(w, step) for name, w in weights.items()}
        values: list[jax.Array] = []
        fields: dict[str, jax.Array] = {}
        if vocabulary:
            scaled = {name: (weight[name], token_weights(name), term) for name, term in vocabulary.items()}
            value, rows = _vocabulary(scaled, student, signal, batch, step, **options)
            values.append(value)
            fields |= dict(zip(vocabulary, rows, strict=True))
        for name, term in features.items():
            term_weights = weight[name] * token_weights(name)
            value, fields[name] = term.fn(params.get(name, {}), student, signal, batch, term_weights, vocab)
            values.append(value)
        value = functools.reduce(operator.add, values)

        tokens = batch.weights.sum(-1)
        metrics: Metrics = {"loss": (jax.lax.stop_gradient(value), tokens.sum())}
        for name in weights:
            field = jnp.where(batch.weights != 0, fields[name], 0.0)
            metrics |= per_domain(name, (field * batch.weights).sum(-1), tokens, batch.domain, domains)
        return value, metrics

    used: list[Any] = [*features.values(), *(term.divergence for term in vocabulary.values())]
    used += [divergence for by in by_token.values() for divergence in by.measured]
    uses_teacher = any(term.uses_teacher for term in used)
    taps = (
        tuple(dict.fromkeys(tap for term in features.values() for tap in getattr(term, name)))
        for name in ("student_taps", "teacher_taps")
    )
    return Objective(functools.partial(_init, features), loss, uses_teacher, features, domains, tuple(active), *taps)


def _init(
    features: Mapping[str, FeatureTerm], key: jax.Array, student: Output | None = None, teacher: Output | None = None
) -> PyTree:
    """Parameters of the terms that have any, by name."""
    params = {}
    for i, (name, term) in enumerate(features.items()):
        if student is None or (teacher is None and term.uses_teacher):
            raise ValueError(f"objective.{name} needs the models' abstract outputs: call init(key, student, teacher)")
        for side, output, taps in (("student", student, term.student_taps), ("teacher", teacher, term.teacher_taps)):
            available = {} if output is None else output.taps
            missing = [tap for tap in taps if tap not in available]
            if missing:
                raise ValueError(
                    f"objective.{name} needs the {side}'s {', '.join(missing)}, but its output has "
                    f"{', '.join(available) or 'no taps'}"
                )
        try:
            term_params = term.init(jax.random.fold_in(key, i), student, teacher)
        except ValueError as error:
            raise ValueError(f"objective.{name}: {error}") from None
        if jax.tree.leaves(term_params):
            params[name] = term_params
    return params


def _vocabulary(
    terms: Mapping[str, tuple], student: Output, signal: Signal | None, batch: Batch, step, **options
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of (weight, weights [B L], term) by name, and the terms' fields [terms B L]."""
    temperature = tuple(schedules.value(term.temperature, step) for *_, term in terms.values())
    weights = [
        jnp.asarray(weight * t**2, jnp.float32) * per_token  # T^2 is applied here only
        for (weight, per_token, _), t in zip(terms.values(), temperature, strict=True)
    ]
    return linear_divergence(
        tuple(term.divergence for *_, term in terms.values()),
        _zero_padding(student.head, batch),
        _zero_padding(signal, batch),
        batch.targets,
        jnp.stack(weights),
        temperature,
        standardized=tuple(term.standardize for *_, term in terms.values()),
        **options,
    )


def _token_weights(
    terms: Mapping[str, TokenWeights], student: Output, signal: Signal | None, batch: Batch, **options
) -> dict[str, jax.Array]:
    """The factors [B L] of each term, from one measurement of all that they need."""
    measured = tuple(divergence for term in terms.values() for divergence in term.measured)
    values: list[jax.Array] = []
    if measured:
        heads = jax.lax.stop_gradient((_zero_padding(student.head, batch), _zero_padding(signal, batch)))
        values = list(token_values(measured, *heads, batch.targets, **options))
    scales = {name: term.fn(batch, *[values.pop(0) for _ in term.measured]) for name, term in terms.items()}
    return {name: jnp.where(batch.weights != 0, scale, 0.0) for name, scale in scales.items()}


def _zero_padding(signal: Any, batch: Batch) -> Any:
    """A signal with zeroed hidden states in padding, whose NaN would reach gradients and metrics."""
    if isinstance(signal, Output):
        return _zero_padding(signal.head, batch)
    if isinstance(signal, Ensemble):
        return dataclasses.replace(signal, heads=tuple(_zero_padding(head, batch) for head in signal.heads))
    if isinstance(signal, Head):
        return signal._replace(hidden=jnp.where(batch.weights[..., None] != 0, signal.hidden, 0))
    return signal
