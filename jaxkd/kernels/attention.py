"""Causal attention: within segments of packed rows, and over a key-value cache."""

from typing import Any, NamedTuple

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

    keys: Any  # [*layers B K S d], or a tuple of [1 B K S d]: a slice of one array would be copied on a CPU
    values: Any
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
    (batch, tokens, heads, width), (_, kv_heads, slots, _) = query.shape, cache.keys.shape
    group = heads // kv_heads
    # All queries of a key's head are one axis: with an axis of one token XLA's products on CPUs take twice as long.
    grouped = query.reshape(batch, tokens, kv_heads, group, width).swapaxes(1, 2) * width**-0.5
    grouped = grouped.reshape(batch, kv_heads, tokens * group, width)
    cached = (jnp.arange(slots) < cache.length[:, None])[:, None, None]
    earlier = jnp.repeat(jnp.tril(jnp.ones((tokens, tokens), bool)), group, 0)
    scores = [
        jnp.where(visible, jnp.einsum(equation, grouped, keys, preferred_element_type=jnp.float32), -1e30)
        for equation, keys, visible in (
            ("bkqd,bksd->bkqs", cache.keys, cached),
            ("bkqd,bskd->bkqs", key, earlier),
        )
    ]
    shares = jax.nn.softmax(jnp.concatenate(scores, -1), -1).astype(value.dtype)
    before = jnp.einsum("bkqs,bksd->bkqd", shares[..., :slots], cache.values)
    after = jnp.einsum("bkqs,bskd->bkqd", shares[..., slots:], value)
    return (before + after).reshape(batch, kv_heads, tokens, group, width).swapaxes(1, 2).reshape(query.shape)
