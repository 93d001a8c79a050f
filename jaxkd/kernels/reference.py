"""The dense form that everything is tested against: all logits at once, autodiff, the inputs' own precision.

Feed it float64 (under `jax.enable_x64`) and it is the truth to compare with. It is never used to train.
"""

import jax
import jax.numpy as jnp

from jaxkd.types import LOG_FLOOR, Head, Side


def logits(head: Head) -> jax.Array:
    """[N V] logits of a head, in the precision of its arrays."""
    z = head.hidden @ head.unembed
    z = z if head.scale is None else z * head.scale
    z = z if head.bias is None else z + head.bias
    return z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)


def log_probs(z: jax.Array, temperature) -> jax.Array:
    """log softmax(z / temperature), floored with a straight-through gradient."""
    lq = jax.nn.log_softmax(z / temperature, axis=-1)
    return lq + jax.lax.stop_gradient(jnp.maximum(lq, LOG_FLOOR) - lq)


def linear_divergence(terms, vocab, chunk, student, teacher, targets, weights, temperatures):
    """See `kernels.api.linear_divergence`; `chunk` is ignored and `temperatures` is a sequence, one a term."""
    del chunk
    z = logits(student)[:, :vocab]
    z_teacher = None if teacher is None else jax.lax.stop_gradient(logits(teacher)[:, :vocab])
    side = Side(hit=targets[:, None] == jnp.arange(vocab))
    fields = []
    for term, temperature in zip(terms, temperatures, strict=True):
        lq = log_probs(z, temperature)
        lp = lq if z_teacher is None else log_probs(z_teacher, temperature)
        fields.append(term.combine(*[c.sum(-1) for c in term.phi(lp, lq, side)]))
    stacked = jnp.stack(fields)
    value = jnp.sum(jnp.where(weights != 0, weights * stacked, 0.0))
    return value, jax.lax.stop_gradient(stacked)
