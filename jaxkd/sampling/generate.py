"""Text from a model: one pass over the prompts, then a token at a time over a cache of keys and values.

All rows stand at the same position of their texts. A row whose prompt reaches further is fed its own next token and
draws nothing yet, so that a slot is a position, the mask is one for all rows, and no row is ever padded on its left.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from jaxkd.core.types import Head, PyTree
from jaxkd.kernels.pointwise import logits
from jaxkd.models.quantized import SCALE
from jaxkd.models.transformer import Config, empty_cache, extend


class Generated(NamedTuple):
    """Prompts and what the model wrote after them."""

    tokens: Int[jax.Array, "B L"]  # 0 from a row's length on
    lengths: Int[jax.Array, " B"]  # of prompt and text, with the id that ended it
    logprobs: Float[jax.Array, "B L"]  # of the written tokens, at temperature 1; 0 elsewhere


def generate(
    config: Config,
    params: PyTree,
    prompts: Int[jax.Array | np.ndarray, "B P"],
    lengths: Int[jax.Array | np.ndarray, " B"],
    keys: Key[jax.Array, " B"],
    *,
    length: int,
    temperature: float = 1.0,
    vocab: int,
    end: int | tuple[int, ...] | None = None,
    dtype: Any = jnp.float32,
) -> Generated:
    """Goes on from each prompt up to an end or to `length` tokens: x_t ~ softmax(z(x_<t) / temperature).

    The draw at position t has the key fold_in(keys[b], t), so that a row's text depends on its prompt and key, not on
    the rows beside it or on the devices. Nothing here has a gradient.

    Args:
        config: the decoder's shape.
        params: nested dict of arrays, layers stacked on the leading axis.
        prompts: [B P], from the left; what is at and beyond a row's length is not read.
        lengths: [B], from 1 to P; inside a jitted function other values cannot be refused and are clipped.
        keys: [B], a row's own.
        length: tokens of the longest text, its prompt counted.
        temperature: 0 takes the most probable token.
        vocab: true vocabulary; ids from it on have no probability.
        end: id or ids that end a text.
        dtype: of activations, matmul operands and the cache; logits and draws are in float32.

    Raises:
        ValueError: for an empty prompt, one longer than P or `length`, a `length` beyond the model's context, a
            vocabulary that the model does not have, or a temperature below 0.
    """
    width = prompts.shape[1]
    known = not isinstance(lengths, jax.core.Tracer) and lengths.size > 0
    if width < 1 or (known and lengths.min() < 1):
        raise ValueError("an empty prompt: give each row at least one token, such as the tokenizer's start")
    if known and lengths.max() > width:
        raise ValueError(f"lengths go up to {lengths.max()}, but prompts has {width} tokens a row")
    if width > length:
        raise ValueError(f"prompts of {width} tokens do not fit into length={length}, which counts prompt and text")
    if length > config.max_length:
        raise ValueError(f"a text of {length} tokens is beyond the model's context of {config.max_length}")
    if not 1 <= vocab <= config.vocab:
        raise ValueError(f"vocab must be 1 to {config.vocab}, the model's number of ids, got {vocab}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    ends = (end,) if isinstance(end, int) else end or ()
    return _generate(config, params, prompts, lengths, keys, length, float(temperature), vocab, ends, dtype)


class _State(NamedTuple):
    text: Generated
    cache: Any
    going: jax.Array  # [B] bool: neither ended nor full


@partial(jax.jit, static_argnums=(0, 5, 6, 7, 8, 9))
def _generate(config, params, prompts, lengths, keys, length, temperature, vocab, ends, dtype) -> Generated:
    params = jax.tree_util.tree_map_with_path(partial(_operand, dtype), params)
    (batch, width), prompt = prompts.shape, jnp.clip(lengths, 1, prompts.shape[1])
    tokens = jnp.where(jnp.arange(width) < prompt[:, None], prompts, 0)
    tokens = jnp.pad(tokens, ((0, 0), (0, length - width)))
    _, cache = extend(config, params, tokens[:, :width], empty_cache(config, batch, length, dtype), dtype=dtype)

    def step(state: _State) -> _State:
        text, at = state.text, state.cache.length + 1
        last = jax.lax.dynamic_slice_in_dim(text.tokens, at - 1, 1, axis=1)
        head, cache = extend(config, params, last, state.cache, dtype=dtype)
        drawn, logprobs = _draw(head, keys, at, temperature, vocab)
        writes = state.going & (at >= prompt)
        ended = writes & jnp.isin(drawn, jnp.asarray(ends, jnp.int32))
        here = writes[:, None] & (jnp.arange(length) == at)
        text = Generated(
            jnp.where(here, drawn[:, None], text.tokens),
            jnp.where(writes, at + 1, text.lengths),
            jnp.where(here, logprobs[:, None], text.logprobs),
        )
        return _State(text, cache, state.going & ~ended)

    def more(state: _State) -> jax.Array:
        return (state.cache.length + 1 < length) & state.going.any()

    # The last token that all prompts have is run again, as the first step: its hidden state says what comes next.
    cache = cache._replace(length=prompt.min() - 1)
    text = Generated(tokens, prompt, jnp.zeros((batch, length)))
    return jax.lax.while_loop(more, step, _State(text, cache, prompt < length)).text


def _operand(dtype: Any, path: tuple, leaf: jax.Array) -> jax.Array:
    """What the decoder casts at each use, cast once before the loop; scales multiply in float32."""
    narrow = leaf.dtype == jnp.int8  # a step reads all weights once: they stay as small as they are
    return leaf if narrow or path[-1].key.endswith(("norm", SCALE)) else leaf.astype(dtype)


def _draw(head: Head, keys: jax.Array, at: jax.Array, temperature: float, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Ids [B] for position `at`, and their log-probabilities [B]."""
    z = logits(head, head.hidden[:, 0])
    z = jnp.where(jnp.arange(z.shape[1]) < vocab, z, -jnp.inf)
    if temperature:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, at)
        ids = jax.vmap(jax.random.categorical)(own, z / temperature)
    else:
        ids = jnp.argmax(z, -1)
    chosen = jnp.take_along_axis(z, ids[:, None], 1)[:, 0]
    return ids.astype(jnp.int32), chosen - jax.nn.logsumexp(z, -1)
