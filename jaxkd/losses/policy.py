"""Terms on text that the student wrote which need its sampling probabilities, or rewards of later tokens.

y_t is `batch.targets`, p the teacher, q the student; log p(y_t) - log q(y_t) is a reward without gradient, and a value
is minimised. The terms read what rollouts write into `batch.aux`: `old_logprob` [B L], log q_old(y_t) of the student
that wrote y, at temperature 1; `drawn_logprob` [B L], of the distribution that y_t was drawn from; `author` [B], of
which only the student's rows count. Only tokens with weight have a value, a gradient or a reward; the step alone
normalises. They need the teacher's whole distribution, since one that keeps a few entries has no log p(y_t) of the
others. The backward pass computes the logits again: two matrix products more than a divergence.
"""

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxkd.core.types import Batch, Divergence, Output, PyTree, Sampled, Signal, TopK
from jaxkd.kernels.api import token_values
from jaxkd.losses import divergences
from jaxkd.losses.feature_term import FeatureTerm, beside, nothing

__all__ = ["minillm", "policy_gradient"]

_STUDENT = 1  # in `batch.aux["author"]`


def policy_gradient(clip: float = 0.0, baseline: bool = False, max_ratio: float = 0.0) -> FeatureTerm:
    """-w A log q(y), A = log p(y) - log q_old(y) and w = q(y) / drawn(y), both without gradient: no later tokens.

        field[t] = w (log q_old(y_t) - log p(y_t)),   gradient of field[t] = -w A_t grad log q(y_t)

    For text of an earlier student, or drawn at another temperature; at the same step and temperature 1 the gradient is
    that of `sampled_reverse_kl`. Its mean over y_t ~ drawn is the gradient of KL(q || p) - KL(q || q_old) at the
    prefix. `drawn` is `aux["drawn_logprob"]`, q_old where that is missing; where the sampling distribution gives no
    probability to what q can say (top-p), no weight corrects it.

    Args:
        clip: e > 0: no gradient where q/q_old is above 1 + e and A > 0, or below 1 - e and A < 0 (PPO, arXiv
            1707.06347, Eq. 7); 0: none.
        baseline: adds KL(q || p), without gradient, to A: the same mean, a lower variance.
        max_ratio: upper limit of w; 0: none.

    Raises ValueError: negative arguments; in use, no `aux["old_logprob"]`, or a top-k teacher.
    Source: on-policy distillation (Thinking Machines 2025); the baseline is vOPD's (arXiv 2605.07865), derived.
    """
    _not_negative("policy_gradient", clip=clip, max_ratio=max_ratio)
    more = (divergences.reverse_kl(),) if baseline else ()

    def fn(params: PyTree, student: Output, teacher: Signal, batch: Batch, weights: Array, vocab: int):
        if "old_logprob" not in batch.aux:
            raise ValueError("policy_gradient needs batch.aux['old_logprob'], which rollouts of the student write")
        live, lq, lp, *kl = _measure("policy_gradient", student, teacher, batch, vocab, more)
        old = jnp.where(live, batch.aux["old_logprob"], 0.0)
        advantage, ratio = sum(kl, lp - old), jnp.exp(lq - old)
        w = _importance(lq, batch, live, max_ratio, otherwise=old)
        inside = jnp.where(advantage > 0, ratio <= 1 + clip, ratio >= 1 - clip) if clip else True
        field = divergences.sloped(w * (old - lp), lq, jnp.where(inside, -w * advantage, 0.0))
        return jnp.sum(weights * field), stop_gradient(field)

    return FeatureTerm(nothing, fn)


def minillm(length_normalize: bool = True, max_ratio: float = 0.0) -> FeatureTerm:
    """The gradient of KL(q || p) of whole continuations, with the next step exact and later steps sampled.

        field[t] = KL(q || p) at t,   gradient of field[t] = w_t (grad KL(q || p) - R_t grad log q(y_t))
        R_t = sum over later weighted tokens s > t of the same document of log p(y_s) - log q(y_s)

    R and w carry no gradient. With `length_normalize` R_t is the mean over the later tokens, which takes the reward of
    short answers away; without it, and on text drawn from q, the mean gradient is exactly that of the KL of the
    continuations, sum_t E[log q(y_t) - log p(y_t)]. w_t = q(y_t) / drawn(y_t) by `aux["drawn_logprob"]`, 1 where that
    is missing: for text from the mixture alpha p + (1 - alpha) q the paper's single-step ratio, at most 1/(1 - alpha),
    which corrects the distribution of y_t, not that of the tokens before and after it. `max_ratio` limits w (0: none).

    Raises ValueError: a negative `max_ratio`; in use, a top-k teacher. Add a cross-entropy on plain text, as the paper
    does, and start from a fine-tuned student. Source: MiniLLM (arXiv 2306.08543), section 2.2, derived.
    """
    _not_negative("minillm", max_ratio=max_ratio)

    def fn(params: PyTree, student: Output, teacher: Signal, batch: Batch, weights: Array, vocab: int):
        live, lq, lp, kl = _measure("minillm", student, teacher, batch, vocab, (divergences.reverse_kl(),))
        later = lambda x: beside(x, batch.segments, later=True)
        reward = later(stop_gradient(lp - lq))
        if length_normalize:
            reward = reward / jnp.maximum(later(live.astype(jnp.float32)), 1.0)
        w = _importance(lq, batch, live, max_ratio, otherwise=stop_gradient(lq))
        field = divergences.sloped(kl, kl, w) + divergences.sloped(jnp.zeros_like(lq), lq, -w * reward)
        return jnp.sum(weights * field), stop_gradient(field)

    return FeatureTerm(nothing, fn)


def _not_negative(where: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{where}: {name} must be a number from 0 on, got {value!r}")


_teacher_log_prob = Divergence(lambda lp, lq, side: (jnp.where(side.is_target, lp, 0.0),))


def _measure(
    where: str, student: Output, teacher: Signal, batch: Batch, vocab: int, more: tuple[Divergence, ...]
) -> tuple[Array, ...]:
    """Which tokens count, log q(y), log p(y) and further divergences [B L], 0 at other tokens, even NaN."""
    if isinstance(teacher, TopK | Sampled):
        raise ValueError(
            f"{where} needs log p(y) of every token that the student wrote, and a {type(teacher).__name__} signal "
            "stores the teacher's own entries: take teacher.signal 'head' or 'hidden', or a divergence as reverse_kl()"
        )
    live = batch.weights != 0
    if "author" in batch.aux:
        live &= (batch.aux["author"] == _STUDENT)[:, None]
    head = teacher.head if isinstance(teacher, Output) else teacher
    terms = (divergences.next_token(), _teacher_log_prob, *more)
    nll, *values = token_values(terms, student.head, head, batch.targets, vocab=vocab)
    return (live, *(jnp.where(live, x, 0.0) for x in (-nll, *values)))


def _importance(lq: Array, batch: Batch, live: Array, limit: float, otherwise: Array) -> Array:
    """q(y) / drawn(y), at most `limit` if that is above 0; `otherwise` stands for a missing log drawn(y)."""
    drawn = jnp.where(live, batch.aux["drawn_logprob"], 0.0) if "drawn_logprob" in batch.aux else otherwise
    ratio = jnp.exp(stop_gradient(lq) - drawn)
    return jnp.minimum(ratio, limit) if limit else ratio
