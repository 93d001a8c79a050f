"""Rollouts: rows continued by a model, in a program of its own before the step."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxkd.core.types import Batch, PyTree
from jaxkd.sampling.generate import Decoder, sample
from jaxkd.train.step import split


def rollout(
    decoder: Decoder,
    params: PyTree,
    prompts: Batch,
    key: jax.Array,
    *,
    prompt: int,
    vocab: int,
    temperature: float = 1.0,
    end: int | None = None,
    micro_batches: int = 1,
) -> Batch:
    """Each row's first tokens, continued by a model up to its end token or the row's length; to be jitted.

    The continuation is one document with weight 1 on every token that the model wrote and 0 on the prompt. A row is
    drawn with fold_in(fold_in(key, domain), row): with key = fold_in(seed, step) its text depends on neither the batch
    nor the devices, and a resumed run draws it again. Nothing here is differentiated.

    Args:
        decoder: of the model that writes, the teacher (Kim and Rush 2016, arXiv 1606.07947) or the student.
        params: its parameters.
        prompts: rows, whose first document is read.
        key: of the batch.
        prompt: tokens of the first document that are kept.
        vocab: true vocabulary size.
        temperature: of the draws; 0 is greedy.
        end: the token that ends a text.
        micro_batches: parts of the batch that are written one after another, to save memory.
    """
    write = partial(_write, decoder, params, key=key, prompt=prompt, vocab=vocab, temperature=temperature, end=end)
    if micro_batches == 1:
        return write(prompts)
    written = jax.lax.map(write, split(prompts, micro_batches))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), written)


def _write(
    decoder: Decoder, params: PyTree, batch: Batch, *, key: jax.Array, prompt: int, vocab: int, temperature: float,
    end: int | None,
) -> Batch:  # fmt: skip
    length = batch.tokens.shape[1]
    width = min(prompt, length - 1)
    kept = jnp.maximum((batch.segments[:, :width] == 1).sum(-1), 1)
    keys = jax.vmap(lambda domain, row: jax.random.fold_in(jax.random.fold_in(key, domain), row))(
        batch.domain, batch.row
    )
    ends = () if end is None else (end,)
    text = sample(
        decoder, params, batch.tokens[:, :width], kept, keys, length=length, temperature=temperature, vocab=vocab,
        ends=ends,
    )  # fmt: skip
    index = jnp.arange(length)
    inside, follows = index < text.lengths[:, None], index + 1 < text.lengths[:, None]
    return batch._replace(
        tokens=jnp.where(inside, text.tokens, 0),
        targets=jnp.where(follows, jnp.roll(text.tokens, -1, 1), 0),
        weights=(follows & (index + 1 >= kept[:, None])).astype(jnp.float32),
        segments=inside.astype(jnp.int32),
        positions=jnp.where(inside, index, 0),
    )
