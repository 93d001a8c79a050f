"""Completions of token sequences, for user programs."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxkd.core.types import PyTree
from jaxkd.models.transformer import CausalLM
from jaxkd.sampling import generate as sampler

_STEP = 16  # prompts are padded to a multiple, so that similar lengths share a compiled program


def generate(
    forward: CausalLM,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    vocab: int | None = None,
    end: int | tuple[int, ...] | None = None,
) -> list[np.ndarray]:
    """A completion of each prompt, without the prompt: x_t ~ softmax(z(x_<t) / temperature).

    Returns int32 [n] ids per prompt. Rows are sampled together but independently: a prompt's randomness follows from
    the seed and its index in the list.

    Args:
        forward: the model, of `load_model`.
        prompts: token ids, at least one each.
        max_new_tokens: also limited by the model's context.
        temperature: 0 is greedy.
        vocab: the tokenizer's `vocab`; later ids are never sampled. None: the model's own.
        end: id or ids that end a completion; they are its last token.

    Raises ValueError: an empty prompt, or one that leaves no room in the model's context.
    """
    config = forward.config
    sizes = np.asarray([len(prompt) for prompt in prompts], np.int32)
    width = min(-(-int(sizes.max(initial=1)) // _STEP) * _STEP, config.max_length)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(len(prompts)))
    text = sampler.generate(
        config,
        params,
        padded,
        sizes,
        keys,
        length=min(width + max_new_tokens, config.max_length),
        temperature=temperature,
        vocab=config.vocab if vocab is None else vocab,
        end=end,
        dtype=forward.dtype,
    )
    tokens, ends = np.asarray(text.tokens), np.asarray(text.lengths)
    return [row[size : min(stop, size + max_new_tokens)] for row, size, stop in zip(tokens, sizes, ends, strict=True)]
