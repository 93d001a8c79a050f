"""Causal attention: within segments of packed rows, and over a cache of the tokens before."""

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
    """softmax(q k^T / sqrt(d)) v over the earlier tokens of the same segment, softmax in float32.

    Args:
        query: [B L H d], with H a multiple of K (grouped queries).
        key: [B L K d].
        value: [B L K d].
        segments: [B L]; padding is a segment of its own (0), so that no row is empty.
    """
    length = segments.shape[1]
    earlier = jnp.tril(jnp.ones((length, length), bool))
    same = segments[:, :, None] == segments[:, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=(earlier & same)[:, None])


class Cache(NamedTuple):
    """Keys and values of rows' first `length` tokens, a slot per position; later slots are yet to be written."""

    keys: Float[jax.Array, "*layers B S K d"]
    values: Float[jax.Array, "*layers B S K d"]
    length: Int[jax.Array, ""]


def cached_attention(
    query: Float[jax.Array, "B T H d"],
    key: Float[jax.Array, "B T K d"],
    value: Float[jax.Array, "B T K d"],
    cache: Cache,
) -> Float[jax.Array, "B T H d"]:
    """`segment_attention` of the T tokens that follow those in one layer's cache, each over all before it.

    Args:
        query: [B T H d], with H a multiple of K (grouped queries).
        key: [B T K d], the new tokens' own; put into a copy of the cache's slots, not into the cache.
        value: [B T K d].
        cache: one layer's, with at least T slots left.
    """
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, new, cache.length, axis=1)
        for old, new in ((cache.keys, key), (cache.values, value))
    )
    earlier = jnp.arange(keys.shape[1]) <= cache.length + jnp.arange(query.shape[1])[:, None]
    return jax.nn.dot_product_attention(query, keys, values, mask=earlier[None, None])
