"""Rules that re-weight the mixture of domains from measurements: a recipe's `data.mixture` is a call of one of them.

Pure functions in numpy float64 on the host, identical on every process; states are JSON values.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxkd.data import mixture as mixtures
from jaxkd.losses.group_dro import GroupDRO

__all__ = ["ddk", "doge", "doremi", "doremi_proxy", "fixed", "natural", "sheared_llama", "staged"]
__all__ += ["temperature", "uniform"]

State = dict[str, Any]  # JSON values


class Gaps(NamedTuple):
    """Measured on each domain's fixed held-out rows, float64 [domains]."""

    student_nats: np.ndarray  # per token
    teacher_nats: np.ndarray
    student_bits_per_byte: np.ndarray
    teacher_bits_per_byte: np.ndarray


class Gradients(NamedTuple):
    """Inner products of the domains' gradients: of the student's loss on training rows, at an interval's beginning."""

    products: np.ndarray  # float64 [domains, domains], g_i . g_j
    lr: float  # of the next step


class Rule(NamedTuple):
    """The domains' shares from interval to interval.

    `init(sizes, measured) -> (sampling, state)` gives the first interval's shares, from the rows per domain and a
    measurement before the first step. `update(state, measured, interval) -> (sampling, state)` gives those of
    `interval`, from a measurement at its beginning. `measures` is the measurement's type: `Gaps` (for `init` too),
    `Gradients` (for `update` only), or None. "average" in the state, [domains], is stored at the run's end, for
    `doremi`. `group_dro` re-weights the domains in the loss as well.
    """

    init: Callable[[Sequence[int], Any], tuple[np.ndarray, State]]
    update: Callable[[State, Any, int], tuple[np.ndarray, State]]
    measures: type | None = None
    group_dro: GroupDRO | None = None


ByName = Callable[[tuple[str, ...]], Rule]
"""A rule whose arguments name domains: a function of the names of all domains, in order."""


def _constant(shares: Callable[[Sequence[int]], np.ndarray]) -> Rule:
    def init(sizes: Sequence[int], start: Gaps | None) -> tuple[np.ndarray, State]:
        sampling = shares(sizes)
        return sampling, {"sampling": sampling.tolist()}

    return Rule(init, lambda state, gaps, interval: (np.asarray(state["sampling"]), state))


def natural() -> Rule:
    """Constant shares in proportion to the domains' rows: w_i = n_i / sum n."""
    return _constant(mixtures.natural)


def uniform() -> Rule:
    """Constant equal shares: w_i = 1 / N."""
    return _constant(mixtures.uniform)


def temperature(t: float) -> Rule:
    """Constant flattened sizes: w_i ~ n_i^(1/t), t >= 1 (3 to 5 for multilingual models); 1 is natural."""
    if not t >= 1:
        raise ValueError(f"temperature must be at least 1, got {t}")
    return _constant(lambda sizes: mixtures.fixed([size ** (1 / t) for size in sizes], sizes))


def fixed(weights: Sequence[float]) -> Rule:
    """Constant shares from weights >= 0, one per domain in the domains' order; normalised."""
    return _constant(lambda sizes: mixtures.fixed(list(weights), sizes))


def staged(stages: Mapping[int, Sequence[float]]) -> Rule:
    """Shares by {first interval: weights, one per domain}; one stage begins at interval 0."""
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

    r_{t+1} are interval t+1's shares, between (1 - alpha) / N and alpha + (1 - alpha) / N. The first interval is drawn
    from the whole pool, as in Algorithm 1, and r_0 only starts the recursion. Gaps are between cross-entropies with the
    text. Computed in log space, so ratios of thousands do not overflow.

    Args:
        alpha: weight of the gaps in a share; 0 is uniform.
        score: rho: "perplexity_ratio" as in the paper; "excess_loss", nats_S - nats_T, which an untrained student
            does not saturate; "bits_per_byte", exp of the difference per byte, for different tokenizers.
        clip: largest rho, 0 for none.
        smooth: False is the paper's ablation: the shares of an interval are Eq. 1 at its beginning.
        first: the first interval's shares: "natural" (the pool as it is) or "uniform".

    Source: DDK (arXiv 2407.16154), Eq. 1, Eq. 2, Algorithm 1; alpha 0.5, an interval of 1,000 steps.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if score not in _SCORES:
        raise ValueError(f"unknown score '{score}': known: {', '.join(_SCORES)}")
    if not clip >= 0:
        raise ValueError(f"clip must be at least 0, got {clip}")
    begin = _start(first)

    def rho(gaps: Gaps | None) -> np.ndarray:
        assert gaps is not None
        if score == "bits_per_byte":
            values = np.exp(np.log(2) * (gaps.student_bits_per_byte - gaps.teacher_bits_per_byte))
        else:
            values = np.asarray(gaps.student_nats - gaps.teacher_nats, np.float64)
            values = np.exp(values) if score == "perplexity_ratio" else values
        _require_finite(values, score)
        return np.minimum(values, clip) if clip else values

    def init(sizes: Sequence[int], start: Gaps | None) -> tuple[np.ndarray, State]:
        sampling, values = begin(sizes), rho(start)
        return sampling, {"log_r": _log_softmax(values).tolist(), "rho": values.tolist()}

    def update(state: State, gaps: Gaps | None, interval: int) -> tuple[np.ndarray, State]:
        values = rho(gaps)
        if smooth:
            share = np.exp(_log_softmax(np.asarray(state["log_r"]) + values))
            sampling = alpha * share + (1 - alpha) / len(values)
        else:
            sampling = np.exp(_log_softmax(values))
        with np.errstate(divide="ignore"):
            log_r = np.maximum(np.log(sampling), -1e6)  # finite, so that JSON can hold it
        return sampling / sampling.sum(), {"log_r": log_r.tolist(), "rho": values.tolist()}

    return Rule(init, update, Gaps)


def sheared_llama(floor: float = 1e-4) -> Rule:
    """Dynamic batch loading: exponentiated-gradient weights by how far the student's loss exceeds the teacher's.

        delta_i = max(nats_S(i) - nats_T(i), 0),   w_i <- w_i exp(delta_i) / sum,   w_i <- (1 - c) w_i + c / N

    Source: Sheared LLaMA (arXiv 2310.06694), Algorithm 1, whose reference loss is the source model's; step size 1 and
    `floor` c as in the authors' code, which clamps nothing.
    """
    _require_floor(floor)

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

    return Rule(init, update, Gaps)


def doremi_proxy(eta: float = 1.0, floor: float = 1e-4, first: str = "uniform") -> Rule:
    """DoReMi's proxy run: constant shares, and weights in the loss that rise where the student is behind.

        lambda_i = mean over the batch's tokens of domain i of max(loss - teacher's loss, 0)
        log w <- log w + eta lambda,   w <- (1 - c) w / sum w + c / N,   the loss of domain i counts w_i / share_i

    inside every step (`jaxkd/losses/group_dro.py`), from the losses up to the previous one. The teacher is the paper's
    reference model. The mean of w over all steps is stored at the end, in `domain_weights.json`; a second run draws
    rows by it: `doremi("runs/proxy")`. `first` gives the shares: "uniform" as in the paper, or "natural".

    Source: DoReMi (arXiv 2305.10429), Algorithm 1 and the authors' code; `floor` c is 1e-3 in the paper, 1e-4 there.
    """
    if not eta >= 0:
        raise ValueError(f"eta must be at least 0, got {eta}")
    _require_floor(floor)
    return _constant(_start(first))._replace(group_dro=GroupDRO(eta, floor))


def doremi(proxy: str) -> ByName:
    """Constant shares, the average weights of another run: the second run of DoReMi and of DoGE.

    `proxy` is the workdir of a finished run under `doremi_proxy` or `doge`, over the same domains. `init` raises
    FileNotFoundError or ValueError where it is not.
    """
    return lambda domains: _constant(lambda sizes: mixtures.fixed(_stored_weights(proxy, domains), sizes))


DOMAIN_WEIGHTS = "domain_weights.json"
"""Written by a finished `doremi_proxy` or `doge` run: {"mixture": its rule, "steps": ..., "weights": {domain: w}}."""


def _stored_weights(run: str, domains: tuple[str, ...]) -> list[float]:
    workdir = Path(run).expanduser()
    if not workdir.is_dir():
        raise FileNotFoundError(f"data.mixture: there is no run at {run}: train it first, with 'doremi_proxy()'")
    try:
        weights = json.loads((workdir / DOMAIN_WEIGHTS).read_text(encoding="utf-8"))["weights"]
    except FileNotFoundError:
        reason = "it is not finished (its command resumes it), or ran neither 'doremi_proxy()' nor 'doge()'"
        raise ValueError(f"data.mixture: the run at {run} has no {DOMAIN_WEIGHTS}: {reason}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"data.mixture: {workdir / DOMAIN_WEIGHTS} is damaged: run that run's command again") from None
    if set(weights) != set(domains):
        names = f"{', '.join(weights)}, this one {', '.join(domains)}"
        raise ValueError(f"data.mixture: the run at {run} has the domains {names}: train a proxy on the same")
    return [weights[name] for name in domains]


def doge(mu: float = 0.05, targets: Sequence[str] = (), norm: float = 1.0, limit: float = 5.0) -> ByName:
    """DoGE: domains weighted by how much a gradient step on each of them helps the others, or given targets.

        score_i = lr <g_i, sum_{j != i} g_j> / mean_j |g_j|,  clipped to [0, limit lr]     (universal)
        score_i = lr <g_i, sum_{j in targets} g_j> / mean_j |g_j|, clipped likewise        (out of domain)
        log w_i <- log w_i + score_i / mu,   w <- w / sum w

    g_i is the gradient of the student's own loss on training rows of domain i, at each interval's beginning. The paper
    updates w at every step and weighs the losses; here rows are drawn by w, which is the same in expectation, and w is
    updated once an interval: for the paper's pace divide mu by the interval's steps. The mean of w is stored at the
    end, and a second run draws by it: `doremi("runs/proxy")`.

    Args:
        mu: inverse step size of log w.
        targets: names of domains that are measured and never drawn; none for universal.
        norm: each gradient is clipped to this norm first, 0 for none.
        limit: largest score, in learning rates.

    Source: DoGE (arXiv 2310.15393), Algorithm 1; mu, the mean norm and both clips as in the authors' code.
    """
    if not mu > 0 or not norm >= 0 or not limit > 0:
        raise ValueError(f"doge needs mu > 0, norm >= 0 and limit > 0, got {mu}, {norm} and {limit}")
    targets = (targets,) if isinstance(targets, str) else tuple(targets)

    def named(domains: tuple[str, ...]) -> Rule:
        unknown = [name for name in targets if name not in domains]
        if unknown:
            raise ValueError(f"doge: targets name no domain '{unknown[0]}': known: {', '.join(domains)}")
        trained = np.asarray([name not in targets for name in domains])
        if not trained.any():
            raise ValueError("doge: targets names all domains, so none is left to train on")
        return _doge(trained, mu, norm, limit)

    return named


def _doge(trained: np.ndarray, mu: float, norm: float, limit: float) -> Rule:
    """DoGE's rule; `trained` [domains] bool is False for targets."""
    universal = bool(trained.all())

    def init(sizes: Sequence[int], start: Any) -> tuple[np.ndarray, State]:
        begin = mixtures.fixed(trained.astype(float).tolist(), sizes)
        return begin, {"log_w": np.log(begin[trained]).tolist(), "average": begin.tolist(), "updates": 0}

    def update(state: State, measured: Any, interval: int) -> tuple[np.ndarray, State]:
        _require_finite(measured.products.sum(1), "gradient")
        lengths = np.sqrt(np.diag(measured.products))
        scale = np.minimum(1.0, norm / (lengths + 1e-6)) if norm else np.ones_like(lengths)
        products = (measured.products * np.outer(scale, scale))[trained]
        helped = products.sum(1) - np.diag(products) if universal else products[:, ~trained].sum(1)
        score = measured.lr * helped / ((lengths * scale)[trained].mean() + 1e-6)
        score = np.clip(score, 0.0, limit * measured.lr)
        log_w = _log_softmax(np.asarray(state["log_w"]) + score / mu)
        sampling = np.zeros(len(trained))
        sampling[trained] = np.exp(log_w)
        average, count = np.asarray(state["average"]), state["updates"] + 1
        average = average + (sampling - average) / count
        return sampling, {"log_w": log_w.tolist(), "average": average.tolist(), "updates": count}

    return Rule(init, update, Gradients)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def _start(first: str) -> Callable[[Sequence[int]], np.ndarray]:
    if first not in ("natural", "uniform"):
        raise ValueError(f"first must be natural or uniform, got '{first}'")
    return getattr(mixtures, first)


def _require_floor(floor: float) -> None:
    if not 0 <= floor < 1:
        raise ValueError(f"floor must be from 0 to below 1, got {floor}")


def _require_finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"the {what} of domain {int(np.argmin(np.isfinite(values)))} is not finite: {values.tolist()}")
