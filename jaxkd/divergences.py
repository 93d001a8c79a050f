"""Token-level divergences as a few lines of pointwise mathematics.

`lp` and `lq` are log-probabilities of teacher `p` and student `q`, shape [N, v] for any slice of the
vocabulary; results are in nats. A divergence never sees logits, temperatures, weights or meshes: the dense
reference, the fused kernel, its gradient and the vocabulary-sharded form all use the one definition here.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.types import Side

__all__ = ["forward_kl", "generalized_jsd", "next_token", "reverse_kl"]

Array = jax.Array


class Divergence(NamedTuple):
    """`combine(*[sum_v c for c in phi(lp, lq, side)])`, differentiable in `lq` only.

    `phi` returns a tuple of m arrays [N, v]; `combine` maps their m sums over the vocabulary, each [N], to
    nats [N].
    """

    phi: Callable[[Array, Array, Side], tuple[Array, ...]]
    combine: Callable[..., Array] = lambda total: total
    uses_teacher: bool = True


def forward_kl() -> Divergence:
    """KL(p || q) = sum p (log p - log q).

    Gradient in the student's logits: q - p, within [-1, 1]. Zero only at q = p; covers every mode of p.
    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """
    return Divergence(lambda lp, lq, side: (jnp.exp(lp) * (lp - lq),))


def reverse_kl() -> Divergence:
    """KL(q || p) = sum q (log q - log p).

    Gradient in the student's logits: q (log q/p - KL), unbounded where p vanishes; the kernels floor
    log-probabilities so that it stays finite. Source: MiniLLM (arXiv 2306.08543), Eq. 1.
    """
    return Divergence(lambda lp, lq, side: (jnp.exp(lq) * (lq - lp),))


def generalized_jsd(beta: float = 0.5) -> Divergence:
    """JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Here `beta` is the weight of the *teacher*, in the mixture and in the sum. The value goes to 0 at both
    ends; JSD/beta -> KL(p || q) as beta -> 0 and JSD/(1 - beta) -> KL(q || p) as beta -> 1. Bounded by the
    entropy of (beta, 1 - beta). Source: GKD (arXiv 2306.13649), Eq. 1.

    Args:
        beta: strictly between 0 and 1.

    Raises:
        ValueError: for any other `beta`.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"generalized_jsd needs 0 < beta < 1, got {beta}: the formula is identically 0 at both ends; "
            "use forward_kl() for the limit beta -> 0 and reverse_kl() for beta -> 1"
        )

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        lm = jnp.logaddexp(lp + jnp.log(beta), lq + jnp.log1p(-beta))
        return (beta * jnp.exp(lp) * (lp - lm) + (1 - beta) * jnp.exp(lq) * (lq - lm),)

    return Divergence(phi)


def next_token() -> Divergence:
    """Cross-entropy with the data, -log q[target].

    Gradient in the student's logits: q - onehot(target). It runs through the same kernel as the
    distillation terms, so that it shares their matrix products.
    """
    return Divergence(lambda lp, lq, side: (jnp.where(side.hit, -lq, 0.0),), uses_teacher=False)
