"""Token-level divergences as pointwise functions.

`lp` and `lq` are log-probabilities of teacher `p` and student `q`, [N, v] for any slice of the vocabulary; results
are in nats. The dense reference, the fused kernels, their gradients, the sharded and the top-k forms all use this one
definition. Gradients are given in the student's logits z, with q = softmax(z). "recalled": the equation was quoted from
memory.

With a top-k teacher a divergence is over K + 1 entries: the K, and the sum of all others. For an f-divergence that is
at most the full value (data-processing inequality). `partial_kl`, `conditional_kl` and `renormalized_kl` omit the tail.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxkd.core.types import Divergence, Side, TopSet

__all__ = [
    "adaptive_kl", "alpha_beta", "alpha_divergence", "conditional_kl", "cross_entropy", "decoupled_kd",
    "decoupled_topk", "forward_kl", "generalized_jsd", "generalized_kl", "generalized_reverse_kl", "jeffreys",
    "mixed_kl", "next_token", "partial_kl", "renormalized_kl", "renyi", "reverse_kl", "sampled_reverse_kl", "skew_kl",
    "skew_reverse_kl", "squared_hellinger", "total_variation", "z_loss",
]  # fmt: skip


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise ValueError(f"{name} must be above {low} and below {high}, got {value}")


def _weights(where: str, **values: float) -> None:
    for name, value in values.items():
        if type(value) not in (int, float) or not 0.0 <= value < math.inf:
            raise ValueError(f"{where}: {name} must be a number from 0 on, got {value!r}")


def _nearly(name: str, value: float, point: float) -> bool:
    """Whether a parameter is at a singular point; ValueError so near it that float32 would cancel."""
    if 1e-9 < abs(value - point) < 1e-3:
        raise ValueError(f"{name} is {value}: within 0.001 of {point} float32 cancels, so give {point} itself")
    return abs(value - point) <= 1e-9


def _leading(where: str, k: int) -> TopSet:
    if type(k) is not int or k < 1:
        raise ValueError(f"{where}: k must be an integer from 1 on, got {k!r}")
    return TopSet(entries=k)


def sloped(value: Array, lq: Array, slope: Array) -> Array:
    """`value` with the derivative `slope` in lq, whatever both were computed from."""
    value, slope = jax.lax.stop_gradient((value, slope))
    return value + slope * (lq - jax.lax.stop_gradient(lq))


def _expm1(x: Array) -> Array:
    """exp(x) - 1 without cancellation near 0; Pallas for TPU lowers tanh but not expm1."""
    half = jnp.tanh(0.5 * jnp.clip(x, -1.0, 1.0))
    return jnp.where(jnp.abs(x) < 1.0, 2 * half / (1 - half), jnp.exp(x) - 1)


def forward_kl() -> Divergence:
    """KL(p || q) = sum p (log p - log q).

    Gradient: q - p, within [-1, 1]. Zero only at q = p; covers every mode of p.
    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """
    return Divergence(lambda lp, lq, side: (jnp.exp(lp) * (lp - lq),))


def cross_entropy() -> Divergence:
    """H(p, q) = -sum p log q = KL(p || q) + H(p).

    Gradient: q - p. Linear in p, so draws from the teacher give it without bias (arXiv 2503.16870). Minimum H(p), at q
    = p.
    """
    return Divergence(lambda lp, lq, side: (-jnp.exp(lp) * lq,), unbiased=True)


def reverse_kl() -> Divergence:
    """KL(q || p) = sum q (log q - log p).

    Gradient: q (log q/p - KL), unbounded where p vanishes; the kernels floor log-probabilities, so it stays finite.
    Source: MiniLLM (arXiv 2306.08543), Eq. 1.
    """
    return Divergence(lambda lp, lq, side: (jnp.exp(lq) * (lq - lp),))


def mixed_kl(reverse: float = 0.5) -> Divergence:
    """(1 - reverse) KL(p || q) + reverse KL(q || p), `reverse` from 0 to 1, else ValueError.

    Gradient: the same mixture of theirs; never negative, unbounded. `reverse=0.9` is DistiLLM's "symmetric KL" (arXiv
    2402.03898, code).
    """
    if not 0.0 <= reverse <= 1.0:
        raise ValueError(f"mixed_kl: reverse is a share from 0 to 1, got {reverse}")

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        return (((1 - reverse) * jnp.exp(lp) - reverse * jnp.exp(lq)) * (lp - lq),)

    return Divergence(phi)


def jeffreys() -> Divergence:
    """KL(p || q) + KL(q || p) = sum (p - q) (log p - log q) (Jeffreys 1946). Gradient: the sum of theirs, unbounded."""
    return Divergence(lambda lp, lq, side: ((jnp.exp(lp) - jnp.exp(lq)) * (lp - lq),))


def adaptive_kl(mass: float = 0.5) -> Divergence:
    """g_h/(g_h + g_t) KL(p || q) + g_t/(g_h + g_t) KL(q || p), with g = sum |p - q| over head and tail of p.

    The head is the fewest of the teacher's entries that hold `mass` (0 < mass < 1, else ValueError), ties included; of
    a top-k teacher, at most the stored ones. g carries no gradient, so the gradient is the same mixture of theirs.
    Never negative. Source: Wu et al. 2024 (arXiv 2404.02657), section 4, recalled; the set is the paper's, its code
    omits the entry that crosses `mass`.
    """
    _between("adaptive_kl: mass", mass, 0.0, 1.0)

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        p, q = jnp.exp(lp), jnp.exp(lq)
        gap = jax.lax.stop_gradient(jnp.abs(p - q))
        return jnp.where(side.in_top_set, gap, 0.0), jnp.where(side.in_top_set, 0.0, gap), p * (lp - lq), q * (lq - lp)

    def combine(head: Array, tail: Array, forward: Array, reverse: Array) -> Array:
        both = head + tail
        share = jnp.where(both > 0, head / jnp.where(both > 0, both, 1.0), 0.5)
        return share * forward + (1 - share) * reverse

    return Divergence(phi, combine, top_set=TopSet(mass=mass))


def generalized_jsd(beta: float = 0.5, endpoint: str = "paper") -> Divergence:
    """JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    `beta` is the weight of the *teacher*, in the mixture and in the sum. Gradient: q (u - <q, u>) with
    u = (1 - beta) (log q - log m). Bounded by the entropy of (beta, 1 - beta). Source: GKD (arXiv 2306.13649), Eq. 1.
    The formula goes to 0 at both ends: JSD/beta -> KL(p || q) as beta -> 0, JSD/(1 - beta) -> KL(q || p) as beta -> 1.
    `endpoint` selects the behaviour there:

    - "paper": the formula; beta 0 and 1 are a ValueError.
    - "kl": the formula inside, KL(p || q) at beta = 0 and KL(q || p) at beta = 1, as in TRL: the scale jumps.
    - "scaled": JSD(beta) / (beta (1 - beta)), which reaches those two KLs continuously.

    TRL's GKD beta is this one with endpoint "kl"; DistiLLM's js_distance(lam) is beta = 1 - lam.
    """
    if endpoint not in ("paper", "kl", "scaled"):
        raise ValueError(f"generalized_jsd: endpoint must be paper, kl or scaled, got '{endpoint}'")
    if not 0.0 <= beta <= 1.0 or (endpoint == "paper" and beta in (0.0, 1.0)):
        raise ValueError(
            f"generalized_jsd needs 0 < beta < 1, got {beta}: the formula is identically 0 at both ends; "
            "use forward_kl() for the limit beta -> 0 and reverse_kl() for beta -> 1, or endpoint='kl' or 'scaled'"
        )
    if beta in (0.0, 1.0):
        return forward_kl() if beta == 0.0 else reverse_kl()
    if endpoint == "scaled":
        _nearly("generalized_jsd: beta", beta, 0.0 if beta < 0.5 else 1.0)
    scale = 1 / (beta * (1 - beta)) if endpoint == "scaled" else 1.0

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        # log m - log q from the ratio p/q: subtracting lq from log m would cancel digits where p is close to q. Floored
        # log-probabilities keep the ratio finite. The exact slope in lq is -(1 - beta) q (log m - log q); autodiff's
        # other terms sum to zero except for rounding, so they are stopped.
        gap = lp - lq
        log_m = jax.lax.stop_gradient(jnp.log(beta * jnp.exp(gap) + (1 - beta)))
        constant = jax.lax.stop_gradient(beta * scale * jnp.exp(lp) * (gap - log_m))
        return (constant - (1 - beta) * scale * jnp.exp(lq) * log_m,)

    return Divergence(phi)


def skew_kl(alpha: float = 0.1) -> Divergence:
    """SKL(alpha) = KL(p || alpha p + (1 - alpha) q), 0 <= alpha < 1 (0 is forward KL), else ValueError.

    Gradient: q (u - <q, u>) with u = -(1 - alpha) p/m, so |u q| <= p. Bounded by log 1/alpha.
    Source: DistiLLM (arXiv 2402.03898), Eq. 4, recalled; its code drops the constant sum p log p.
    """
    if alpha == 0.0:
        return forward_kl()
    _between("skew_kl: alpha", alpha, 0.0, 1.0)

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        p = jnp.exp(lp)
        return (p * (lp - jnp.log(alpha * p + (1 - alpha) * jnp.exp(lq))),)

    return Divergence(phi)


def skew_reverse_kl(alpha: float = 0.1, detach: bool = False) -> Divergence:
    """SRKL(alpha) = KL(q || m), m = (1 - alpha) p + alpha q, 0 <= alpha < 1 (0 is reverse KL), else ValueError.

    Gradient: q (u - <q, u>) with u = log q/m - alpha q/m, at most log 1/alpha. Bounded by log 1/alpha, unlike reverse
    KL. With `detach`, m carries no gradient and u = log q/m: on the student's own text that is the expectation of the
    policy gradient with reward log((1 - alpha) p(y)/q(y) + alpha) >= log alpha (TOP-D, arXiv 2607.04751, whose alpha is
    1 - alpha here), and what DistiLLM-2's code does.
    Source: DistiLLM (arXiv 2402.03898), section 3.1, recalled.
    """
    if alpha == 0.0:
        return reverse_kl()
    _between("skew_reverse_kl: alpha", alpha, 0.0, 1.0)

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        q = jnp.exp(lq)
        log_m = jnp.log((1 - alpha) * jnp.exp(lp) + alpha * q)
        return (q * (lq - (jax.lax.stop_gradient(log_m) if detach else log_m)),)

    return Divergence(phi)


def total_variation() -> Divergence:
    """TV = 1/2 sum |p - q|, within [0, 1].

    Gradient: q (s - <q, s>) with s = 1/2 sign(q - p), and 0 at ties, so that q = p has none. Log-probabilities that
    differ by rounding alone are a tie. Source: f-distill (arXiv 2307.15190), section 3.
    """

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        # Equal teacher and student may be computed in different fusions; their rounding error has no meaningful sign.
        tie = jnp.abs(lp - lq) <= 8 * float(jnp.finfo(jnp.float32).eps) * (1 - lp)
        return (0.5 * jnp.abs(jnp.where(tie, 0.0, jnp.exp(lp) - jnp.exp(lq))),)

    return Divergence(phi)


def squared_hellinger() -> Divergence:
    """H^2 = 1/2 sum (sqrt p - sqrt q)^2 = 1 - sum sqrt(p q), within [0, 1].

    Gradient: 1/2 (q (1 - H^2) - sqrt(p q)). It is alpha_beta(1/2, 1/2) / 4. Source: Hellinger 1909; see `alpha_beta`.
    """
    return Divergence(lambda lp, lq, side: (0.5 * jnp.square(jnp.exp(lp / 2) - jnp.exp(lq / 2)),))


def alpha_beta(alpha: float = 0.2, beta: float = 0.7) -> Divergence:
    """D = -1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], with its limits where a, b or a + b is 0.

        b = 0:       1/a^2 sum [p^a log(p^a/q^a) - p^a + q^a]       (a = 1: forward KL)
        a = 0:       1/b^2 sum [q^b log(q^b/p^b) - q^b + p^b]       (b = 1: reverse KL)
        a + b = 0:   1/a^2 sum [p^a/q^a - log(p^a/q^a) - 1]
        a = b = 0:   1/2 sum (log p - log q)^2

    (1/2, 1/2) is four times the squared Hellinger distance, (1, 1) half the squared L2 distance. Gradient:
    q (u - <q, u>) with u = q^(b-1) (q^a - p^a)/a. Never negative; bounded by 1/(a b) for positive a and b. Source:
    ABKD (arXiv 2505.04560), Eq. 5, recalled, after Cichocki et al. 2011 (Entropy 13); ABKD's scripts use (0.2, 0.7).

    Raises ValueError for parameters that are not finite or within 0.001 of a limit, or where powers of floored
    probabilities leave float32.
    """
    a, b = alpha, beta
    if not (math.isfinite(a) and math.isfinite(b)):
        raise ValueError(f"alpha_beta needs finite numbers, got alpha={a}, beta={b}")
    least = min(a, b, a + b)
    if least < -1 or (least < -0.9 and max(a, b) < 1):
        raise ValueError(
            f"alpha_beta({a}, {b}) has powers below -0.9, which leave float32 where a probability is floored"
        )
    a_is_0, b_is_0 = _nearly("alpha_beta: alpha", a, 0.0), _nearly("alpha_beta: beta", b, 0.0)
    sum_is_0 = _nearly("alpha_beta: alpha + beta", a + b, 0.0)

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        if a_is_0 and b_is_0:
            return (0.5 * jnp.square(lp - lq),)
        if b_is_0:
            p, q = jnp.exp(a * lp), jnp.exp(a * lq)
            return ((p * a * (lp - lq) - p + q) / a**2,)
        if a_is_0:
            p, q = jnp.exp(b * lp), jnp.exp(b * lq)
            return ((q * b * (lq - lp) - q + p) / b**2,)
        if sum_is_0:
            return ((jnp.exp(a * (lp - lq)) - a * (lp - lq) - 1) / a**2,)
        # Relative to the larger of p and q: nothing overflows, and p = q gives exactly 0 instead of rounding of 1e-6.
        gap, small = -jnp.abs(lp - lq), jnp.where(lq <= lp, b, a)  # `small`: the exponent of the smaller one
        rest = small / (a + b) * _expm1((a + b) * gap) - _expm1(small * gap)
        return (jnp.exp((a + b) * jnp.maximum(lp, lq)) * rest / (a * b),)

    return Divergence(phi)


def alpha_divergence(alpha: float = 0.5) -> Divergence:
    """(sum p^a q^(1-a) - 1) / (a (a - 1)), Amari's; forward KL at a = 1, reverse KL at a = 0.

    It is alpha_beta(a, 1 - a), with its gradient and errors; a from -1 to 2. At most 1/(a (1 - a)) for 0 < a < 1.
    Source: Amari 1985, recalled.
    """
    return alpha_beta(alpha, 1 - alpha)


def renyi(alpha: float = 0.5) -> Divergence:
    """D_a = log(sum p^a q^(1-a)) / (a - 1), forward KL as a -> 1.

    Gradient: q - r with r = p^a q^(1-a) / sum p^a q^(1-a), so within [-1, 1]. Not decreasing in a. ValueError unless
    0 < a <= 2 (float32 cannot hold p^a q^(1-a) beyond) and for a within 0.001 of 1.
    Source: van Erven & Harremoes 2014 (arXiv 1206.2459), Eq. 1.
    """
    if not 0.0 < alpha <= 2.0:
        raise ValueError(f"renyi: alpha must be above 0 and at most 2, got {alpha}")
    if _nearly("renyi: alpha", alpha, 1.0):
        return forward_kl()
    return Divergence(
        lambda lp, lq, side: (jnp.exp(alpha * lp + (1 - alpha) * lq),), lambda total: jnp.log(total) / (alpha - 1)
    )


def _part(p: Array, q: Array) -> Array:
    """p log(p/q), where either mass may be 0; q = 0 counts as the smallest normal number."""
    least = jnp.finfo(jnp.float32).tiny
    return jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, least)) - jnp.log(jnp.maximum(q, least))), 0.0)


def decoupled_kd(target: float = 1.0, others: float = 8.0) -> Divergence:
    """target KL((p_y, 1-p_y) || (q_y, 1-q_y)) + others KL(p without y || q without y), y the data's next token.

    Forward KL has `others` = 1 - p_y, so its second part vanishes where the teacher is confident. Gradient: of the
    first, target (q_y - p_y) on the target against the rest; of the second, others times the difference of the
    renormalised distributions. With a top-k teacher that did not store y, the target is the whole tail. `target` is the
    paper's alpha, `others` its beta (8 is its ImageNet setting, recalled); ValueError unless both are numbers >= 0.
    Source: DKD (arXiv 2203.08679), Eq. 7, recalled.
    """
    _weights("decoupled_kd", target=target, others=others)

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        p, q = jnp.exp(lp), jnp.exp(lq)
        hit = side.is_target
        inside = [jnp.where(hit, x, 0.0) for x in (p, q)]
        return (*inside, *[jnp.where(hit, 0.0, x) for x in (p, q, p * (lp - lq))])

    def combine(p: Array, q: Array, rest_p: Array, rest_q: Array, cross: Array) -> Array:
        binary = _part(p, q) + _part(rest_p, rest_q)
        safe = jnp.where(rest_p > 0, rest_p, 1.0)
        inside = jnp.where(rest_p > 0, (cross - _part(rest_p, rest_q)) / safe, 0.0)
        return target * binary + others * inside

    return Divergence(phi, combine)


def decoupled_topk(k: int = 32, mass: float = 1.0, inside: float = 1.0) -> Divergence:
    """mass KL((P, 1-P) || (Q, 1-Q)) + inside P KL(p within S || q within S), S the teacher's k largest, P = p(S).

    Ties with the smallest entry of S are in S. With both weights 1 it is the KL of k + 1 entries (the chain rule), so
    at most forward KL. LFM2 (arXiv 2511.23404, from summaries) tempers the second part only: two terms, `mass=1,
    inside=0` at temperature 1 and `mass=0, inside=1` at its own, where P is then tempered too. Gradient: mass (Q - P)
    on S against the rest, and inside P times the difference of the renormalised ones within S. ValueError unless k is
    an integer >= 1 and both weights are numbers >= 0.
    """
    head = _leading("decoupled_topk", k)
    _weights("decoupled_topk", mass=mass, inside=inside)

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        p, q = jnp.exp(lp), jnp.exp(lq)
        inner = [jnp.where(side.in_top_set, x, 0.0) for x in (p, q, p * (lp - lq))]
        return (*inner, *[jnp.where(side.in_top_set, 0.0, x) for x in (p, q)])

    def combine(p: Array, q: Array, cross: Array, rest_p: Array, rest_q: Array) -> Array:
        return mass * (_part(p, q) + _part(rest_p, rest_q)) + inside * (cross - _part(p, q))

    return Divergence(phi, combine, top_set=head)


def generalized_kl(k: int = 32) -> Divergence:
    """g(p, q) = sum_S [p log(p/q) - p + q], S the teacher's k largest entries, ties with the smallest included.

    The forward twin of `generalized_reverse_kl`: the added q makes it a divergence on S, which `partial_kl` is not.
    Gradient: q (u - <q, u>) with u = 1 - p/q on S, 0 elsewhere. 0 <= g <= KL of k + 1 entries <= KL(p || q), and g = 0
    only where q = p on S. ValueError unless k is an integer >= 1. Source: as `generalized_reverse_kl`.
    """

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        p = jnp.exp(lp)
        return (jnp.where(side.in_top_set, p * (lp - lq) - p + jnp.exp(lq), 0.0),)

    return Divergence(phi, top_set=_leading("generalized_kl", k))


def generalized_reverse_kl(k: int = 32, sampled_tail: bool = False) -> Divergence:
    """g(q, p) = sum_S [q log(q/p) - q + p], S the teacher's k largest entries, ties with the smallest included.

    Gradient: q (u - <q, u>) with u = log(q/p) on S, 0 elsewhere. 0 <= g <= reverse KL of k + 1 entries <= KL(q || p),
    and g = 0 only where q = p on S. ValueError unless k is an integer >= 1.

    `sampled_tail`, for text y ~ q only, adds the gradient of 1[y not in S] log q(y) sg(log(q/p)(y)). The expected
    gradient is then that of KL(q || p), and the value sum_S q log(q/p) + 1[y not in S] log(q/p)(y) its unbiased
    estimate, which may be negative. Differentiating sum_S q log(q/p) beside that tail would be biased by the gradient
    of q(S). With a top-k teacher, p(y) is exact if y is stored beside the k largest; otherwise all entries that are not
    stored count as one, and the expected gradient is that of the reverse KL of the stored entries and their tail.

    Source: MOPD (arXiv 2606.30406), Eq. 5, quoted from a discussion of it; the tail is derived.
    """

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        p, q, gap = jnp.exp(lp), jnp.exp(lq), lq - lp
        inside = q * gap - q + p
        if not sampled_tail:
            return (jnp.where(side.in_top_set, inside, 0.0),)
        inside += jax.lax.stop_gradient(q - p)  # the value is sum_S q log(q/p), the gradient that of g
        return (jnp.where(side.in_top_set, inside, jnp.where(side.is_target, sloped(gap, lq, gap), 0.0)),)

    return Divergence(phi, top_set=_leading("generalized_reverse_kl", k))


def sampled_reverse_kl(baseline: bool = False) -> Divergence:
    """-A log q(y), A = log p(y) - log q(y) without gradient, y ~ q the next token: KL(q || p) from one sample.

    The value is log q(y) - log p(y), whose mean is KL(q || p) and which may be negative; the gradient is that of
    -A log q(y), log(q/p)(y) (onehot(y) - q), whose mean is that of KL(q || p). `baseline` adds the exact KL(q || p),
    without gradient, to A: the same mean, and a lower variance beyond a handful of tokens. Back-propagating the value
    itself would have mean gradient 0. Biased on text that the student did not write at this temperature and step: weigh
    by author, and see `policy_gradient`. `reverse_kl` is the exact form, at the same cost where the teacher's whole
    distribution is there. With a top-k teacher that did not store y, y is the whole tail.
    Source: on-policy distillation (Thinking Machines 2025); the baseline is vOPD's (arXiv 2605.07865), derived.
    """

    def phi(lp: Array, lq: Array, side: Side) -> tuple[Array, ...]:
        gap = lq - lp
        drawn = [jnp.where(side.is_target, x, 0.0) for x in (gap, lq)]
        return (*drawn, jnp.exp(lq) * gap) if baseline else tuple(drawn)

    def combine(gap: Array, lq: Array, *kl: Array) -> Array:
        return sloped(gap, lq, gap - kl[0] if kl else gap)

    return Divergence(phi, combine)


def partial_kl() -> Divergence:
    """sum_S p (log p - log q) over the teacher's stored entries S, without renormalisation.

    Ignores the tail on both sides. Not a divergence: it may be negative, and its minimum puts more than p on S
    (with P = p(S) the gradient P q - p vanishes at q = p/P). For comparison with other libraries' runs (verl's
    `forward_kl_topk`); `forward_kl` on a top-k teacher keeps the tail.
    """
    return forward_kl()._replace(support="partial")


def conditional_kl() -> Divergence:
    """KL(p/P || q/Q) within the teacher's stored entries S, P = p(S) and Q = q(S).

    Ignores how much mass the student puts on S, so combine it with a cross-entropy term. Gradient: q/Q - p/P on S, none
    elsewhere. As in tunix's `distill_top_k` and MaxText.
    """
    return forward_kl()._replace(support="conditional")


def renormalized_kl() -> Divergence:
    """KL(p/P || q): the teacher renormalised on its stored entries S, the student not.

    Ignores the teacher's tail, so it drives the student's tail to zero. Gradient: q - p/P on S, q elsewhere. As in
    Gemma's reports: stored entries renormalised, zero for the rest.
    """
    return forward_kl()._replace(support="renormalized")


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


def teacher_entropy() -> Divergence:
    """H(p) = -sum p log p, a measurement for token weights; of a top-k teacher its tail counts as one entry."""
    return Divergence(lambda lp, lq, side: (-jnp.exp(lp) * lp,))


def z_loss() -> Divergence:
    """(log sum_v exp z_v)^2: keeps the logits' normaliser near 1 (PaLM, arXiv 2204.02311, section 5: weight 1e-4).

    Gradient: 2 log Z q. The only term that depends on the magnitude of the logits.
    """
    return Divergence(lambda lp, lq, side: (), jnp.square, uses_teacher=False, normaliser=True)
