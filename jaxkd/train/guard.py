"""Whether a step's update is applied, decided on the devices from global reductions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128
"""Number of recent steps that a loss and a gradient norm are compared with."""
_MIN_DEVIATION = 1e-5  # relative to the mean, so that rounding of a constant loss is no spike


class Recent(NamedTuple):
    """Ring buffer of recent finite losses and gradient norms; part of the train state if spikes are skipped."""

    values: jax.Array  # [2 WINDOW] float32
    seen: jax.Array  # [] int32: number of appended steps


def init() -> Recent:
    """An empty window."""
    return Recent(jnp.zeros((2, WINDOW), jnp.float32), jnp.zeros((), jnp.int32))


def is_usual(recent: Recent, loss: jax.Array, norm: jax.Array, factor: float) -> jax.Array:
    """Whether neither number is a spike, x > mean + factor std over the window; True until the window is half full.

    `loss` is the mean over the step's tokens, `norm` that of its gradient before clipping; std has the divisor n - 1.

    Source: OLMo-core's SkipStepOptimizer (window 128, factor 6).
    """
    filled = jnp.arange(WINDOW) < recent.seen
    n = jnp.minimum(recent.seen, WINDOW).astype(jnp.float32)
    mean = jnp.where(filled, recent.values, 0.0).sum(-1) / jnp.maximum(n, 1.0)
    square = jnp.where(filled, jnp.square(recent.values - mean[:, None]), 0.0).sum(-1)
    deviation = jnp.maximum(jnp.sqrt(square / jnp.maximum(n - 1.0, 1.0)), _MIN_DEVIATION * jnp.abs(mean))
    below = jnp.stack([loss, norm]) <= mean + factor * deviation
    return below.all() | (recent.seen < WINDOW // 2)


def append(recent: Recent, loss: jax.Array, norm: jax.Array) -> Recent:
    """The window with this step added, if both numbers are finite.

    Spikes are added too, so that a loss that stays high widens the window and the run does not stall.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    written = recent.values.at[:, recent.seen % WINDOW].set(jnp.stack([loss, norm]))
    return Recent(jnp.where(finite, written, recent.values), recent.seen + finite)


def select(applied: jax.Array, after: Any, before: Any) -> Any:
    """`after` if the update is applied, else `before`, leaf by leaf.

    On a CPU the compiled step then holds up to one more copy of the parameters during the update, as with `lax.cond`;
    moments are still updated in place.
    """
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), after, before)
