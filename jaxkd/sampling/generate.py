"""Rows of prompt and completion in one array."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from jaxkd.core.types import PyTree
from jaxkd.models.transformer import Config
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.sampler import Sampler, decoder, sample


class Generated(NamedTuple):
    """Prompts with their completions."""

    tokens: Int[jax.Array, "B L"]  # 0 from a row's length on
    lengths: Int[jax.Array, " B"]  # of prompt and completion, end token included
    logprobs: Float[jax.Array, "B L"]  # of sampled tokens, at temperature 1; 0 elsewhere
    drawn_logprobs: Float[jax.Array, "B L"]  # under the distribution that they were drawn from


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

    The t-th token after prompt b uses the key fold_in(keys[b], t), so a row's completion depends on its prompt and key
    only, not on the other rows or on the devices. Not differentiable.

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
    sampler = Sampler(decoder(config, dtype), vocab, length - 1, Sampling(temperature), ends)
    return rows(sampler, params, prompts, lengths, keys, length)


def rows(
    sampler: Sampler,
    params: PyTree,
    prompts: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    length: int,
    limits: jax.Array | None = None,
) -> Generated:
    """Each prompt [B P] with its completion in a row of `length` tokens; lengths are clipped to [1, P].

    `limits` [B] are of the completions; None: up to the row's end.
    """
    width = prompts.shape[1]
    prompt = jnp.clip(lengths, 1, width)
    text = sample(sampler, params, prompts, prompt, keys, length - prompt if limits is None else limits)
    place = jnp.arange(length) - prompt[:, None]  # in the completion
    inside = (place >= 0) & (place < text.lengths[:, None])
    of = lambda x: jnp.where(inside, jnp.take_along_axis(x, jnp.clip(place, 0, x.shape[1] - 1), 1), 0)
    given = jnp.where(place < 0, jnp.pad(prompts, ((0, 0), (0, length - width))), 0)
    return Generated(given + of(text.tokens), prompt + text.lengths, of(text.logprobs), of(text.drawn_logprobs))
