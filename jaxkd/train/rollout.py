"""Rollouts: rows continued by a model, in a separate program before the step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core.types import Batch, PyTree
from jaxkd.sampling.generate import rows
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.sampler import Decoder, Sampler
from jaxkd.train.step import split

DATA, STUDENT, TEACHER = range(3)
"""Who wrote a row's text: `Batch.aux["author"]`."""
LOGPROBS = ("old_logprob", "drawn_logprob")
"""Arrays [B L] of `Batch.aux`: log-probability of each target under the model, and as it was drawn."""

_PLAIN = Sampling()


class Limits(NamedTuple):
    """What of a row is kept, and how much is written."""

    prompt: int = 0  # tokens of the first document; 0: up to its first token with a weight
    length: int = 0  # most new tokens; 0: up to the row's end


def row_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """fold_in(fold_in(key, domain), row) of each row: independent of the batch and the devices. `key` [] or [B]."""
    one = lambda key, domain, row: jax.random.fold_in(jax.random.fold_in(key, domain), row)
    return jax.vmap(one, (0 if key.ndim else None, 0, 0))(key, batch.domain, batch.row)


def prompts(batch: Batch, limits: Limits) -> tuple[jax.Array, jax.Array]:
    """Prompts [B P] of rows, at the beginning of each, and their lengths [B], at least 1."""
    length = batch.tokens.shape[1]
    width = min(limits.prompt or length - 1, length - 1)
    first = batch.segments == 1
    if limits.prompt:
        lengths = first[:, :width].sum(-1)
    else:  # the target of the last token of a prompt has a weight
        weighted = first & (batch.weights > 0)
        lengths = jnp.where(weighted.any(-1), jnp.argmax(weighted, -1) + 1, first.sum(-1))
    return batch.tokens[:, :width], jnp.clip(lengths, 1, width)


def rollout(
    decoder: Decoder,
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    *,
    limits: Limits,
    vocab: int,
    sampling: Sampling = _PLAIN,
    ends: tuple[int, ...] = (),
    author: int = TEACHER,
    chosen: jax.Array | None = None,
    micro_batches: int = 1,
) -> Batch:
    """Each row's prompt, continued by a model up to an end token or the limit; to be jitted.

    The continuation is one document with weight 1 on every generated token and 0 on the prompt. A row is sampled with
    fold_in(fold_in(key, domain), row): with key = fold_in(seed, step) its text depends on neither the batch nor the
    devices, and a resumed run generates it again. Not differentiated.

    Args:
        decoder: of the generating model, the teacher (Kim and Rush 2016, arXiv 1606.07947) or the student.
        params: its parameters.
        batch: rows, whose first document begins with the prompt.
        key: of the batch, or [B] the rows' own.
        limits: of prompt and text.
        vocab: true vocabulary size.
        sampling: temperature and cut-offs of the draws.
        ends: end tokens.
        author: of these rows, for `aux["author"]`.
        chosen: [B] bool, rows to continue; the others keep their text. None: all.
        micro_batches: parts of the batch that are generated one after another, to save memory.

    Returns the batch with `LOGPROBS` and `author` in `aux`, those of earlier rollouts kept where not `chosen`.
    """

    def write(part: tuple[Batch, jax.Array, jax.Array]) -> Batch:
        batch, chosen, keys = part
        length = batch.tokens.shape[1]
        tokens, lengths = prompts(batch, limits)
        room = min(limits.length or length - 1, length - 1)
        sampler = Sampler(decoder, vocab, room, sampling, ends)
        most = jnp.where(chosen, jnp.minimum(length - lengths, room), 0)
        text = rows(sampler, params, tokens, lengths, keys, length, most)
        index = jnp.arange(length)
        inside, follows = index < text.lengths[:, None], index + 1 < text.lengths[:, None]
        # Like `targets`, they are of the token after.
        after = {name: jnp.where(follows, jnp.roll(x, -1, 1), 0) for name, x in zip(LOGPROBS, text[2:], strict=True)}
        own = chosen[:, None]
        written = {
            "tokens": jnp.where(inside, text.tokens, 0),
            "targets": jnp.where(follows, jnp.roll(text.tokens, -1, 1), 0),
            "weights": (follows & (index + 1 >= lengths[:, None])).astype(jnp.float32),
            "segments": inside.astype(jnp.int32),
            "positions": jnp.where(inside, index, 0),
        }
        aux = unwritten(batch)
        aux |= {name: jnp.where(own, x, aux[name]) for name, x in after.items()}
        aux["author"] = jnp.where(chosen, author, aux["author"])
        changed: Any = {name: jnp.where(own, x, getattr(batch, name)) for name, x in written.items()}
        return batch._replace(**changed, aux=aux)

    keys = row_keys(key, batch) if key.ndim == 0 else key
    part = (batch, jnp.ones(len(batch.row), bool) if chosen is None else chosen, keys)
    if micro_batches == 1:
        return write(part)
    written = jax.lax.map(write, split(part, micro_batches))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), written)


def unwritten(batch: Batch) -> dict[str, jax.Array]:
    """`batch.aux` with the arrays of a rollout: zeros, and the data as author, where it has none yet."""
    zeros = jnp.zeros(batch.tokens.shape)
    return {**dict.fromkeys(LOGPROBS, zeros), "author": jnp.full(len(batch.row), DATA, jnp.int32)} | batch.aux
