"""Autoregressive sampling: one forward pass over the prompts, then one token at a time with a key-value cache.

All rows decode at the same position; a row with a longer prompt is fed its next prompt token instead of a sample. So a
cache slot is a position, one mask serves all rows, and prompts need no left padding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from jaxkd.core.sharding import RULES, Rules, table
from jaxkd.core.types import Head, PyTree
from jaxkd.kernels.pointwise import logits
from jaxkd.models.quantized import SCALE
from jaxkd.models.transformer import Config, empty_cache, extend


class Decoder(NamedTuple):
    """A model as used by the sampler: the counterpart of `Forward` for one token at a time.

    `prefill(params, tokens [B P], slots) -> cache` of all P tokens with `slots` slots; `cache.length` may be reduced.
    `decode(params, tokens [B 1], cache) -> (head with hidden [B 1 D], cache)`: the next token of every row.
    `prepare(params) -> params`: their parameters, computed once before the loop.
    """

    prefill: Callable[[PyTree, jax.Array, int], Any]
    decode: Callable[[PyTree, jax.Array, Any], tuple[Head, Any]]
    prepare: Callable[[PyTree], PyTree] = lambda params: params


def decoder(config: Config, dtype: Any = jnp.float32, rules: Rules = RULES) -> Decoder:
    """The `Decoder` of a transformer, with `rules` the sharding table of its parameters and activations."""

    def prefill(params: PyTree, tokens: jax.Array, slots: int) -> Any:
        with table(rules):
            return extend(config, params, tokens, empty_cache(config, tokens.shape[0], slots, dtype), dtype=dtype)[1]

    def decode(params: PyTree, tokens: jax.Array, cache: Any) -> tuple[Head, Any]:
        with table(rules):
            return extend(config, params, tokens, cache, dtype=dtype)

    return Decoder(prefill, decode, partial(jax.tree_util.tree_map_with_path, partial(_operand, dtype)))


class Generated(NamedTuple):
    """Prompts with their completions."""

    tokens: Int[jax.Array, "B L"]  # 0 from a row's length on
    lengths: Int[jax.Array, " B"]  # of prompt and completion, end token included
    logprobs: Float[jax.Array, "B L"]  # of sampled tokens, at temperature 1; 0 elsewhere


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
    """Samples a completion of each prompt: x_t ~ softmax(z(x_<t) / temperature), up to an end token or `length`.

    Position t of row b uses the key fold_in(keys[b], t), so a row's completion depends on its prompt and key only, not
    on the other rows or on the devices. Not differentiable.

    Args:
        prompts: [B P], left-aligned; tokens from a row's length on are ignored.
        lengths: [B], from 1 to P; clipped to that range under `jit`, where it cannot be checked.
        keys: [B], one per row.
        length: maximum tokens of prompt and completion together.
        temperature: 0 is greedy.
        vocab: true vocabulary; later ids are never sampled.
        end: id or ids that end a completion.
        dtype: of activations, matmul operands and the cache; logits and sampling are float32.

    Raises ValueError: an empty prompt, a prompt longer than P or `length`, a `length` beyond the model's context, a
    `vocab` beyond the model's, or a negative temperature.
    """
    width = prompts.shape[1]
    concrete = not isinstance(lengths, jax.core.Tracer) and lengths.size > 0
    if width < 1 or (concrete and lengths.min() < 1):
        raise ValueError("an empty prompt: give each row at least one token, such as the tokenizer's start")
    if concrete and lengths.max() > width:
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


@partial(jax.jit, static_argnums=(0, 5, 6, 7, 8, 9))
def _generate(config, params, prompts, lengths, keys, length, temperature, vocab, ends, dtype) -> Generated:
    options = {"length": length, "temperature": temperature, "vocab": vocab, "ends": ends}
    return sample(decoder(config, dtype), params, prompts, lengths, keys, **options)


class _State(NamedTuple):
    text: Generated
    cache: Any
    active: jax.Array  # [B] bool: no end token yet, and shorter than `length`


def sample(
    decoder: Decoder,
    params: PyTree,
    prompts: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    length: int,
    temperature: float,
    vocab: int,
    ends: tuple[int, ...] = (),
) -> Generated:
    """`generate` with any `Decoder`, for use under `jit`: lengths are clipped to [1, P], nothing else is checked."""
    params = decoder.prepare(params)
    (batch, width), prompt = prompts.shape, jnp.clip(lengths, 1, prompts.shape[1])
    tokens = jnp.where(jnp.arange(width) < prompt[:, None], prompts, 0)
    tokens = jnp.pad(tokens, ((0, 0), (0, length - width)))
    cache = decoder.prefill(params, tokens[:, :width], length)

    def step(state: _State) -> _State:
        text, at = state.text, state.cache.length + 1
        last = jax.lax.dynamic_slice_in_dim(text.tokens, at - 1, 1, axis=1)
        head, cache = decoder.decode(params, last, state.cache)
        drawn, logprobs = _draw(head, keys, at, temperature, vocab)
        writes = state.active & (at >= prompt)
        ended = writes & jnp.isin(drawn, jnp.asarray(ends, jnp.int32))
        here = writes[:, None] & (jnp.arange(length) == at)
        text = Generated(
            jnp.where(here, drawn[:, None], text.tokens),
            jnp.where(writes, at + 1, text.lengths),
            jnp.where(here, logprobs[:, None], text.logprobs),
        )
        return _State(text, cache, state.active & ~ended)

    def more(state: _State) -> jax.Array:
        return (state.cache.length + 1 < length) & state.active.any()

    # The first step recomputes the last position of the shortest prompt, which predicts the first sample.
    cache = cache._replace(length=prompt.min() - 1)
    text = Generated(tokens, prompt, jnp.zeros((batch, length)))
    return jax.lax.while_loop(more, step, _State(text, cache, prompt < length)).text


def _operand(dtype: Any, path: tuple, leaf: jax.Array) -> jax.Array:
    """A parameter cast to the compute dtype once, before the loop; norms and int8 scales stay float32."""
    quantized = leaf.dtype == jnp.int8  # decoding is bound by reading the weights, so int8 stays int8
    return leaf if quantized or path[-1].key.endswith(("norm", SCALE)) else leaf.astype(dtype)


def _draw(head: Head, keys: jax.Array, at: jax.Array, temperature: float, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Sampled ids [B] at position `at`, and their log-probabilities [B]."""
    z = logits(head, head.hidden[:, 0])
    z = jnp.where(jnp.arange(z.shape[1]) < vocab, z, -jnp.inf)
    if temperature:
        row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, at)
        ids = jax.vmap(jax.random.categorical)(row_keys, z / temperature)
    else:
        ids = jnp.argmax(z, -1)
    return ids.astype(jnp.int32), jnp.take_along_axis(jax.nn.log_softmax(z, -1), ids[:, None], 1)[:, 0]
