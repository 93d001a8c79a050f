"""Operations on one chunk of logits: softening, log-probabilities, the terms, and the gradient in the logits.

Everything is per token over one device's vocabulary entries. Only `Columns` knows whether other devices hold the rest;
it exchanges sums and maxima per token, never entries.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core.types import LOG_FLOOR, Divergence, Ensemble, Head, Sampled, Side, TopK, TopSet

_SMALLEST_SPREAD = 1e-6  # lower bound of the logits' standard deviation
_TIE = 1 + 4 * float(jnp.finfo(jnp.float32).eps)  # log-probabilities up to this ratio are tied


class Softening(NamedTuple):
    """How logits become distributions: temperature, and whether they are standardised first."""

    temperature: int  # index among the distinct temperatures
    standardized: bool = False
    tail: int = 0  # index of a top-k teacher's stored tail


class Columns(NamedTuple):
    """The vocabulary entries that one device holds."""

    ids: jax.Array  # [v]
    valid: jax.Array | None  # [v] bool: below the true vocabulary; None when all are
    axis: str | None  # mesh axis over which the vocabulary is split

    def mask(self, x: jax.Array, other: float) -> jax.Array:
        """`x` with columns beyond the true vocabulary replaced."""
        return x if self.valid is None else jnp.where(self.valid, x, other)

    def total(self, x: jax.Array) -> jax.Array:
        """Per-token values summed over the devices that share the vocabulary."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def sum(self, x: jax.Array) -> jax.Array:
        """[c v] -> [c] over the whole vocabulary."""
        return self.total(x.sum(-1))

    def max(self, x: jax.Array) -> jax.Array:
        """[c v] -> [c] over the whole vocabulary."""
        return x.max(-1) if self.axis is None else jax.lax.pmax(x.max(-1), self.axis)

    def min(self, x: jax.Array) -> jax.Array:
        """[c v] -> [c] over the whole vocabulary."""
        return x.min(-1) if self.axis is None else jax.lax.pmin(x.min(-1), self.axis)

    def argmax(self, z: jax.Array) -> jax.Array:
        """The first id with the largest entry, [c v] -> [c]."""
        z = self.mask(z, -jnp.inf)
        winner = self.ids[jnp.argmax(z, -1)]
        if self.axis is None:
            return winner
        # By index, not by equality with the maximum: XLA may recompute `z` with other rounding.
        tops, winners = (jax.lax.all_gather(x, self.axis) for x in (z.max(-1), winner))
        return jnp.take_along_axis(winners, jnp.argmax(tops, 0)[None], 0)[0]

    def local(self, ids: jax.Array) -> jax.Array:
        """Indices of global ids among this device's entries; those of other devices are out of range."""
        index = ids - self.ids[0]
        return jnp.where((index >= 0) & (index < self.ids.shape[0]), index, self.ids.shape[0])


def columns_of(vocab: int, local: int, axis: str | None) -> Columns:
    """This device's part of a vocabulary of which each device holds `local` entries."""
    if axis is None:
        ids = jnp.arange(local)
        return Columns(ids, None if local == vocab else ids < vocab, None)
    ids = jnp.arange(local) + jax.lax.axis_index(axis) * local
    even = local * jax.lax.axis_size(axis) == vocab
    return Columns(ids, None if even else ids < vocab, axis)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matrix product in the operands' dtype with float32 accumulation."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def activate(raw: jax.Array, bias, scale, softcap) -> jax.Array:
    """Logits from `hidden @ unembed`: scale, bias and soft cap."""
    z = raw if scale is None else raw * scale
    z = z if bias is None else z + bias.astype(jnp.float32)
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def operand(head: Head) -> jax.Array:
    """The unembedding in the activations' dtype; the parameter itself stays float32."""
    return head.unembed.astype(head.hidden.dtype)


def logits(head: Head, hidden: jax.Array) -> jax.Array:
    """[c v] float32 logits of a chunk against this device's columns."""
    return activate(dot(hidden, operand(head), (1, 0)), head.bias, head.scale, head.softcap)


class Mixed(NamedTuple):
    """An ensemble's logits on a chunk."""

    z: tuple[jax.Array, ...]  # [c v] each
    weights: jax.Array  # [c T]
    geometric: bool


def teacher_logits(teacher: Head | Ensemble) -> jax.Array | Mixed:
    """A chunk's logits of the teacher; heads of an ensemble without weight in the chunk are not multiplied."""
    if isinstance(teacher, Head):
        return logits(teacher, teacher.hidden)
    logits_by_teacher = []
    for t, head in enumerate(teacher.heads):
        shape = (head.hidden.shape[0], head.unembed.shape[1])
        logits_by_teacher.append(
            jax.lax.cond(
                jnp.any(teacher.weights[:, t] > 0),
                lambda head=head: logits(head, head.hidden),
                lambda shape=shape: jnp.zeros(shape, jnp.float32),
            )
        )
    return Mixed(tuple(logits_by_teacher), teacher.weights, teacher.geometric)


def weighted_sum(weights: jax.Array, fields: jax.Array) -> jax.Array:
    """The value of a call: sum of weights x fields [terms N]; fields without weight may be NaN."""
    live = weights != 0
    return jnp.sum(jnp.where(live, weights * jnp.where(live, fields, 0.0), 0.0))


class _Soft(NamedTuple):
    """Logits [c v], -inf beyond the true vocabulary; their divisor; the two parts of their normaliser [c 1].

    log p = (z - top) / divisor - log_mass. The normaliser top / divisor + log_mass is as large as the logits:
    subtracting it as one number would lose the precision of `z - top`.
    """

    z: jax.Array
    divisor: Any
    top: jax.Array
    log_mass: jax.Array

    def log_probs(self, floor: float = LOG_FLOOR) -> jax.Array:
        # `z + -top` equals `z - top` exactly, but is not deduplicated with that of `_distribution`: XLA on CPU would
        # compute it once, after the product, at the cost of another pass over memory.
        return jnp.maximum((self.z + -self.top) / self.divisor - self.log_mass, floor)

    def normaliser(self) -> jax.Array:
        return (self.top / self.divisor + self.log_mass)[:, 0]


def _divisor(z: jax.Array, temperature: Any, standardized: bool, columns: Columns) -> Any:
    if not standardized:
        return temperature
    # The mean cancels in the softmax; the deviation is a per-token temperature, without a gradient.
    counts = columns.mask(jnp.isfinite(z), False)
    clean = jnp.where(counts, z, 0.0)
    size = columns.sum(counts.astype(jnp.float32))
    mean = columns.sum(clean) / size
    variance = columns.sum(jnp.where(counts, jnp.square(clean - mean[:, None]), 0.0)) / size
    return temperature * jnp.maximum(jnp.sqrt(variance), _SMALLEST_SPREAD)[:, None]


def _distribution(z: jax.Array, temperature: jax.Array | float, standardized: bool, columns: Columns) -> _Soft:
    divisor = _divisor(z, temperature, standardized, columns)
    z = columns.mask(z, -jnp.inf)
    top = columns.max(z)[:, None]
    return _Soft(z, divisor, top, jnp.log(columns.sum(jnp.exp((z - top) / divisor)))[:, None])


def teacher_log_probs(
    z: jax.Array | Mixed, temperature: jax.Array | float, standardized: bool, columns: Columns
) -> jax.Array:
    """Floored log-probabilities [c v] of one teacher or of an ensemble."""
    if not isinstance(z, Mixed):
        return _distribution(z, temperature, standardized, columns).log_probs()
    total: Any = None
    for t, logits_t in enumerate(z.z):
        weight = z.weights[:, t : t + 1]
        live = weight > 0  # false for NaN too
        soft = _distribution(jnp.where(live, logits_t, 0.0), temperature, standardized, columns)
        lp = soft.log_probs(4 * LOG_FLOOR)  # finite, and far below the final floor
        if z.geometric:
            part = jnp.where(live, jnp.where(live, weight, 0.0) * lp, 0.0)
            total = part if total is None else total + part
        else:
            part = jnp.where(live, jnp.log(jnp.where(live, weight, 1.0)) + lp, 8 * LOG_FLOOR)
            total = part if total is None else jnp.logaddexp(total, part)
    if z.geometric:
        return _distribution(total, 1.0, False, columns).log_probs()
    return jnp.maximum(total, LOG_FLOOR)


def top_set(lp: jax.Array, which: TopSet, columns: Columns | None = None) -> jax.Array:
    """Whether each entry [c v] is among the teacher's most probable ones, with ties.

    XLA may recompute `lp` for this comparison with other rounding than in the search for the last leading entry, so the
    threshold lies between that entry and the next.
    """
    return -lp <= top_threshold(lp, which, columns)[:, None]


def top_threshold(lp: jax.Array, which: TopSet, columns: Columns | None = None) -> jax.Array:
    """-log p halfway from the last leading entry to the next, [c]; ties with the last are included.

    Bisection over the bits of -log p, which order as integers do: 31 sums per token find the last leading entry without
    a sort, and a sharded vocabulary exchanges only those sums. `lp` [c v] is at least `LOG_FLOOR`, and equal to it
    beyond the true vocabulary; `columns` None: all entries are local.
    """
    total, least = (columns.sum, columns.min) if columns else (lambda x: x.sum(-1), lambda x: x.min(-1))
    rank = _bits(jnp.abs(jnp.minimum(lp, 0.0)))  # abs: -0.0 is a negative integer
    measure = jnp.exp(lp) if which.mass else jnp.ones_like(lp)
    goal = which.mass or float(which.entries)
    lowest, steps = _bits(jnp.float32(-LOG_FLOOR)), 31

    def halve(step, carry):
        few, enough, beyond = carry
        middle = few + (enough - few) // 2
        reached = total(jnp.where(rank <= middle[:, None], measure, 0.0)) >= goal
        # An extra last step finds the next entry, inside the loop so that `rank` is the bisected array. The reduction
        # over devices follows after the loop, since a collective must not be conditional.
        after = lambda: jnp.where(rank > enough[:, None], rank, lowest).min(-1, keepdims=True)
        beyond = jax.lax.cond(step == steps, after, lambda: beyond)
        return jnp.where(reached, few, middle), jnp.where(reached, middle, enough), beyond

    rows = lp.shape[0]
    carry = jnp.full(rows, -1), jnp.full(rows, lowest), jnp.full((rows, 1), lowest)
    _, last, beyond = jax.lax.fori_loop(0, steps + 1, halve, carry)
    last, beyond = (jax.lax.bitcast_convert_type(x, jnp.float32) for x in (last, least(beyond)))
    return jnp.maximum((last + beyond) / 2, last * _TIE)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _weighted(weight: jax.Array, x: jax.Array) -> jax.Array:
    # `where` before multiply: a divergence without weight may be infinite or NaN.
    weight = weight.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(weight != 0, jnp.where(weight != 0, x, 0.0) * weight, 0.0)


def _slope(term: Divergence, lp, lq, side, normaliser, columns: Columns):
    """A term's value [c]; dD/d(log q) [c v] with independent log q; dD/d(normaliser) [c]; None if there is none."""
    contributions, pull = jax.vjp(lambda x: term.phi(lp, x, side), lq)
    sums = [columns.sum(columns.mask(c, 0.0)) for c in contributions]
    value, pull_sums = jax.vjp(term.combine, *sums, *([normaliser] if term.normaliser else []))
    d_sums = list(pull_sums(jnp.ones_like(value)))
    d_normaliser = d_sums.pop() if term.normaliser else None
    if not d_sums:
        return value, None, d_normaliser
    cotangents = tuple(columns.mask(jnp.broadcast_to(s[:, None], lq.shape), 0.0) for s in d_sums)
    return value, pull(cotangents)[0], d_normaliser


def dense(
    terms: Sequence[tuple[Divergence, jax.Array]],
    softening: Softening,
    temperature: jax.Array,
    z: jax.Array,
    z_teacher: jax.Array | Mixed | None,
    is_target: jax.Array,
    columns: Columns,
) -> tuple[list[jax.Array], jax.Array]:
    """Terms over the whole vocabulary: their values [c], and the weighted sum's gradient in the logits [c v].

    Args:
        terms: (divergence, weights [c]), all with the same softening.
        temperature: the scalar of `softening`.
        z: student's logits [c v].
        z_teacher: None if no term needs them.
        is_target: [c v] bool.
    """
    student = _distribution(z, temperature, softening.standardized, columns)
    lq = lp = student.log_probs()
    if z_teacher is not None:
        lp = teacher_log_probs(z_teacher, temperature, softening.standardized, columns)
    values, slope, normaliser_slope = [], jnp.zeros_like(z), None
    for term, weight in terms:
        side = Side(is_target, None if term.top_set is None else top_set(lp, term.top_set, columns))
        value, term_slope, d_normaliser = _slope(term, lp, lq, side, student.normaliser(), columns)
        values.append(value)
        if term_slope is not None:
            slope = slope + _weighted(weight, term_slope)
        if d_normaliser is not None:
            normaliser_slope = _weighted(weight, d_normaliser) + (0.0 if normaliser_slope is None else normaliser_slope)
    # The Jacobian d log q / d z maps g to g - q sum(g); the normaliser's derivative is q.
    total = columns.sum(slope)
    total = total if normaliser_slope is None else total - normaliser_slope
    return values, columns.mask(slope - jnp.exp(lq) * total[:, None], 0.0) / student.divisor


class _Stored(NamedTuple):
    """A sparse teacher's entries in a chunk."""

    ids: jax.Array  # [c K]
    counts: jax.Array  # [c K] bool: the entry is valid, not padding
    lp: jax.Array  # [c K]
    tail: jax.Array | None  # [c]


def _normalised(lp: jax.Array, counts: jax.Array) -> jax.Array:
    """`lp` normalised over the valid entries; the other numbers are unused."""
    top = jnp.where(counts, lp, -jnp.inf).max(-1, keepdims=True)
    lp = jnp.where(counts, lp - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    mass = jnp.where(counts, jnp.exp(lp), 0.0).sum(-1, keepdims=True)
    return lp - jnp.log(jnp.where(mass > 0, mass, 1.0))


def _stored(teacher: TopK | Sampled, softening: Softening, temperature: jax.Array, vocab: int) -> _Stored:
    ids = teacher.ids
    inside = (ids >= 0) & (ids < vocab)
    if isinstance(teacher, Sampled):
        counts = inside & (teacher.counts > 0)
        drawn = jnp.where(counts, teacher.counts, 0).astype(jnp.float32)
        share = drawn / jnp.maximum(drawn.sum(-1, keepdims=True), 1.0)
        return _Stored(ids, counts, jnp.log(jnp.where(counts, share, 1.0)), None)
    tail = jnp.minimum(teacher.tail[:, softening.tail].astype(jnp.float32), -1e-7)
    counts = inside & (teacher.logprobs > -jnp.inf)
    # The tail at this temperature determines the normaliser.
    lp = _normalised(teacher.logprobs.astype(jnp.float32) / temperature, counts)
    lp = lp + jnp.log(-jnp.expm1(tail))[:, None]
    return _Stored(ids, counts, jnp.maximum(lp, LOG_FLOOR), jnp.maximum(tail, LOG_FLOOR))


def _entries(term: Divergence, stored: _Stored, lq: jax.Array, lq_tail: jax.Array, is_target: jax.Array) -> jax.Array:
    """A term over a sparse teacher's entries, [c]."""
    lp, counts = stored.lp, stored.counts
    if term.support in ("conditional", "renormalized"):
        lp = _normalised(lp, counts)
    if term.support == "conditional":
        lq = _normalised(lq, counts)
    in_top_set = None if term.top_set is None else top_set(jnp.where(counts, lp, LOG_FLOOR), term.top_set)
    if term.support is None and stored.tail is not None:
        append = lambda x, last: jnp.concatenate([x, last[:, None]], -1)
        lp, lq = append(lp, stored.tail), append(lq, lq_tail)
        # The tail is many entries, of which none leads.
        in_top_set = None if in_top_set is None else append(in_top_set, jnp.zeros_like(in_top_set[:, 0]))
        is_target, counts = (
            append(is_target, ~(is_target & counts).any(-1)),
            append(counts, jnp.ones_like(counts[:, 0])),
        )
    # Invalid entries must not reach phi: an infinite derivative times a cotangent of zero is NaN.
    lp, lq = jnp.where(counts, lp, 0.0), jnp.where(counts, lq, 0.0)
    return term.combine(*[jnp.where(counts, c, 0.0).sum(-1) for c in term.phi(lp, lq, Side(is_target, in_top_set))])


def sparse(
    terms: Sequence[tuple[Divergence, jax.Array]],
    softening: Softening,
    temperature: jax.Array,
    z: jax.Array,
    teacher: TopK | Sampled,
    targets: jax.Array,
    vocab: int,
    columns: Columns,
) -> tuple[list[jax.Array], jax.Array]:
    """`dense` for a sparse teacher: the student's other entries enter as one sum. `targets` are ids [c]."""
    stored = _stored(teacher, softening, temperature, vocab)
    z = columns.mask(z, -jnp.inf)
    indices, row = columns.local(jnp.where(stored.counts, stored.ids, -1)), jnp.arange(z.shape[0])[:, None]
    z_stored = columns.total(z.at[row, indices].get(mode="fill", fill_value=0.0))
    z_stored = jnp.where(stored.counts, z_stored, -jnp.inf)
    # The stored entries are excluded from the sum instead of subtracted from it, and the others have their own maximum,
    # so that even a small tail is exact.
    others = z.at[row, indices].set(-jnp.inf, mode="drop")
    top, top_stored = columns.max(others), z_stored.max(-1)
    top = jnp.where(jnp.isfinite(top), top, jnp.where(jnp.isfinite(top_stored), top_stored, 0.0))
    share = jnp.exp((others - top[:, None]) / temperature)
    others_mass = columns.sum(share)
    highest = jnp.maximum(top, top_stored)
    below, z_stored = (top - highest) / temperature, (z_stored - highest[:, None]) / temperature
    exp_stored = jnp.exp(z_stored)
    mass = exp_stored.sum(-1) + others_mass * jnp.exp(below)
    lq = jnp.maximum(z_stored - jnp.log(mass)[:, None], LOG_FLOOR)
    lq_tail = jnp.maximum(jnp.log(others_mass) + below - jnp.log(mass), LOG_FLOOR)

    values, slope, slope_tail = [], jnp.zeros_like(lq), jnp.zeros_like(lq_tail)
    is_target = stored.ids == targets[:, None]
    for term, weight in terms:
        run: Any = lambda a, b, term=term: _entries(term, stored, a, b, is_target)
        value, pull = jax.vjp(run, lq, lq_tail)
        values.append(value)
        slopes = pull(jnp.ones_like(value))
        slope, slope_tail = slope + _weighted(weight, slopes[0]), slope_tail + _weighted(weight, slopes[1])
    total = slope.sum(-1) + slope_tail
    within = jnp.where(others_mass > 0, slope_tail / jnp.where(others_mass > 0, others_mass, 1.0), 0.0)
    dz = share * (within - jnp.exp(below) / mass * total)[:, None]
    d_stored = slope - exp_stored * (total / mass)[:, None]
    return values, dz.at[row, indices].set(d_stored, mode="drop") / temperature
