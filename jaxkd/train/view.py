"""The teacher's own view of a row: the same text in another context."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.core.types import Batch, View


def first_documents(batch: Batch) -> Batch:
    """Rows with their first document alone; what follows it is padding."""
    inside = batch.segments == 1
    one = lambda x: jnp.where(inside, x, jnp.zeros((), x.dtype))
    names = ("tokens", "targets", "weights", "segments", "positions")
    fields: Any = {name: one(getattr(batch, name)) for name in names}
    return batch._replace(**fields)


def in_context(batch: Batch, context: jax.Array, opening: jax.Array) -> Batch:
    """The batch with a view in which `context` [C] stands in the place of each row's `opening` [O], which may be empty.

    Rows are one document each. A row that does not begin with the tokens of `opening` (a chat template's default system
    prompt), such as a conversation with a system prompt of its own, is read as it is.
    """
    rows = len(batch.tokens)
    opens = (batch.tokens[:, : len(opening)] == opening).all(-1)
    sizes, dropped = (jnp.where(opens, len(ids), 0) for ids in (context, opening))
    return _viewed(batch, jnp.broadcast_to(context, (rows, len(context))), sizes, dropped)


def with_prompts(batch: Batch, prompts: jax.Array, lengths: jax.Array) -> Batch:
    """The batch with a view in which `prompts` [B C] of `lengths` [B] stand in the place of the rows' own.

    A row's prompt ends where its weights begin; rows are one document each.
    """
    weighted = batch.weights > 0
    return _viewed(batch, prompts, lengths, jnp.where(weighted.any(-1), jnp.argmax(weighted, -1) + 1, 0))


def _viewed(batch: Batch, heads: jax.Array, sizes: jax.Array, dropped: jax.Array) -> Batch:
    """The batch with a view of the first `sizes` [B] tokens of `heads` [B C], then the rows without `dropped` [B]."""
    width, length = heads.shape[1], batch.tokens.shape[1]
    shift = (sizes - dropped)[:, None]
    place = jnp.arange(width + length)
    source = place - shift  # in the row
    of_head = place < sizes[:, None]
    of_row = ~of_head & (source < length)
    at = lambda x: jnp.take_along_axis(x, jnp.clip(source, 0, length - 1), 1)
    segments = jnp.where(of_head, 1, jnp.where(of_row, at(batch.segments), 0))
    tokens = jnp.where(of_head, jnp.pad(heads, ((0, 0), (0, length))), jnp.where(of_row, at(batch.tokens), 0))
    index = jnp.clip(jnp.arange(length) + shift, 0, width + length - 1)
    return batch._replace(view=View(tokens, segments, jnp.where(segments > 0, place, 0), index))
