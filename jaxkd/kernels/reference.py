"""Dense reference implementation for tests: all logits at once, autodiff, the inputs' own precision.

With float64 inputs (under `jax.enable_x64`) it is the ground truth. Never used for training. It shares only `phi`,
`combine` and the floor with the kernels: top sets come from a sort, tails from the full vector of probabilities.
"""

import jax
import jax.numpy as jnp

from jaxkd.core.types import LOG_FLOOR, Divergence, Ensemble, Head, Sampled, Side, TopK


def logits(head: Head) -> jax.Array:
    """[N V] logits of a head, in the precision of its arrays."""
    z = head.hidden @ head.unembed
    z = z if head.scale is None else z * head.scale
    z = z if head.bias is None else z + head.bias
    return z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)


def soften(z: jax.Array, temperature, standardized: bool) -> jax.Array:
    """z / temperature, of standardised logits on request; mean and deviation carry no gradient."""
    if standardized:
        counts = jnp.isfinite(z)
        mean = jnp.mean(z, -1, keepdims=True, where=counts)
        spread = jnp.std(z, -1, keepdims=True, where=counts)
        z = (z - jax.lax.stop_gradient(mean)) / jax.lax.stop_gradient(jnp.maximum(spread, 1e-6))
    return z / temperature


def floored(lq: jax.Array) -> jax.Array:
    """At least `LOG_FLOOR`, with a straight-through gradient; -inf is clipped first, since it cannot be subtracted."""
    lq = jnp.where(lq > -1e6, lq, -1e6)
    return lq + jax.lax.stop_gradient(jnp.maximum(lq, LOG_FLOOR) - lq)


def top_set(lp: jax.Array, which) -> jax.Array:
    """The fewest entries that hold `which.mass`, or the `which.entries` largest, with ties."""
    falling = -jnp.sort(-lp, axis=-1)
    measure = jnp.exp(falling) if which.mass else jnp.ones_like(falling)
    short = jnp.cumsum(measure, -1) < (which.mass or which.entries)
    last = jnp.take_along_axis(falling, jnp.minimum(short.sum(-1, keepdims=True), lp.shape[-1] - 1), -1)
    beyond = jnp.where(falling < last, falling, -jnp.inf).max(-1, keepdims=True)
    # Halfway to the next entry: XLA may recompute `lp` with other rounding than the sorted array.
    return lp >= (last + beyond) / 2


def _field(term: Divergence, lp, lq, is_target, in_top_set=None, counts=None, normaliser=None) -> jax.Array:
    counts = jnp.ones_like(is_target) if counts is None else counts
    sums = [jnp.where(counts, c, 0.0).sum(-1) for c in term.phi(lp, lq, Side(is_target, in_top_set))]
    return term.combine(*sums, *([normaliser] if term.normaliser else []))


def _stored_field(term: Divergence, teacher: TopK | Sampled, tail: int, z, temperature, targets) -> jax.Array:
    """A term over a sparse teacher's entries; padding entries have probability zero in both."""
    lq, vocab = jax.nn.log_softmax(z, -1), z.shape[-1]
    inside = (teacher.ids >= 0) & (teacher.ids < vocab)
    ids = jnp.clip(teacher.ids, 0, vocab - 1)
    is_target = ids == targets[:, None]
    if isinstance(teacher, Sampled):
        drawn = jnp.where(inside, teacher.counts, 0)
        share = drawn / jnp.maximum(drawn.sum(-1, keepdims=True), 1)
        lq_stored = floored(jnp.take_along_axis(lq, ids, -1))
        return _field(term, jnp.log(jnp.where(share > 0, share, 1.0)), lq_stored, is_target, counts=share > 0)
    counts = inside & (teacher.logprobs > -jnp.inf)
    is_stored = (jax.nn.one_hot(ids, vocab, dtype=bool) & counts[..., None]).any(1)  # [N V]
    softened = lambda x: jax.nn.log_softmax(jnp.where(counts, x, -1e30), -1)
    lq_stored, lp = jnp.take_along_axis(lq, ids, -1), softened(teacher.logprobs / temperature)
    lq_stored = softened(lq_stored) if term.support == "conditional" else lq_stored
    tail_p = teacher.tail[:, tail]
    if term.support not in ("conditional", "renormalized"):
        lp = lp + jnp.log(-jnp.expm1(tail_p))[:, None]
    lp, lq_stored = floored(lp), floored(lq_stored)
    in_top_set = None if term.top_set is None else top_set(jnp.where(counts, lp, -jnp.inf), term.top_set) & counts
    if term.support is not None:
        return _field(term, lp, lq_stored, is_target, in_top_set, counts)
    tail_q = floored(jax.nn.logsumexp(jnp.where(is_stored, -1e30, lq), -1))
    append = lambda x, last: jnp.concatenate([x, last[:, None]], -1)
    lp, lq_stored = append(lp, floored(tail_p)), append(lq_stored, tail_q)
    is_target = append(is_target & counts, ~(is_target & counts).any(-1))
    in_top_set = None if in_top_set is None else append(in_top_set, jnp.zeros_like(in_top_set[:, 0]))
    return _field(term, lp, lq_stored, is_target, in_top_set, append(counts, jnp.ones_like(counts[:, 0])))


def _averaged(lps: list[jax.Array], teacher: Ensemble) -> jax.Array:
    """The log-probabilities of an ensemble."""
    weights = jnp.moveaxis(teacher.weights, -1, 0)[..., None]
    stacked = jnp.stack(lps)
    if teacher.geometric:
        return jax.nn.log_softmax(jnp.where(weights > 0, weights * stacked, 0.0).sum(0), -1)
    return jax.nn.logsumexp(stacked, 0, b=jnp.where(weights > 0, weights, 0.0), where=weights > 0)


def linear_divergence(terms, vocab, student, teacher, targets, weights, temperatures, standardized, tails):
    """See `kernels.api.linear_divergence`; arguments after `weights` are sequences, one element per term."""
    z = logits(student)[:, :vocab]
    heads = teacher.heads if isinstance(teacher, Ensemble) else (teacher,) if isinstance(teacher, Head) else ()
    z_teachers = [jax.lax.stop_gradient(logits(head)[:, :vocab]) for head in heads]
    is_target = targets[:, None] == jnp.arange(vocab)
    fields = []
    for term, temperature, standard, tail in zip(terms, temperatures, standardized, tails, strict=True):
        soft = soften(z, temperature, standard)
        if term.uses_teacher and isinstance(teacher, TopK | Sampled):
            fields.append(_stored_field(term, teacher, tail, soft, temperature, targets))
            continue
        lq = floored(jax.nn.log_softmax(soft, -1))
        lps = [jax.nn.log_softmax(soften(each, temperature, standard), -1) for each in z_teachers]
        lp = lq if not lps else floored(_averaged(lps, teacher) if isinstance(teacher, Ensemble) else lps[0])
        in_top_set = None if term.top_set is None else top_set(lp, term.top_set)
        fields.append(_field(term, lp, lq, is_target, in_top_set, normaliser=jax.nn.logsumexp(soft, -1)))
    stacked = jnp.stack(fields)
    value = jnp.sum(jnp.where(weights != 0, weights * stacked, 0.0))
    return value, jax.lax.stop_gradient(stacked)
