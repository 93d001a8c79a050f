"""Terms that learn from the data alone, in the form of divergences: they share the kernel's matrix products."""

import jax
import jax.numpy as jnp

from jaxkd.core.types import Divergence, Side

__all__ = ["excess_loss", "next_token", "z_loss"]

Array = jax.Array


def next_token(smoothing: float = 0.0) -> Divergence:
    """Cross-entropy with the data, -(1 - s) log q[target] - s mean_v log q[v].

    Gradient: q - (1 - s) onehot(target) - s/V. It runs through the same kernel as the distillation terms, so
    that it shares their matrix products. Label smoothing: Szegedy et al. 2016 (arXiv 1512.00567), section 7.

    Args:
        smoothing: s, from 0 to below 1.

    Raises:
        ValueError: for any other `smoothing`.
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
    """max(log p[target] - log q[target], 0): how far the student's loss on a token is above the teacher's.

    Not minimised but looked at: the score of Group DRO (DoReMi, arXiv 2305.10429, Algorithm 1), clipped per token.
    """
    return Divergence(
        lambda lp, lq, side: (jnp.where(side.is_target, lp - lq, 0.0),), lambda gap: jnp.maximum(gap, 0.0)
    )


def z_loss() -> Divergence:
    """(log sum_v exp z_v)^2: keeps the logits' normaliser near 1 (PaLM, arXiv 2204.02311, section 5: weight 1e-4).

    Gradient: 2 log Z q. The only term that sees how large logits are.
    """
    return Divergence(
        lambda lp, lq, side: (), lambda normaliser: jnp.square(normaliser), uses_teacher=False, normaliser=True
    )
