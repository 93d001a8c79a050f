"""From a teacher's head to a few numbers per token: its largest entries with their tail, or draws from it.

In chunks of tokens, so that no `[N, V]` exists. Where the vocabulary is split over devices, they exchange candidates
and sums per token, never logits.
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
    """The largest entries with their true log-probabilities, and the log-mass of all others per temperature.

        tail[T] = log sum_{v not in top-k} softmax(z / T)_v

    Args:
        head: hidden [*tokens E], unembed [E V].
        entries: K, at most `vocab`.
        temperatures: T of each tail.
        vocab: true vocabulary.

    Raises:
        ValueError: more entries than there are ids.
    """
    if not 1 <= entries <= vocab:
        raise ValueError(f"a top-k signal of {entries} entries needs as many ids, and the vocabulary has {vocab}")

    def chosen(columns: Columns, z: jax.Array) -> tuple[jax.Array, ...]:
        values, place = jax.lax.top_k(z, min(entries, z.shape[1]))
        ids = columns.ids[place]
        if columns.axis is not None:
            values, ids = (jax.lax.all_gather(x, columns.axis, axis=1, tiled=True) for x in (values, ids))
            values, best = jax.lax.top_k(values, entries)
            ids = jnp.take_along_axis(ids, best, 1)
        row = jnp.arange(z.shape[0])[:, None]
        others = z.at[row, columns.local(ids)].set(-jnp.inf, mode="drop")
        # Relative to the largest logit before anything is divided or added, so that large logits round no worse.
        top = columns.max(z)[:, None]
        z, others = z - top, others - top
        tails = [_log_sum(columns, others / t) - _log_sum(columns, z / t) for t in temperatures]
        return ids, (values - top) - _log_sum(columns, z)[:, None], jnp.stack(tails, -1)

    return TopK(*_chunked(chosen, head, vocab, ()))


def draw(head: Head, uniforms: Float[jax.Array, "*tokens N"], vocab: int) -> Sampled:
    """N draws with replacement from the distribution at temperature 1, by inversion: exact up to float32 sums.

    Args:
        head: hidden [*tokens E], unembed [E V].
        uniforms: in [0, 1), one a draw.
        vocab: true vocabulary.
    """

    def drawn(columns: Columns, z: jax.Array, uniform: jax.Array) -> tuple[jax.Array, ...]:
        up_to = jnp.cumsum(jnp.exp(z - columns.max(z)[:, None]), -1)
        mass = whole = up_to[:, -1:]
        if columns.axis is not None:
            edges = jnp.cumsum(jax.lax.all_gather(mass, columns.axis, axis=1, tiled=True), -1)
            whole = edges[:, -1:]
        # Below the whole mass even when the product rounds up, so that an entry without mass is never drawn.
        goal = jnp.minimum(uniform * whole, jnp.nextafter(whole, 0.0))
        if columns.axis is None:
            return _counted(columns.ids[_place(up_to, goal)])
        # Every device finds the owner of a draw from the same numbers, so that it has exactly one: comparing `goal`
        # less the mass before a device with that device's own mass rounds differently on either side of an edge.
        owner, device = _place(edges, goal), jax.lax.axis_index(columns.axis)
        before = jnp.where(device > 0, edges[:, device - 1], 0.0)[:, None]
        here = columns.ids[_place(up_to, goal - before)]
        return _counted(columns.total(jnp.where(owner == device, here, 0)))

    return Sampled(*_chunked(drawn, head, vocab, (uniforms,)))


def _place(up_to: jax.Array, goal: jax.Array) -> jax.Array:
    """Indices [c N] of the first entries with which the running sums [c v] exceed goals [c N], as if below the last."""
    goal = jnp.clip(goal, 0.0, jnp.nextafter(up_to[:, -1:], 0.0))
    return jax.vmap(partial(jnp.searchsorted, side="right"))(up_to, goal)


def _counted(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Different ids and how often each came up [c N]; what is left over is -1 with a count of 0."""
    ids = jnp.sort(ids, -1)
    new = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], -1)
    slot, row = jnp.cumsum(new, -1) - 1, jnp.arange(ids.shape[0])[:, None]
    counts = jnp.zeros_like(ids).at[row, slot].add(1)
    return jnp.full_like(ids, -1).at[row, slot].set(ids), counts


def _log_sum(columns: Columns, z: jax.Array) -> jax.Array:
    """log sum exp over the whole vocabulary, [c v] -> [c]; -inf where nothing is left."""
    top = columns.max(z)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.log(columns.sum(jnp.exp(z - top[:, None]))) + top


def _chunked(each: Callable[..., tuple], head: Head, vocab: int, per_token: tuple[jax.Array, ...]) -> tuple:
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
            hidden, *mine = xs
            return each(columns, columns.mask(logits(head, hidden), -jnp.inf), *mine)

        found = jax.lax.map(block, jax.tree.map(cut, (head.hidden, *rows)))
        return tuple(x.reshape(-1, x.shape[-1])[:count] for x in found)

    outputs = ("hidden",) * (2 if per_token else 3)
    found = mesh.run(body, [("signal", flat), *[("hidden", x) for x in rows]], outputs)
    return tuple(mesh.unflatten(x, shape) for x in found)
