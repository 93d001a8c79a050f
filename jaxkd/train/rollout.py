"""Rollouts: rows continued by a model, in a separate program before the step."""

import jax
import jax.numpy as jnp

from jaxkd.core.types import Batch, PyTree
from jaxkd.sampling.generate import rows
from jaxkd.sampling.law import Sampling
from jaxkd.sampling.sampler import Decoder, Sampler
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

    The continuation is one document with weight 1 on every generated token and 0 on the prompt. A row is sampled with
    fold_in(fold_in(key, domain), row): with key = fold_in(seed, step) its text depends on neither the batch nor the
    devices, and a resumed run generates it again. Not differentiated.

    Args:
        decoder: of the generating model, the teacher (Kim and Rush 2016, arXiv 1606.07947) or the student.
        params: its parameters.
        prompts: rows, whose first document is the prompt.
        key: of the batch.
        prompt: number of tokens of the first document that are kept.
        vocab: true vocabulary size.
        temperature: 0 is greedy.
        end: end token.
        micro_batches: parts of the batch that are generated one after another, to save memory.
    """

    def write(batch: Batch) -> Batch:
        length = batch.tokens.shape[1]
        width = min(prompt, length - 1)
        lengths = jnp.maximum((batch.segments[:, :width] == 1).sum(-1), 1)
        row_key = lambda domain, row: jax.random.fold_in(jax.random.fold_in(key, domain), row)
        keys = jax.vmap(row_key)(batch.domain, batch.row)
        sampler = Sampler(decoder, vocab, length - 1, Sampling(temperature), () if end is None else (end,))
        text = rows(sampler, params, batch.tokens[:, :width], lengths, keys, length)
        index = jnp.arange(length)
        inside, follows = index < text.lengths[:, None], index + 1 < text.lengths[:, None]
        return batch._replace(
            tokens=jnp.where(inside, text.tokens, 0),
            targets=jnp.where(follows, jnp.roll(text.tokens, -1, 1), 0),
            weights=(follows & (index + 1 >= lengths[:, None])).astype(jnp.float32),
            segments=inside.astype(jnp.int32),
            positions=jnp.where(inside, index, 0),
        )

    if micro_batches == 1:
        return write(prompts)
    written = jax.lax.map(write, split(prompts, micro_batches))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), written)
