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
    """Keys and values of the first `length` tokens, one slot per position; later slots are unused."""

    keys: Float[jax.Array, "*layers B S K d"]
    values: Float[jax.Array, "*layers B S K d"]
    length: Int[jax.Array, ""]


def cached_attention(
    query: Float[jax.Array, "B T H d"],
    key: Float[jax.Array, "B T K d"],
    value: Float[jax.Array, "B T K d"],
    cache: Cache,
) -> Float[jax.Array, "B T H d"]:
    """`segment_attention` of T new tokens, each over the cached tokens and the new ones up to itself.

    `cache` is one layer's, with at least T free slots; `key` and `value` are inserted into a copy of it.
    """
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, new, cache.length, axis=1)
        for old, new in ((cache.keys, key), (cache.values, value))
    )
    visible = jnp.arange(keys.shape[1]) <= cache.length + jnp.arange(query.shape[1])[:, None]
    return jax.nn.dot_product_attention(query, keys, values, mask=visible[None, None])
