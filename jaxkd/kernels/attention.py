"""Causal attention: within segments of packed rows, and over a key-value cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int


def segment_attention(
    query: Float[jax.Array, "B L H d"],
    key: Float[jax.Array, "B L K d"],
    value: Float[jax.Array, "B L K d"],
    segments: Int[jax.Array, "B L"],
) -> Float[jax.Array, "B L H d"]:
    """softmax(q k^T / sqrt(d)) v over the tokens of the same segment up to each query, softmax in float32.

    H is a multiple of K (grouped queries). Padding is segment 0, so no row is empty.
    """
    length = segments.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same_segment = segments[:, :, None] == segments[:, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=(causal & same_segment)[:, None])


class Cache(NamedTuple):
    """Keys and values of the first `length` tokens of each row, a slot per position; later slots are unwritten."""

    keys: Float[jax.Array, "*layers B K S d"]
    values: Float[jax.Array, "*layers B K S d"]
    length: Int[jax.Array, " B"]


def cached_attention(
    query: Float[jax.Array, "B T H d"],
    key: Float[jax.Array, "B T K d"],
    value: Float[jax.Array, "B T K d"],
    cache: Cache,
) -> Float[jax.Array, "B T H d"]:
    """`segment_attention` of T new tokens, each over the cached tokens and the new ones up to itself.

    The cache is read where it is and the new tokens are a second block of scores, so that no copy of it is made.

    Args:
        query: [B T H d], with H a multiple of K (grouped queries).
        key: [B T K d], of the new tokens.
        value: [B T K d].
        cache: one layer's.
    """
    (batch, tokens, _, width), slots = query.shape, cache.keys.shape[2]
    grouped = query.reshape(batch, tokens, key.shape[2], -1, width) * width**-0.5
    cached = (jnp.arange(slots) < cache.length[:, None])[:, None, None, None]
    earlier = jnp.tril(jnp.ones((tokens, tokens), bool))
    scores = [
        jnp.where(visible, jnp.einsum(equation, grouped, keys, preferred_element_type=jnp.float32), -1e30)
        for equation, keys, visible in (
            ("btkgd,bksd->bkgts", cache.keys, cached),
            ("btkgd,bskd->bkgts", key, earlier),
        )
    ]
    shares = jax.nn.softmax(jnp.concatenate(scores, -1), -1).astype(value.dtype)
    before = jnp.einsum("bkgts,bksd->btkgd", shares[..., :slots], cache.values)
    after = jnp.einsum("bkgts,bskd->btkgd", shares[..., slots:], value)
    return (before + after).reshape(query.shape)
