"""Factors of a term's token weights: which tokens of a text a term learns from, and how much.

Each function returns `TokenWeights`, for `match(..., token_weights=...)` or a recipe's `objective.NAME.token_weights`.
A document is the weighted tokens of one segment. Factors are not normalised: the step still divides by the batch's
whole token weight, so that a term that learns from fewer tokens is smaller.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jaxkd.core.types import Batch, Divergence
from jaxkd.losses import divergences
from jaxkd.losses.feature_term import TokenWeights, beside

__all__ = ["author", "exclude", "iw_opd", "prefix", "teacher_entropy", "tip"]

_AUTHORS = ("data", "student", "teacher")  # in the numbering of `batch.aux["author"]`


def author(name: str) -> TokenWeights:
    """1 in the rows that `name` wrote: "data", "student" or "teacher", else ValueError.

    With it the terms of one objective take different texts, as in DistiLLM-2 (arXiv 2503.07067): `skew_kl` on the
    teacher's and `skew_reverse_kl` on the student's. Reads `batch.aux["author"]` [B], which rollouts write; ValueError
    without it.
    """
    if name not in _AUTHORS:
        raise ValueError(f"author must be {', '.join(_AUTHORS[:-1])} or {_AUTHORS[-1]}, got {name!r}")

    def fn(batch: Batch) -> Array:
        if "author" not in batch.aux:
            raise ValueError(f"token_weights 'author({name!r})' needs batch.aux['author'], which rollouts write")
        return jnp.broadcast_to(batch.aux["author"][:, None] == _AUTHORS.index(name), batch.weights.shape)

    return TokenWeights(fn)


def exclude(ids: Sequence[int]) -> TokenWeights:
    """0 where the target is one of `ids`, such as special tokens; a student whose end token is excluded cannot stop."""
    return TokenWeights(lambda batch: ~jnp.isin(batch.targets, jnp.asarray(tuple(ids), jnp.int32)))


def prefix(share: float = 0.0, tokens: int = 0) -> TokenWeights:
    """1 on the first `tokens` tokens of each document, or on the first `share` of them (rounded, at least one).

    ValueError unless exactly one is given, a share above 0 and at most 1 or a number from 1 on.
    Source: Prefix OPD (arXiv 2602.15260); a share of 0.3 is a control of IW-OPD (arXiv 2606.22600).
    """
    if not (0 <= share <= 1 and type(tokens) is int and tokens >= 0 and (share == 0) != (tokens == 0)):
        raise ValueError(f"prefix takes a share above 0 and at most 1, or tokens from 1 on, got {share} and {tokens}")

    def fn(batch: Batch) -> Array:
        live = (batch.weights != 0).astype(jnp.float32)
        earlier = beside(live, batch.segments)
        if tokens:
            return earlier < tokens
        length = earlier + live + beside(live, batch.segments, later=True)
        return earlier < jnp.maximum(jnp.round(share * length), 1)

    return TokenWeights(fn)


def teacher_entropy(above: float = 0.8) -> TokenWeights:
    """1 where H(p) > `above` nats: EOPD adds forward KL on those tokens to reverse KL on all (arXiv 2603.07079).

    Of a top-k teacher the tail counts as one entry, so that its entropy is a lower bound.
    """
    return TokenWeights(lambda batch, entropy: entropy > above, (divergences.teacher_entropy(),))


def tip(share: float = 0.5) -> TokenWeights:
    """1 on the `share` of a row's weighted tokens (rounded, at least one) with the largest h + d - h d.

    h = H(q) / log V is the student's entropy, and d = KL(q || p) over its largest value in the row: tokens count where
    the student is unsure or wrong. Ranks are within a row, so that they do not depend on micro-batches; that and d's
    scale are ours. ValueError unless 0 < share <= 1.
    Source: TIP (arXiv 2604.14084), from a summary; `share` 0.5 is its setting.
    """
    if not 0 < share <= 1:
        raise ValueError(f"tip: share must be above 0 and at most 1, got {share}")

    def fn(batch: Batch, h: Array, kl: Array) -> Array:
        live = batch.weights != 0
        d = kl / jnp.maximum(jnp.max(kl, -1, where=live, initial=0.0, keepdims=True), 1e-8)
        score = jnp.where(live, h + d - h * d, -jnp.inf)
        # By rank and not by a threshold, which XLA may compute again with other rounding.
        rank = jnp.argsort(jnp.argsort(-score, -1), -1)
        return rank < jnp.maximum(jnp.round(share * live.sum(-1, keepdims=True)), 1)

    return TokenWeights(fn, (_NORMALISED_ENTROPY, divergences.reverse_kl()))


_NORMALISED_ENTROPY = Divergence(
    lambda lp, lq, side: (-jnp.exp(lq) * lq, jnp.ones_like(lq)),
    lambda entropy, size: entropy / jnp.log(size),
    uses_teacher=False,
)


def iw_opd(gamma: float = 0.5) -> TokenWeights:
    """1 + gamma (1 - C_t / C), C_t = sum of |log p(y_s) - log q(y_s)| over the document's earlier tokens s < t.

    C is the same sum over the whole document; the weights fall from 1 + gamma at its start to 1. q is the present
    student, which is the paper's rollout at the same step. Source: IW-OPD (arXiv 2606.22600); `gamma` 0.5 is its
    setting.
    """

    def fn(batch: Batch, log_ratio: Array) -> Array:
        size = jnp.where(batch.weights != 0, jnp.abs(log_ratio), 0.0)
        earlier = beside(size, batch.segments)
        whole = earlier + size + beside(size, batch.segments, later=True)
        return 1 + gamma * (1 - earlier / (whole + 1e-8))

    return TokenWeights(fn, (divergences.sampled_reverse_kl(),))
