"""Whether a step's update is taken: decided on the devices, from values that all of them have."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128
"""Steps that a loss and a gradient norm are compared with."""
_NARROW = 1e-5  # of the mean: no deviation is taken for less, or the rounding of a constant would be a spike


class Recent(NamedTuple):
    """The last finite losses and gradient norms: a part of the train state where spikes are left out."""

    values: jax.Array  # [2 WINDOW] float32, written round and round
    seen: jax.Array  # [] int32: how many were ever written


def init() -> Recent:
    """Nothing seen yet."""
    return Recent(jnp.zeros((2, WINDOW), jnp.float32), jnp.zeros((), jnp.int32))


def usual(recent: Recent, loss: jax.Array, norm: jax.Array, factor: float) -> jax.Array:
    """Whether neither number is a spike, x > mean + factor std over the window; all are usual until half of it is full.

    Args:
        recent: before this step.
        loss: [] mean over the step's tokens.
        norm: [] of its gradient, before clipping.
        factor: standard deviations; those of the window have n - 1 below the sum.

    Returns:
        [] bool.

    Source: OLMo-core's SkipStepOptimizer (window 128, factor 6).
    """
    there = jnp.arange(WINDOW) < recent.seen
    n = jnp.minimum(recent.seen, WINDOW).astype(jnp.float32)
    mean = jnp.where(there, recent.values, 0.0).sum(-1) / jnp.maximum(n, 1.0)
    square = jnp.where(there, jnp.square(recent.values - mean[:, None]), 0.0).sum(-1)
    deviation = jnp.maximum(jnp.sqrt(square / jnp.maximum(n - 1.0, 1.0)), _NARROW * jnp.abs(mean))
    below = jnp.stack([loss, norm]) <= mean + factor * deviation
    return below.all() | (recent.seen < WINDOW // 2)


def remember(recent: Recent, loss: jax.Array, norm: jax.Array) -> Recent:
    """The window with this step in it, if its numbers are finite.

    A spike enters too: a loss that has come to stay widens the window until it is usual, so that no run stands still.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    written = recent.values.at[:, recent.seen % WINDOW].set(jnp.stack([loss, norm]))
    return Recent(jnp.where(finite, written, recent.values), recent.seen + finite)


def choose(taken: jax.Array, after: Any, before: Any) -> Any:
    """`after` where the update is taken, else `before`, leaf by leaf.

    A select a leaf: on a CPU the compiled step holds up to one more copy of the parameters while it updates them, as it
    does with `lax.cond`; moments are written in place.
    """
    return jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, before)
