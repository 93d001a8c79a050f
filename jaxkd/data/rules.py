"""How the mixture of domains follows from what was measured: rules as pairs of pure functions.

Plain numpy in float64 on the host, the same on every process; states are JSON values, and JSON keeps every bit of a
float. A recipe's `data.mixture` is a call of one of these functions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxkd.data import mixture as mixtures

__all__ = ["ddk", "fixed", "natural", "sheared_llama", "staged", "temperature", "uniform"]

State = dict[str, Any]
"""What a rule keeps between intervals, as JSON values."""


class Gaps(NamedTuple):
    """What was measured on each domain's fixed held-out rows, float64 [domains]."""

    student_nats: np.ndarray  # per token
    teacher_nats: np.ndarray
    student_bits_per_byte: np.ndarray
    teacher_bits_per_byte: np.ndarray


class Rule(NamedTuple):
    """How the shares of the domains change from interval to interval.

    `init(sizes, start) -> (sampling, state)` gives the first interval's shares, from the rows per domain and what was
    measured before the first step. `update(state, gaps, interval) -> (sampling, state)` gives those of `interval`, from
    what was measured at its beginning. `measures` says whether they read what is measured; None is passed otherwise.
    """

    init: Callable[[Sequence[int], Gaps | None], tuple[np.ndarray, State]]
    update: Callable[[State, Gaps | None, int], tuple[np.ndarray, State]]
    measures: bool = False


def _constant(shares: Callable[[Sequence[int]], np.ndarray]) -> Rule:
    def init(sizes: Sequence[int], start: Gaps | None) -> tuple[np.ndarray, State]:
        sampling = shares(sizes)
        return sampling, {"sampling": sampling.tolist()}

    return Rule(init, lambda state, gaps, interval: (np.asarray(state["sampling"]), state))


def natural() -> Rule:
    """In proportion to the domains' rows, always: w_i = n_i / sum n."""
    return _constant(mixtures.natural)


def uniform() -> Rule:
    """The same share for every domain, always: w_i = 1 / N."""
    return _constant(mixtures.uniform)


def temperature(t: float) -> Rule:
    """Flattened sizes: w_i ~ n_i^(1/t); 1 is natural, and large t comes to uniform.

    Args:
        t: at least 1.

    Raises:
        ValueError: for a smaller one.

    Source: the practice of multilingual models, t from 3 to 5; recalled.
    """
    if not t >= 1:
        raise ValueError(f"temperature must be at least 1, got {t}")
    return _constant(lambda sizes: mixtures.fixed([size ** (1 / t) for size in sizes], sizes))


def fixed(weights: Sequence[float]) -> Rule:
    """Given shares, always.

    Args:
        weights: one per domain, at least 0, in the domains' order; normalised.
    """
    return _constant(lambda sizes: mixtures.fixed(list(weights), sizes))


def staged(stages: Mapping[int, Sequence[float]]) -> Rule:
    """Given shares that change at given intervals.

    Args:
        stages: {first interval: weights, one per domain}; one begins at 0.

    Raises:
        ValueError: when no stage begins at interval 0.
    """
    if not isinstance(stages, Mapping) or 0 not in stages or any(type(n) is not int or n < 0 for n in stages):
        raise ValueError(f"stages must map intervals to weights, and one begins at 0, got {stages!r}")

    def init(sizes: Sequence[int], start: Gaps | None) -> tuple[np.ndarray, State]:
        table = {str(n): mixtures.fixed(list(weights), sizes).tolist() for n, weights in sorted(stages.items())}
        return np.asarray(table["0"]), {"stages": table}

    def update(state: State, gaps: Gaps | None, interval: int) -> tuple[np.ndarray, State]:
        now = max((n for n in map(int, state["stages"]) if n <= interval), default=0)
        return np.asarray(state["stages"][str(now)]), state

    return Rule(init, update)


_SCORES = ("perplexity_ratio", "excess_loss", "bits_per_byte")


def ddk(
    alpha: float = 0.5, score: str = "perplexity_ratio", clip: float = 0.0, smooth: bool = True, first: str = "natural"
) -> Rule:
    """Domains weighted by the gap between student and teacher, smoothly: DDK.

        rho_i = ppl_S(i) / ppl_T(i) = exp(nats_S - nats_T)
        r_0 = softmax(rho)                                                       (Eq. 1)
        psi_i = r_t(i) exp(rho_i),   r_{t+1} = alpha psi / sum psi + (1 - alpha) / N    (Eq. 2)

    r_{t+1} are interval t+1's shares. The first interval is drawn from the whole pool, as in Algorithm 1, and r_0 is
    only where the recursion begins. Computed in log space, so that a ratio of thousands is no overflow. No share is
    ever below (1 - alpha) / N or above alpha + (1 - alpha) / N. With constant gaps the fixed point is
    r_i = ((1 - alpha) / N) / (1 - alpha exp(rho_i) / Z).

    Args:
        alpha: how much of a share follows the gaps; 0 is uniform.
        score: rho: "perplexity_ratio" as in the paper; "excess_loss", nats_S - nats_T, which an untrained student
            does not saturate; "bits_per_byte", exp of the difference per byte, for unlike tokenizers.
        clip: largest rho, 0 for none.
        smooth: False is the paper's ablation: the shares of an interval are Eq. 1 at its beginning.
        first: the first interval's shares: "natural" (the pool as it is) or "uniform".

    Raises:
        ValueError: for values that these cannot be; when a gap is not finite.

    Source: DDK (arXiv 2407.16154), Eq. 1, Eq. 2, Algorithm 1; alpha 0.5, an interval of 1,000 steps.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if score not in _SCORES:
        raise ValueError(f"unknown score '{score}': known: {', '.join(_SCORES)}")
    if not clip >= 0:
        raise ValueError(f"clip must be at least 0, got {clip}")
    if first not in ("natural", "uniform"):
        raise ValueError(f"first must be natural or uniform, got '{first}'")

    def rho(gaps: Gaps | None) -> np.ndarray:
        assert gaps is not None
        if score == "bits_per_byte":
            found = np.exp(np.log(2) * (gaps.student_bits_per_byte - gaps.teacher_bits_per_byte))
        else:
            found = np.asarray(gaps.student_nats - gaps.teacher_nats, np.float64)
            found = np.exp(found) if score == "perplexity_ratio" else found
        _require_finite(found, score)
        return np.minimum(found, clip) if clip else found

    def init(sizes: Sequence[int], start: Gaps | None) -> tuple[np.ndarray, State]:
        begin = mixtures.natural(sizes) if first == "natural" else mixtures.uniform(sizes)
        found = rho(start)
        return begin, {"log_r": _log_softmax(found).tolist(), "rho": found.tolist()}

    def update(state: State, gaps: Gaps | None, interval: int) -> tuple[np.ndarray, State]:
        found = rho(gaps)
        count = len(found)
        if smooth:
            share = np.exp(_log_softmax(np.asarray(state["log_r"]) + found))
            sampling = alpha * share + (1 - alpha) / count
        else:
            sampling = np.exp(_log_softmax(found))
        with np.errstate(divide="ignore"):
            log_r = np.maximum(np.log(sampling), -1e6)  # finite, so that JSON can hold it
        return sampling / sampling.sum(), {"log_r": log_r.tolist(), "rho": found.tolist()}

    return Rule(init, update, measures=True)


def sheared_llama(floor: float = 1e-4) -> Rule:
    """Domains weighted by how far the student is above the teacher, without forgetting: dynamic batch loading.

        delta_i = max(nats_S(i) - nats_T(i), 0),   w_i <- w_i exp(delta_i) / sum,   w_i <- (1 - c) w_i + c / N

    The paper's reference loss is the source model's; here it is the teacher's.

    Args:
        floor: c, as in the authors' code; the paper has none.

    Raises:
        ValueError: for a floor outside [0, 1); when a gap is not finite.

    Source: Sheared LLaMA (arXiv 2310.06694), Algorithm 1; the code's step size 1 and floor 1e-4; it clamps nothing.
    """
    if not 0 <= floor < 1:
        raise ValueError(f"floor must be from 0 to below 1, got {floor}")

    def init(sizes: Sequence[int], start: Gaps | None) -> tuple[np.ndarray, State]:
        begin = mixtures.natural(sizes)
        return begin, {"log_w": np.log(np.maximum(begin, 1e-300)).tolist()}

    def update(state: State, gaps: Gaps | None, interval: int) -> tuple[np.ndarray, State]:
        assert gaps is not None
        delta = np.maximum(np.asarray(gaps.student_nats - gaps.teacher_nats, np.float64), 0.0)
        _require_finite(delta, "excess loss")
        share = np.exp(_log_softmax(np.asarray(state["log_w"]) + delta))
        share = (1 - floor) * share + floor / len(share)
        return share, {"log_w": np.log(np.maximum(share, 1e-300)).tolist()}

    return Rule(init, update, measures=True)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def _require_finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        raise ValueError(
            f"the {what} of domain {int(np.argmin(np.isfinite(values)))} is {values.tolist()}: no finite gap"
        )
