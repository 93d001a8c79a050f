"""The fused head and divergences: tokens in chunks, gradients made in the forward scan, never `[N, V]`.

Weights come first. So each chunk can finish its part of the gradient while its logits are at hand, and four
matrix products (student logits, teacher logits, d hidden, d unembed) serve every term of a step. Where the
mesh splits the vocabulary, a chunk exchanges per-token sums and nothing else; the gradient of the head is
reduced over the token axes once, after the scan.

`custom_vjp` stands outside `shard_map`: inside, the cotangent of a replicated output would be divided by the
size of the axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxkd.types import LOG_FLOOR, Head, Side

_TOKEN_AXES, _VOCAB_AXIS = ("data",), "model"


class Plan(NamedTuple):
    """What is static about a call."""

    terms: tuple[Any, ...]
    slots: tuple[int, ...]  # per term, which of the distinct temperatures it uses
    vocab: int
    chunk: int


class _Columns(NamedTuple):
    """The vocabulary entries that one device holds."""

    ids: jax.Array  # [v]
    valid: jax.Array  # [v] bool: below the true vocabulary
    axis: str | None  # mesh axis over which the vocabulary is split

    def sum(self, x: jax.Array) -> jax.Array:
        return x.sum(-1) if self.axis is None else jax.lax.psum(x.sum(-1), self.axis)

    def max(self, x: jax.Array) -> jax.Array:
        return x.max(-1) if self.axis is None else jax.lax.pmax(x.max(-1), self.axis)

    def argmax(self, z: jax.Array) -> jax.Array:
        """The first id with the largest entry, [c v] -> [c]."""
        z = jnp.where(self.valid, z, -jnp.inf)
        winner = self.ids[jnp.argmax(z, -1)]
        if self.axis is None:
            return winner
        winner = jnp.where(z.max(-1) == self.max(z), winner, jnp.iinfo(jnp.int32).max)
        return jax.lax.pmin(winner, self.axis)


def _columns(vocab: int, local: int, axis: str | None) -> _Columns:
    ids = jnp.arange(local) + (0 if axis is None else jax.lax.axis_index(axis) * local)
    return _Columns(ids, ids < vocab, axis)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matrix product in the operands' dtype with float32 accumulation."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _activate(raw: jax.Array, bias, scale, softcap) -> jax.Array:
    z = raw if scale is None else raw * scale
    z = z if bias is None else z + bias.astype(jnp.float32)
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def _logits(head: Head, hidden: jax.Array) -> jax.Array:
    """[c v] float32 logits of a chunk against this device's columns."""
    return _activate(_dot(hidden, _operand(head), (1, 0)), head.bias, head.scale, head.softcap)


def _operand(head: Head) -> jax.Array:
    # The parameter stays float32, so that its gradient does; the product runs in the activations' dtype.
    return head.unembed.astype(head.hidden.dtype)


def _log_probs(z: jax.Array, temperature, columns: _Columns) -> jax.Array:
    z = jnp.where(columns.valid, z / temperature, -jnp.inf)
    top = columns.max(z)[:, None]
    normaliser = jnp.log(columns.sum(jnp.exp(z - top)))[:, None] + top
    return jnp.maximum(z - normaliser, LOG_FLOOR)


def _slope(term, lp, lq, side, columns: _Columns) -> tuple[jax.Array, jax.Array]:
    """A term's value per token [c], and dD/d(log q) per entry [c v] with each log q taken as free."""
    contributions, pull = jax.vjp(lambda x: term.phi(lp, x, side), lq)
    sums = [columns.sum(jnp.where(columns.valid, c, 0.0)) for c in contributions]
    value, pull_sums = jax.vjp(term.combine, *sums)
    steep = pull_sums(jnp.ones_like(value))
    (slope,) = pull(tuple(jnp.where(columns.valid, s[:, None], 0.0) for s in steep))
    return value, slope


def _terms(plan: Plan, temperatures, z, z_teacher, side, weights, columns, gradient: bool):
    """All terms on one chunk: fields [terms, c], and the gradient in the logits [c v]."""
    fields: dict[int, jax.Array] = {}
    dz = jnp.zeros_like(z)
    for slot in sorted(set(plan.slots)):
        temperature = temperatures[slot]
        lq = _log_probs(z, temperature, columns)
        lp = lq if z_teacher is None else _log_probs(z_teacher, temperature, columns)
        slope = jnp.zeros_like(z)
        for i in (i for i, s in enumerate(plan.slots) if s == slot):
            fields[i], steep = _slope(plan.terms[i], lp, lq, side, columns)
            # `where` before multiply: a divergence may be infinite or NaN where its weight is zero.
            weight = weights[i][:, None]
            slope += jnp.where(weight != 0, jnp.where(weight != 0, steep, 0.0) * weight, 0.0)
        if gradient:
            # d log q / d z turns a free slope g into g - q sum(g).
            total = columns.sum(slope)[:, None]
            dz += jnp.where(columns.valid, slope - jnp.exp(lq) * total, 0.0) / temperature
    return jnp.stack([fields[i] for i in range(len(plan.terms))]), dz


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """Split the leading token axis into chunks; the remainder is filled with zeros, so with zero weight."""
    blocks = -(-x.shape[0] // chunk)
    x = jnp.pad(x, [(0, blocks * chunk - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(blocks, chunk, *x.shape[1:])


def _flat(x: jax.Array, count: int) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])[:count]


def _fields(plan: Plan, tokens, axis, student: Head, teacher, targets, weights, temperatures):
    """Fields [terms, N] of this device's tokens, with no gradient."""
    del tokens
    columns = _columns(plan.vocab, student.unembed.shape[1], axis)

    def block(xs):
        hidden, teacher_hidden, target, weight = xs
        z_teacher = None if teacher is None else _logits(teacher, teacher_hidden)
        side = Side(hit=target[:, None] == columns.ids)
        z = _logits(student, hidden)
        return _terms(plan, temperatures, z, z_teacher, side, weight.T, columns, gradient=False)[0].T

    xs = (student.hidden, None if teacher is None else teacher.hidden, targets, weights.T)
    fields = jax.lax.map(block, jax.tree.map(lambda x: _chunked(x, plan.chunk), xs))
    return _flat(fields, targets.shape[0]).T


def _fields_and_gradient(plan: Plan, tokens, axis, student: Head, teacher, targets, weights, temperatures):
    """Fields [terms, N], and the gradient of their weighted sum in (hidden, unembed, bias)."""
    columns = _columns(plan.vocab, student.unembed.shape[1], axis)
    unembed = _operand(student)

    def block(carry, xs):
        hidden, teacher_hidden, target, weight = xs
        z_teacher = None if teacher is None else _logits(teacher, teacher_hidden)
        side = Side(hit=target[:, None] == columns.ids)
        activate = partial(_activate, scale=student.scale, softcap=student.softcap)
        z, pull = jax.vjp(activate, _dot(hidden, unembed, (1, 0)), student.bias)
        fields, dz = _terms(plan, temperatures, z, z_teacher, side, weight.T, columns, gradient=True)
        live = jnp.any(weight != 0, axis=1, keepdims=True)
        raw, dbias = pull(jnp.where(live, dz, 0.0))
        raw = raw.astype(hidden.dtype)
        # What stands in a token without weight, NaN included, must not reach the head's gradient.
        step = (_dot(jnp.where(live, hidden, 0), raw, (0, 0)), dbias)
        return jax.tree.map(jnp.add, carry, step), (fields.T, _dot(raw, unembed, (1, 1)))

    empty = (jnp.zeros(student.unembed.shape, jnp.float32), jax.tree.map(jnp.zeros_like, student.bias))
    xs = (student.hidden, None if teacher is None else teacher.hidden, targets, weights.T)
    reduced, (fields, dhidden) = jax.lax.scan(block, empty, jax.tree.map(lambda x: _chunked(x, plan.chunk), xs))
    if tokens:
        reduced = jax.lax.psum(reduced, tokens)
    dhidden = _flat(dhidden, targets.shape[0])
    if axis is not None:
        dhidden = jax.lax.psum(dhidden, axis)
    return _flat(fields, targets.shape[0]).T, (dhidden, *reduced)


def _comparison(plan: Plan, tokens, axis, student: Head, teacher: Head, targets, weights, temperatures):
    """[terms + 1, N]: the terms' fields at temperature 1, then whether both sides rank the same token first."""
    columns = _columns(plan.vocab, student.unembed.shape[1], axis)
    del tokens, weights, temperatures

    def block(xs):
        hidden, teacher_hidden, target = xs
        z, z_teacher = _logits(student, hidden), _logits(teacher, teacher_hidden)
        side = Side(hit=target[:, None] == columns.ids)
        nothing = jnp.zeros((len(plan.terms), target.shape[0]))
        fields, _ = _terms(plan, jnp.ones(1), z, z_teacher, side, nothing, columns, gradient=False)
        same = columns.argmax(z) == columns.argmax(z_teacher)
        return jnp.concatenate([fields, same.astype(jnp.float32)[None]]).T

    xs = jax.tree.map(lambda x: _chunked(x, plan.chunk), (student.hidden, teacher.hidden, targets))
    return _flat(jax.lax.map(block, xs), targets.shape[0]).T


def _on_mesh(body: Callable, plan: Plan, with_gradient: bool, student: Head, teacher, *rest):
    """Run `body` on each device's tokens and columns, or plainly where there is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(mesh.shape)
    tokens = tuple(a for a in _TOKEN_AXES if sizes.get(a, 1) > 1)
    axis = _VOCAB_AXIS if sizes.get(_VOCAB_AXIS, 1) > 1 else None
    if not tokens and axis is None:
        return body(plan, (), None, student, teacher, *rest)

    def place(head: Head | None) -> Any:
        specs = (P(tokens, None), P(None, axis), P(axis), P(), P())
        present: list[Any] = [None if x is None else s for x, s in zip(head or (), specs, strict=False)]
        return None if head is None else Head(*present)

    out = P(None, tokens)
    gradient = (P(tokens, None), P(None, axis), None if student.bias is None else P(axis))
    return jax.shard_map(
        partial(body, plan, tokens, axis),
        in_specs=(place(student), place(teacher), P(tokens), out, P()),
        out_specs=(out, gradient) if with_gradient else out,
        check_vma=False,
    )(student, teacher, *rest)


def _value(weights: jax.Array, fields: jax.Array) -> jax.Array:
    live = weights != 0
    return jnp.sum(jnp.where(live, weights * jnp.where(live, fields, 0.0), 0.0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def divergence(plan: Plan, student: Head, teacher: Head | None, targets, weights, temperatures):
    """See `kernels.api.linear_divergence`."""
    fields = _on_mesh(_fields, plan, False, student, teacher, targets, weights, temperatures)
    return _value(weights, fields), fields


def _forward(plan: Plan, student, teacher, targets, weights, temperatures):
    fields, gradient = _on_mesh(_fields_and_gradient, plan, True, student, teacher, targets, weights, temperatures)
    like = (student.hidden, student.unembed, student.bias)
    gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, like)
    return (_value(weights, fields), fields), (gradient, fields)


def _backward(plan: Plan, residuals, cotangents):
    (dhidden, dunembed, dbias), fields = residuals
    scale = cotangents[0]
    student = jax.tree.map(lambda g: (g * scale).astype(g.dtype), Head(dhidden, dunembed, dbias))
    return student, None, None, fields * scale, None


divergence.defvjp(_forward, _backward)


def compare(plan: Plan, student: Head, teacher: Head, targets: jax.Array) -> jax.Array:
    """See `kernels.api.linear_comparison`."""
    nothing = jnp.zeros((1, targets.shape[0])), jnp.zeros(())
    return _on_mesh(_comparison, plan, False, student, teacher, targets, *nothing)
