"""Reduces a teacher's head to a few numbers per token: its largest entries with their tail, or draws from it.

In chunks of tokens, without `[N, V]` arrays. Devices that share the vocabulary exchange candidates and sums per token,
never logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxkd.core.types import Head, Sampled, TopK
from jaxkd.kernels import mesh
from jaxkd.kernels.pointwise import Columns, columns_of, logits

_CHUNK = 256  # tokens at a time on a device


def top_k(head: Head, entries: int, temperatures: tuple[float, ...], vocab: int) -> TopK:
    """The K largest entries with their log-probabilities, and the log-mass of all others per temperature.

        tail[T] = log sum_{v not in top-k} softmax(z / T)_v

    `head` has hidden [*tokens E] and unembed [E V]; ValueError unless 1 <= entries <= vocab.
    """
    if not 1 <= entries <= vocab:
        raise ValueError(f"a top-k signal of {entries} entries needs as many ids, and the vocabulary has {vocab}")

    def reduce(columns: Columns, z: jax.Array) -> tuple[jax.Array, ...]:
        values, indices = jax.lax.top_k(z, min(entries, z.shape[1]))
        ids = columns.ids[indices]
        if columns.axis is not None:
            values, ids = (jax.lax.all_gather(x, columns.axis, axis=1, tiled=True) for x in (values, ids))
            values, best = jax.lax.top_k(values, entries)
            ids = jnp.take_along_axis(ids, best, 1)
        row = jnp.arange(z.shape[0])[:, None]
        others = z.at[row, columns.local(ids)].set(-jnp.inf, mode="drop")
        # Subtract the largest logit first, so that large logits lose no precision.
        top = columns.max(z)[:, None]
        z, others = z - top, others - top
        tails = [_log_sum(columns, others / t) - _log_sum(columns, z / t) for t in temperatures]
        return ids, (values - top) - _log_sum(columns, z)[:, None], jnp.stack(tails, -1)

    return TopK(*_chunked(reduce, head, vocab, ()))


def draw(head: Head, uniforms: Float[jax.Array, "*tokens N"], vocab: int) -> Sampled:
    """N draws with replacement from the distribution at temperature 1, by inversion: exact up to float32 sums.

    `uniforms` in [0, 1), one per draw; `head` has hidden [*tokens E] and unembed [E V].
    """

    def reduce(columns: Columns, z: jax.Array, uniform: jax.Array) -> tuple[jax.Array, ...]:
        cumulative = jnp.cumsum(jnp.exp(z - columns.max(z)[:, None]), -1)
        local_mass = total_mass = cumulative[:, -1:]
        if columns.axis is not None:
            device_cumulative = jnp.cumsum(jax.lax.all_gather(local_mass, columns.axis, axis=1, tiled=True), -1)
            total_mass = device_cumulative[:, -1:]
        # Below the total mass even if the product rounds up, so that an entry without mass is never drawn.
        goal = jnp.minimum(uniform * total_mass, jnp.nextafter(total_mass, 0.0))
        if columns.axis is None:
            return _unique_counts(columns.ids[_inverse_cdf(cumulative, goal)])
        # All devices find the owner of a draw from the same numbers, so that it is unique: comparing `goal` minus the
        # mass of earlier devices with a device's own mass would round differently on both sides of an edge.
        owner, device = _inverse_cdf(device_cumulative, goal), jax.lax.axis_index(columns.axis)
        before = jnp.where(device > 0, device_cumulative[:, device - 1], 0.0)[:, None]
        local_ids = columns.ids[_inverse_cdf(cumulative, goal - before)]
        return _unique_counts(columns.total(jnp.where(owner == device, local_ids, 0)))

    return Sampled(*_chunked(reduce, head, vocab, (uniforms,)))


def _inverse_cdf(cumulative: jax.Array, goal: jax.Array) -> jax.Array:
    """Indices [c N] of the first entries whose cumulative sums [c v] exceed goals [c N], clipped below the last sum."""
    goal = jnp.clip(goal, 0.0, jnp.nextafter(cumulative[:, -1:], 0.0))
    return jax.vmap(partial(jnp.searchsorted, side="right"))(cumulative, goal)


def _unique_counts(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unique ids and their counts [c N]; unused slots are -1 with a count of 0."""
    ids = jnp.sort(ids, -1)
    new = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], -1)
    slot, row = jnp.cumsum(new, -1) - 1, jnp.arange(ids.shape[0])[:, None]
    counts = jnp.zeros_like(ids).at[row, slot].add(1)
    return jnp.full_like(ids, -1).at[row, slot].set(ids), counts


def _log_sum(columns: Columns, z: jax.Array) -> jax.Array:
    """log sum exp over the whole vocabulary, [c v] -> [c]; -inf if all entries are."""
    top = columns.max(z)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.log(columns.sum(jnp.exp(z - top[:, None]))) + top


def _chunked(reduce: Callable[..., tuple], head: Head, vocab: int, per_token: tuple[jax.Array, ...]) -> tuple:
    """`each(columns, z [c v], *per_token)` over all tokens: arrays [*tokens n]."""
    shape = head.hidden.shape[:-1]
    flat = head._replace(hidden=mesh.flatten(head.hidden, shape))
    rows = [mesh.flatten(x, shape) for x in per_token]

    def body(tokens: Any, axis: str | None, head: Head, *rows: jax.Array) -> tuple:
        columns = columns_of(vocab, head.unembed.shape[1], axis)
        count = head.hidden.shape[0]
        blocks = -(-count // min(_CHUNK, count))
        size = -(-count // blocks)

        def cut(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, blocks * size - count), (0, 0)]).reshape(blocks, size, -1)

        def block(xs: tuple) -> tuple:
            hidden, *extra = xs
            return reduce(columns, columns.mask(logits(head, hidden), -jnp.inf), *extra)

        outputs_by_chunk = jax.lax.map(block, jax.tree.map(cut, (head.hidden, *rows)))
        return tuple(x.reshape(-1, x.shape[-1])[:count] for x in outputs_by_chunk)

    outputs = ("hidden",) * (2 if per_token else 3)
    outputs_by_chunk = mesh.run(body, [("signal", flat), *[("hidden", x) for x in rows]], outputs)
    return tuple(mesh.unflatten(x, shape) for x in outputs_by_chunk)
