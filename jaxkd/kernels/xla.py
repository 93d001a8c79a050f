"""The fused head and divergences in XLA: tokens in chunks, gradients computed in the forward scan, never `[N, V]`.

Since the weights are known first, each chunk finishes its part of the gradient while its logits exist, and four matrix
products (student logits, teacher logits, d hidden, d unembed) serve all terms. A sharded vocabulary exchanges per-token
sums only; the gradient of the head is reduced over the token axes once, after the scan.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxkd.core.types import Ensemble, Head, Sampled, TopK
from jaxkd.kernels import mesh
from jaxkd.kernels.pointwise import (
    Columns,
    Mixed,
    Softening,
    activate,
    columns_of,
    dense,
    dot,
    logits,
    operand,
    sparse,
    teacher_log_probs,
    teacher_logits,
    weighted_sum,
)


class Plan(NamedTuple):
    """Static parameters of a call."""

    terms: tuple[Any, ...]
    slots: tuple[int, ...]  # per term, which of the softenings it uses
    softenings: tuple[Softening, ...]
    vocab: int
    chunk: int
    frozen: bool = False  # the head's gradient is not computed
    axes: mesh.Axes = mesh.AXES


Teacher = Head | Ensemble | TopK | Sampled | None


def _terms(plan: Plan, temperatures, z, teacher: Teacher, target, weights, columns: Columns):
    """All terms on one chunk: fields [terms, c], and the gradient in the logits [c v]."""
    z_teacher = teacher_logits(teacher) if isinstance(teacher, Head | Ensemble) else None
    is_target = target[:, None] == columns.ids
    fields: dict[int, jax.Array] = {}
    dz = None
    for slot, softening in enumerate(plan.softenings):
        indices = [i for i, s in enumerate(plan.slots) if s == slot]
        temperature = temperatures[softening.temperature]
        of_sparse: list[int] = []
        results = []
        if isinstance(teacher, TopK | Sampled) and (of_sparse := [i for i in indices if plan.terms[i].uses_teacher]):
            terms = [(plan.terms[i], weights[i]) for i in of_sparse]
            results.append((of_sparse, sparse(terms, softening, temperature, z, teacher, target, plan.vocab, columns)))
        if of_dense := [i for i in indices if i not in of_sparse]:
            terms = [(plan.terms[i], weights[i]) for i in of_dense]
            results.append((of_dense, dense(terms, softening, temperature, z, z_teacher, is_target, columns)))
        for term_indices, (values, gradient) in results:
            fields |= dict(zip(term_indices, values, strict=True))
            dz = gradient if dz is None else dz + gradient
    return jnp.stack([fields[i] for i in range(len(plan.terms))]), dz


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """Split the leading token axis into chunks, zero-padded, so with zero weight."""
    blocks = -(-x.shape[0] // chunk)
    x = jnp.pad(x, [(0, blocks * chunk - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(blocks, chunk, *x.shape[1:])


def _flat(x: jax.Array, count: int) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])[:count]


def _fields(plan: Plan, tokens, axis, student: Head, teacher, targets, weights, temperatures):
    """Fields [terms, N] of this device's tokens, without gradient."""
    columns = columns_of(plan.vocab, student.unembed.shape[1], axis)

    def block(xs):
        hidden, entries, target, weight = xs
        z = logits(student, hidden)
        return _terms(plan, temperatures, z, _teacher(teacher, entries), target, weight.T, columns)[0].T

    xs = (student.hidden, _per_token(teacher), targets, weights.T)
    fields = jax.lax.map(block, jax.tree.map(lambda x: _chunked(x, plan.chunk), xs))
    return (_flat(fields, targets.shape[0]).T,)


def _per_token(teacher: Teacher) -> Any:
    """The part of a teacher's signal with a token axis."""
    if isinstance(teacher, Ensemble):
        return tuple(head.hidden for head in teacher.heads), teacher.weights
    return teacher.hidden if isinstance(teacher, Head) else teacher


def _teacher(signal: Teacher, chunk: Any) -> Any:
    """The signal of a chunk of tokens."""
    if isinstance(signal, Ensemble):
        hidden, weights = chunk
        heads = tuple(head._replace(hidden=h) for head, h in zip(signal.heads, hidden, strict=True))
        return dataclasses.replace(signal, heads=heads, weights=weights)
    return signal._replace(hidden=chunk) if isinstance(signal, Head) else chunk


def _fields_and_gradient(plan: Plan, tokens, axis, student: Head, teacher, targets, weights, temperatures):
    """Fields [terms, N], and the gradient of their weighted sum in (hidden, unembed, bias)."""
    columns = columns_of(plan.vocab, student.unembed.shape[1], axis)
    unembed = operand(student)

    def block(carry, xs):
        hidden, entries, target, weight = xs
        to_logits = partial(activate, scale=student.scale, softcap=student.softcap)
        live = jnp.any(weight != 0, axis=1, keepdims=True)
        raw = dot(hidden, unembed, (1, 0))
        fields, dz = _terms(
            plan, temperatures, to_logits(raw, student.bias), _teacher(teacher, entries), target, weight.T, columns
        )
        # Zeroed where there is no weight, since the softcap's derivative at NaN is NaN.
        _, pull = jax.vjp(to_logits, jnp.where(live, raw, 0.0), student.bias)
        raw, dbias = pull(jnp.where(live, dz, 0.0))
        raw = raw.astype(hidden.dtype)
        if not plan.frozen:
            # Hidden states without weight may be NaN and must not reach the head's gradient.
            update = (dot(jnp.where(live, hidden, 0), raw, (0, 0)), dbias)
            carry = jax.tree.map(jnp.add, carry, update)
        dhidden = dot(raw, unembed, (1, 1))
        # Cast at once to save memory, unless the parts of a sharded vocabulary must be added first.
        return carry, (fields.T, dhidden.astype(hidden.dtype) if axis is None else dhidden)

    zeros: Any = (jnp.zeros(student.unembed.shape, jnp.float32), jax.tree.map(jnp.zeros_like, student.bias))
    zeros = (None, None) if plan.frozen else zeros
    xs = (student.hidden, _per_token(teacher), targets, weights.T)
    reduced, (fields, dhidden) = jax.lax.scan(block, zeros, jax.tree.map(lambda x: _chunked(x, plan.chunk), xs))
    if tokens:
        reduced = jax.lax.psum(reduced, tokens)
    dhidden = _flat(dhidden, targets.shape[0])
    if axis is not None:
        dhidden = jax.lax.psum(dhidden, axis)
    return (_flat(fields, targets.shape[0]).T, dhidden, *reduced)


def _comparison(plan: Plan, tokens, axis, student: Head, teacher: Head | Ensemble, targets):
    """[terms + 5, N]: the terms' fields at temperature 1, then `api.RANKED`."""
    columns = columns_of(plan.vocab, student.unembed.shape[1], axis)

    def block(xs):
        hidden, entries, target = xs
        z, signal = logits(student, hidden), _teacher(teacher, entries)
        nothing = jnp.zeros((len(plan.terms), target.shape[0]))
        fields, _ = _terms(plan, jnp.ones(1), z, signal, target, nothing, columns)
        zs = (z, teacher_logits(signal))
        lps = [teacher_log_probs(x, 1.0, False, columns) for x in zs]
        q_top, p_top = (columns.argmax(lp if isinstance(x, Mixed) else x) for lp, x in zip(lps, zs, strict=True))
        matches = [q_top == p_top, q_top == target, p_top == target]
        rows = [*(jnp.exp(columns.max(lp)) for lp in lps), *(x.astype(jnp.float32) for x in matches)]
        return jnp.concatenate([fields, jnp.stack(rows)]).T

    xs = jax.tree.map(lambda x: _chunked(x, plan.chunk), (student.hidden, _per_token(teacher), targets))
    return (_flat(jax.lax.map(block, xs), targets.shape[0]).T,)


def _inputs(student: Head, teacher: Teacher, targets, weights, temperatures) -> list[tuple[str, Any]]:
    """The layouts of a call's arrays on a mesh."""
    signals = [("signal", student), ("signal", teacher)]
    return [*signals, ("tokens", targets), ("rows", weights), ("replicated", temperatures)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def divergence(plan: Plan, student: Head, teacher: Teacher, targets, weights, temperatures):
    """See `kernels.api.linear_divergence`."""
    arguments = _inputs(student, teacher, targets, weights, temperatures)
    (fields,) = mesh.run(partial(_fields, plan), arguments, ("rows",), plan.axes)
    return weighted_sum(weights, fields), fields


def _forward(plan: Plan, *arguments):
    plan, arguments = _without_frozen_head(plan, arguments)
    gradient, fields = _gradient(plan, *arguments)
    return (weighted_sum(arguments[3], fields), fields), (gradient, fields)


def _without_frozen_head(plan: Plan, arguments: tuple) -> tuple[Plan, tuple]:
    """Values of a `custom_vjp`'s arguments, and the plan without the head's gradient where it is not differentiated."""
    perturbed = jax.tree.map(lambda x: x.perturbed, arguments[0], is_leaf=lambda x: hasattr(x, "perturbed"))
    values = jax.tree.map(lambda x: x.value, arguments, is_leaf=lambda x: hasattr(x, "perturbed"))
    return plan._replace(frozen=not (perturbed.unembed or perturbed.bias)), values


def _gradient(plan: Plan, student: Head, teacher: Teacher, targets, weights, temperatures):
    """The gradient of sum(weights * fields) in (hidden, unembed, bias), and the fields."""
    head = ("nothing", "nothing") if plan.frozen else ("unembed", "nothing" if student.bias is None else "bias")
    inputs = _inputs(student, teacher, targets, weights, temperatures)
    fields, *gradient = mesh.run(partial(_fields_and_gradient, plan), inputs, ("rows", "hidden", *head), plan.axes)
    primals: Any = (student.hidden, student.unembed, student.bias)
    return tuple(None if g is None else g.astype(x.dtype) for g, x in zip(gradient, primals, strict=True)), fields


def _backward(plan: Plan, residuals, cotangents):
    gradient, fields = residuals
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):  # only the fields are differentiated, and they have no gradient
        return None, None, None, None, None
    student = jax.tree.map(lambda g: (g * scale).astype(g.dtype), Head(*gradient))
    return student, None, None, fields * scale, None


divergence.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def values(plan: Plan, student: Head, teacher: Teacher, targets, temperatures):
    """See `kernels.api.token_values`."""
    nothing = jnp.zeros((len(plan.terms), targets.shape[0]), jnp.float32)
    arguments = _inputs(student, teacher, targets, nothing, temperatures)
    return mesh.run(partial(_fields, plan), arguments, ("rows",), plan.axes)[0]


def _values_forward(plan: Plan, *arguments):
    plan, arguments = _without_frozen_head(plan, arguments)
    # Residuals must be arrays, so `frozen` is encoded in their structure.
    return values(plan, *arguments), (None if plan.frozen else (), arguments)


def _values_backward(plan: Plan, residuals, cotangent):
    frozen, (student, teacher, targets, temperatures) = residuals
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None
    # A token with a zero cotangent has no weight, so it may be NaN.
    gradient, _ = _gradient(plan._replace(frozen=frozen is None), student, teacher, targets, cotangent, temperatures)
    return Head(*gradient), None, None, None


values.defvjp(_values_forward, _values_backward, symbolic_zeros=True)


def compare(plan: Plan, student: Head, teacher: Head | Ensemble, targets: jax.Array) -> jax.Array:
    """See `kernels.api.linear_comparison`."""
    inputs = [("signal", student), ("signal", teacher), ("tokens", targets)]
    return mesh.run(partial(_comparison, plan), inputs, ("rows",), plan.axes)[0]
