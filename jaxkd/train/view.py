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
    """The batch with a view in which `context` [C] stands before each row, or in the place of its `opening` [O].

    Rows are one document each. A row that begins with the tokens of `opening` (such as a chat template's default system
    prompt) has them replaced; any other has the context before it.
    """
    size, length = len(context), batch.tokens.shape[1]
    opens = (batch.tokens[:, : len(opening)] == opening).all(-1)
    shift = (size - jnp.where(opens, len(opening), 0))[:, None]
    place = jnp.arange(size + length)
    source = place - shift  # in the row
    inside = place >= size
    at = lambda x: jnp.take_along_axis(x, jnp.clip(source, 0, length - 1), 1)
    in_row = inside & (source < length)
    segments = jnp.where(in_row, at(batch.segments), jnp.where(inside, 0, 1))
    own = jnp.where(inside, jnp.where(in_row, at(batch.tokens), 0), jnp.pad(context, (0, length)))
    view = View(
        own,
        segments,
        jnp.where(segments > 0, place, 0),
        jnp.broadcast_to(jnp.clip(jnp.arange(length) + shift, 0, size + length - 1), batch.tokens.shape),
    )
    return batch._replace(view=view)
