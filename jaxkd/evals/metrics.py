"""Figures of generated text, one per example, and intervals of their means."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 1000
_Z = 1.959963984540054  # the normal distribution's 97.5% quantile


class Estimate(NamedTuple):
    """A mean over examples and its 95% interval."""

    value: float
    low: float
    high: float
    examples: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of the examples that have a value (NaN is none), None without any.

    The interval is Wilson's for values of 0 and 1 (J. Am. Stat. Assoc. 22, 1927), else the percentile bootstrap over
    examples (Efron 1979) with a fixed seed.
    """
    x = np.asarray([value for value in values if not math.isnan(value)], np.float64)
    n = len(x)
    if not n:
        return None
    mean = float(x.mean())
    if np.isin(x, (0.0, 1.0)).all():
        centre, spread = mean + _Z**2 / (2 * n), _Z * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
        low, high = ((centre + sign * spread) / (1 + _Z**2 / n) for sign in (-1, 1))
        return Estimate(mean, max(low, 0.0), min(high, 1.0), n)
    rng = np.random.default_rng(0)
    means = [x[rng.integers(n, size=n)].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(mean, float(low), float(high), n)


def normalised(text: str) -> str:
    """A text as `exact` compares it: case folded, white space as single spaces, without a full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the probability that k of n completions, c of them correct, have a correct one.

    Unbiased: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def distinct(texts: Iterable[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams of texts, each its words or tokens; NaN without any (arXiv 1510.03055)."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU, from 0 to 1, of each completion of one prompt against its others (arXiv 1802.01886), by sacrebleu."""
    import sacrebleu

    others = lambda i: [text for j, text in enumerate(texts) if j != i]
    scores = [sacrebleu.sentence_bleu(text, others(i)).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores) / 100


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, of the best reference (Lin 2004), by rouge-score.

    Words are runs of ASCII letters and digits in lower case, unstemmed: text in other scripts has none.
    """
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"]).score_multi(list(references), text)["rougeL"].fmeasure
