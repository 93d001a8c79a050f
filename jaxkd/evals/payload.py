"""What is lost on the way from a teacher's distribution to what is stored of it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.core.types import Head, Hidden, Sampled, TopK
from jaxkd.kernels.pointwise import logits

_CHUNK = 128  # tokens at a time


def payload_kl(head: Head, payload: Hidden | TopK | Sampled, vocab: int) -> jax.Array:
    """KL in nats between a teacher and what its payload alone says, per token.

    Hidden states and top-k: KL(p || p'), where p' of a top-k payload spreads the tail's mass evenly over the other
    ids, as knowing nothing of them says. Draws: KL(p' || p) of the drawn shares, since the other way is infinite; it
    is the noise of one visit, which an unbiased loss averages out, not a bias.

    Args:
        head: the live teacher, hidden [*tokens E].
        payload: of the same tokens, as decoded.
        vocab: true vocabulary.

    Returns:
        [*tokens], on one device's worth of memory: for a few rows, not for training.
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
            there = jnp.take_along_axis(lp, jnp.clip(part.ids, 0, vocab - 1), -1)
            return jnp.sum(jnp.where(part.counts > 0, share * (jnp.log(jnp.maximum(share, 1e-30)) - there), 0.0), -1)
        if isinstance(part, Hidden):
            known = _log_probs(head, part.hidden.astype(rows.dtype), vocab)
        else:
            known = _spread(part, vocab)
        return jnp.sum(jnp.exp(lp) * (lp - known), -1)

    return jax.lax.map(block, jax.tree.map(cut, (hidden, parts))).reshape(-1)[:count].reshape(shape)


def _log_probs(head: Head, hidden: jax.Array, vocab: int) -> jax.Array:
    return jax.nn.log_softmax(logits(head, hidden)[:, :vocab])


def _spread(part: Any, vocab: int) -> jax.Array:
    """[c V] log-probabilities of a top-k payload; the stored entries get what the first tail leaves them."""
    counts = (part.ids >= 0) & (part.ids < vocab) & (part.logprobs > -jnp.inf)
    tail = jnp.minimum(part.tail[:, :1], -1e-7)
    total = jax.nn.logsumexp(part.logprobs, -1, keepdims=True, where=counts)
    lp = part.logprobs - total + jnp.log(-jnp.expm1(tail))
    others = jnp.maximum(vocab - counts.sum(-1, keepdims=True), 1)
    everywhere = jnp.broadcast_to(tail - jnp.log(others), (part.ids.shape[0], vocab))
    row = jnp.arange(part.ids.shape[0])[:, None]
    return everywhere.at[row, jnp.where(counts, part.ids, vocab)].set(lp, mode="drop")
