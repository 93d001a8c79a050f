"""Forms for top-k teachers that omit the tail; they share forward KL's pointwise part."""

import jax.numpy as jnp

from jaxkd.core.types import Divergence

__all__ = ["conditional_kl", "partial_kl", "renormalized_kl"]


def partial_kl() -> Divergence:
    """sum_S p (log p - log q) over the teacher's stored entries S, without renormalisation.

    Ignores the tail on both sides. Not a divergence: it may be negative, and its minimum puts more than p on S
    (with P = p(S) the gradient P q - p vanishes at q = p/P). For comparison with other libraries' runs (verl's
    `forward_kl_topk`); `forward_kl` on a top-k teacher keeps the tail.
    """
    return Divergence(lambda lp, lq, side: (jnp.exp(lp) * (lp - lq),), support="partial")


def conditional_kl() -> Divergence:
    """KL(p/P || q/Q) within the teacher's stored entries S, P = p(S) and Q = q(S).

    Ignores how much mass the student puts on S, so combine it with a cross-entropy term. Gradient: q/Q - p/P on S, none
    elsewhere. As in tunix's `distill_top_k` and MaxText.
    """
    return Divergence(lambda lp, lq, side: (jnp.exp(lp) * (lp - lq),), support="conditional")


def renormalized_kl() -> Divergence:
    """KL(p/P || q): the teacher renormalised on its stored entries S, the student not.

    Ignores the teacher's tail, so it drives the student's tail to zero. Gradient: q - p/P on S, q elsewhere. As in
    Gemma's reports: stored entries renormalised, zero for the rest.
    """
    return Divergence(lambda lp, lq, side: (jnp.exp(lp) * (lp - lq),), support="renormalized")
