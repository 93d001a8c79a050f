"""The error of a stored signal, in nats from the teacher's distribution."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.core.types import Head, Hidden, Sampled, TopK
from jaxkd.kernels.pointwise import logits

_CHUNK = 128  # tokens at a time


def payload_kl(head: Head, payload: Hidden | TopK | Sampled, vocab: int) -> jax.Array:
    """KL [*tokens] in nats between a teacher p and the distribution p' of its decoded payload.

    Hidden states and top-k: KL(p || p'), where p' of a top-k payload spreads the tail's mass evenly over all other
    ids. Draws: KL(p' || p) of the drawn shares, since KL(p || p') is infinite; it measures the noise of one epoch,
    which an unbiased loss averages out. `head` has hidden [*tokens E]. Dense over the vocabulary: not for training.
    """
    shape = head.hidden.shape[:-1]
    flat = lambda x: x.reshape(-1, x.shape[-1])
    hidden, parts = flat(head.hidden), jax.tree.map(flat, payload)
    count = hidden.shape[0]
    blocks = -(-count // _CHUNK)
    cut = lambda x: jnp.pad(x, [(0, blocks * _CHUNK - count), (0, 0)]).reshape(blocks, _CHUNK, -1)

    def block(xs: tuple) -> jax.Array:
        rows, part = xs
        lp = _log_probs(head, rows, vocab)
        if isinstance(part, Sampled):
            share = part.counts / jnp.maximum(part.counts.sum(-1, keepdims=True), 1)
            drawn = jnp.take_along_axis(lp, jnp.clip(part.ids, 0, vocab - 1), -1)
            return jnp.sum(jnp.where(part.counts > 0, share * (jnp.log(jnp.maximum(share, 1e-30)) - drawn), 0.0), -1)
        if isinstance(part, Hidden):
            stored = _log_probs(head, part.hidden.astype(rows.dtype), vocab)
        else:
            stored = _spread(part, vocab)
        return jnp.sum(jnp.exp(lp) * (lp - stored), -1)

    return jax.lax.map(block, jax.tree.map(cut, (hidden, parts))).reshape(-1)[:count].reshape(shape)


def _log_probs(head: Head, hidden: jax.Array, vocab: int) -> jax.Array:
    return jax.nn.log_softmax(logits(head, hidden)[:, :vocab])


def _spread(part: Any, vocab: int) -> jax.Array:
    """[c V] log-probabilities of a top-k payload; the entries share the mass that the first tail leaves."""
    counts = (part.ids >= 0) & (part.ids < vocab) & (part.logprobs > -jnp.inf)
    tail = jnp.minimum(part.tail[:, :1], -1e-7)
    total = jax.nn.logsumexp(part.logprobs, -1, keepdims=True, where=counts)
    lp = part.logprobs - total + jnp.log(-jnp.expm1(tail))
    others = jnp.maximum(vocab - counts.sum(-1, keepdims=True), 1)
    everywhere = jnp.broadcast_to(tail - jnp.log(others), (part.ids.shape[0], vocab))
    row = jnp.arange(part.ids.shape[0])[:, None]
    return everywhere.at[row, jnp.where(counts, part.ids, vocab)].set(lp, mode="drop")
