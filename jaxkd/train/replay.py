"""The student's earlier text, drawn again: a bounded buffer and the share of rows that it and fresh text get."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core.types import Batch
from jaxkd.train.rollout import unwritten

MARGIN = 0.1  # nats by which the held-out loss must rise before the share does


class Replay(NamedTuple):
    """DistiLLM's adaptive off-policy state (arXiv 2402.03898, and its code)."""

    rows: Batch  # [N ...], the last N rows that the student wrote
    added: jax.Array  # [] int32: rows ever added; row i is at i mod N
    share: jax.Array  # [] phi, the share of rows with the student's text
    reference: jax.Array  # [] held-out loss that the next one is compared with, inf before the first
    adapted: jax.Array  # [] int32: step of the last evaluation that `share` follows, -1 before the first


def init(size: int, like: Batch, share: float) -> Replay:
    """An empty buffer of `size` rows with the fields of a batch `like` those that will be added."""
    rows = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), like._replace(aux=unwritten(like)))
    return Replay(rows, jnp.int32(0), jnp.float32(share), jnp.float32(jnp.inf), jnp.int32(-1))


def draw(replay: Replay, batch: Batch, chosen: jax.Array, keys: jax.Array) -> Batch:
    """The batch with a row of the buffer, drawn uniformly, in the place of each `chosen` [B] one; `keys` [B]."""
    count = jnp.clip(replay.added, 1, len(replay.rows.row))
    index = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys)

    def pick(stored: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(-1, *[1] * (own.ndim - 1)), stored[index], own)

    return jax.tree.map(pick, replay.rows, batch._replace(aux=unwritten(batch)))


def add(replay: Replay, batch: Batch, fresh: jax.Array) -> Replay:
    """The buffer with the `fresh` [B] rows of a batch; the oldest ones go."""
    size = len(replay.rows.row)
    last = fresh.sum() - jnp.cumsum(fresh) < size  # of more rows than there are places the last ones stay
    place = jnp.where(fresh & last, (replay.added + jnp.cumsum(fresh) - 1) % size, size)
    rows = jax.tree.map(lambda stored, new: stored.at[place].set(new, mode="drop"), replay.rows, batch)
    return replay._replace(rows=rows, added=replay.added + fresh.sum().astype(jnp.int32))


def adapt(replay: Replay, step: int, loss: float, rise: float) -> Replay:
    """The state after a step's evaluation: phi grows by `rise` where the loss is `MARGIN` nats above the reference.

    An evaluation counts once. The reference is the lowest loss since phi last grew.
    """
    if int(replay.adapted) >= step:
        return replay
    worse = loss >= float(replay.reference) + MARGIN
    share = min(1.0, float(replay.share) + rise) if worse else float(replay.share)
    reference = loss if worse else min(loss, float(replay.reference))
    new = {"share": share, "reference": reference, "adapted": step}
    like = lambda value, old: jax.device_put(jnp.asarray(value, old.dtype), old.sharding)
    return replay._replace(**{name: like(value, getattr(replay, name)) for name, value in new.items()})
