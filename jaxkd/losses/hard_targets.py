"""Losses of the data alone, as divergences, so that they share the kernel's matrix products."""

import jax.numpy as jnp
from jax import Array

from jaxkd.core.types import Divergence, Side

__all__ = ["excess_loss", "next_token", "z_loss"]


def next_token(smoothing: float = 0.0) -> Divergence:
    """Cross-entropy with the data, -(1 - s) log q[target] - s mean_v log q[v], smoothing 0 <= s < 1, else ValueError.

    Gradient: q - (1 - s) onehot(target) - s/V. Label smoothing: Szegedy et al. 2016 (arXiv 1512.00567), section 7.
    """
    if smoothing == 0.0:
        return Divergence(lambda lp, lq, side: (jnp.where(side.is_target, -lq, 0.0),), uses_teacher=False)
    if not 0.0 < smoothing < 1.0:
        raise ValueError(f"next_token: smoothing must be from 0 to below 1, got {smoothing}")

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        return jnp.where(side.is_target, -lq, 0.0), -lq, jnp.ones_like(lq)

    def combine(target: Array, every: Array, size: Array) -> Array:
        return (1 - smoothing) * target + smoothing * every / size

    return Divergence(phi, combine, uses_teacher=False)


def excess_loss() -> Divergence:
    """max(log p[target] - log q[target], 0): the student's loss on a token above the teacher's.

    A metric, not minimised: the score of Group DRO (DoReMi, arXiv 2305.10429, Algorithm 1), clipped per token.
    """
    return Divergence(
        lambda lp, lq, side: (jnp.where(side.is_target, lp - lq, 0.0),), lambda gap: jnp.maximum(gap, 0.0)
    )


def z_loss() -> Divergence:
    """(log sum_v exp z_v)^2: keeps the logits' normaliser near 1 (PaLM, arXiv 2204.02311, section 5: weight 1e-4).

    Gradient: 2 log Z q. The only term that depends on the magnitude of the logits.
    """
    return Divergence(lambda lp, lq, side: (), jnp.square, uses_teacher=False, normaliser=True)
