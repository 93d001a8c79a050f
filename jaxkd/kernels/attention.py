"""Causal attention within segments of packed rows."""

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
