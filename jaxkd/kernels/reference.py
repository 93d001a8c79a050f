"""The dense form that everything is tested against: all logits at once, autodiff, the inputs' own precision.

Feed it float64 (under `jax.enable_x64`) and it is the truth to compare with. It is never used to train. Sets of
leading entries come from a sort, tails from the full vector of probabilities: nothing is shared with the kernels.
"""

import jax
import jax.numpy as jnp

from jaxkd.types import LOG_FLOOR, Divergence, Head, Sampled, Side, TopK


def logits(head: Head) -> jax.Array:
    """[N V] logits of a head, in the precision of its arrays."""
    z = head.hidden @ head.unembed
    z = z if head.scale is None else z * head.scale
    z = z if head.bias is None else z + head.bias
    return z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)


def soften(z: jax.Array, temperature, standardized: bool) -> jax.Array:
    """z / temperature, of logits with mean 0 and standard deviation 1 where asked; the moments carry no gradient."""
    if standardized:
        counts = jnp.isfinite(z)
        mean = jnp.mean(z, -1, keepdims=True, where=counts)
        spread = jnp.std(z, -1, keepdims=True, where=counts)
        z = (z - jax.lax.stop_gradient(mean)) / jax.lax.stop_gradient(jnp.maximum(spread, 1e-6))
    return z / temperature


def floored(lq: jax.Array) -> jax.Array:
    """At least `LOG_FLOOR`, with a straight-through gradient."""
    return lq + jax.lax.stop_gradient(jnp.maximum(lq, LOG_FLOOR) - lq)


def leading(lp: jax.Array, which) -> jax.Array:
    """The fewest entries that hold `which.mass`, or `which.entries` of them, and ties with the last."""
    falling = -jnp.sort(-lp, axis=-1)
    measure = jnp.exp(falling) if which.mass else jnp.ones_like(falling)
    short = jnp.cumsum(measure, -1) < (which.mass or which.entries)
    last = jnp.minimum(short.sum(-1, keepdims=True), lp.shape[-1] - 1)
    return lp >= jnp.take_along_axis(falling, last, -1)


def _field(term: Divergence, lp, lq, hit, counts=None, normaliser=None) -> jax.Array:
    side = Side(hit, None if term.head is None else leading(lp, term.head))
    counts = jnp.ones_like(hit) if counts is None else counts
    sums = [jnp.where(counts, c, 0.0).sum(-1) for c in term.phi(lp, lq, side)]
    return term.combine(*sums, *([normaliser] if term.normaliser else []))


def _stored_field(term: Divergence, teacher: TopK | Sampled, tail: int, z, temperature, targets) -> jax.Array:
    """A term over a sparse teacher's entries."""
    lq = jax.nn.log_softmax(z, -1)
    kept = jax.nn.one_hot(teacher.ids, z.shape[-1], dtype=bool)  # [N K V]
    at_kept = jnp.take_along_axis(lq, teacher.ids, -1)
    hit = teacher.ids == targets[:, None]
    if isinstance(teacher, Sampled):
        share = teacher.counts / jnp.maximum(teacher.counts.sum(-1, keepdims=True), 1)
        return _field(term, jnp.log(jnp.where(share > 0, share, 1.0)), floored(at_kept), hit, share > 0)
    lp = teacher.logprobs / temperature
    lp = lp - jax.nn.logsumexp(lp, -1, keepdims=True)
    if term.support == "conditional":
        at_kept = at_kept - jax.nn.logsumexp(at_kept, -1, keepdims=True)
    if term.support in ("conditional", "renormalized"):
        return _field(term, floored(lp), floored(at_kept), hit)
    tail_p = teacher.tail[:, tail]
    lp = lp + jnp.log(-jnp.expm1(tail_p))[:, None]
    if term.support == "partial":
        return _field(term, floored(lp), floored(at_kept), hit)
    tail_q = jax.nn.logsumexp(jnp.where(kept.any(1), -jnp.inf, lq), -1)
    both_p = jnp.concatenate([lp, tail_p[:, None]], -1)
    both_q = jnp.concatenate([at_kept, tail_q[:, None]], -1)
    return _field(term, floored(both_p), floored(both_q), jnp.concatenate([hit, ~hit.any(-1, keepdims=True)], -1))


def linear_divergence(terms, vocab, student, teacher, targets, weights, temperatures, standardized, tails):
    """See `kernels.api.linear_divergence`; everything after `weights` is a sequence, one a term."""
    z = logits(student)[:, :vocab]
    z_teacher = jax.lax.stop_gradient(logits(teacher)[:, :vocab]) if isinstance(teacher, Head) else None
    hit = targets[:, None] == jnp.arange(vocab)
    fields = []
    for term, temperature, standard, tail in zip(terms, temperatures, standardized, tails, strict=True):
        soft = soften(z, temperature, standard)
        if term.uses_teacher and isinstance(teacher, TopK | Sampled):
            fields.append(_stored_field(term, teacher, tail, soft, temperature, targets))
            continue
        lq = floored(jax.nn.log_softmax(soft, -1))
        lp = lq if z_teacher is None else floored(jax.nn.log_softmax(soften(z_teacher, temperature, standard), -1))
        fields.append(_field(term, lp, lq, hit, normaliser=jax.nn.logsumexp(soft, -1)))
    stacked = jnp.stack(fields)
    value = jnp.sum(jnp.where(weights != 0, weights * stacked, 0.0))
    return value, jax.lax.stop_gradient(stacked)
