"""Which rows an interval trains on, in numpy on the host: a pure function of `Mixture`, seed and domain sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxkd.data.permute import permute

# Tags that keep the uses of a seed apart: the order within a domain, an interval's shuffle, rows that a rule measures.
_ROWS, _SHUFFLE, _PROBE = 1, 2, 3


class Mixture(NamedTuple):
    """State that determines the rows of an interval."""

    sampling: np.ndarray  # float64 [domains], sums to 1: shares of the rows
    rule_state: dict[str, Any]  # the re-weighting rule's own
    drawn: np.ndarray  # int64 [domains], rows drawn before this interval
    interval: int


def _checked_sizes(sizes: Sequence[int]) -> np.ndarray:
    array = np.asarray(sizes, np.int64)
    if array.ndim != 1 or array.size == 0 or (array < 0).any():
        raise ValueError(f"domain sizes must be a list of row counts, got {sizes}")
    return array


def natural(sizes: Sequence[int]) -> np.ndarray:
    """`size / sum(sizes)`, [domains], of domains' rows; ValueError when there are none."""
    return fixed(sizes, sizes)


def uniform(sizes: Sequence[int]) -> np.ndarray:
    """`1 / domains`, [domains]; ValueError when a domain has no rows."""
    return fixed([1.0] * len(sizes), sizes)


def fixed(weights: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    """`weight / sum(weights)`, [domains], of finite weights >= 0; ValueError for a weight on a domain without rows."""
    rows, shares = _checked_sizes(sizes), np.asarray(weights, np.float64)
    if shares.shape != rows.shape:
        raise ValueError(f"{shares.size} domain weights were given for {rows.size} domains: give one per domain")
    if not np.isfinite(shares).all() or (shares < 0).any():
        raise ValueError(f"domain weights must be finite and not negative, got {list(weights)}")
    if shares.sum() <= 0:
        raise ValueError("all domain weights are zero: give at least one domain a positive weight")
    empty = np.nonzero((shares > 0) & (rows == 0))[0]
    if empty.size:
        raise ValueError(f"domain {empty[0]} has a positive weight but no rows")
    return shares / shares.sum()


def init(sampling: np.ndarray) -> Mixture:
    """The first interval's mixture. Raises ValueError unless `sampling` [domains] is non-negative and sums to 1."""
    return Mixture(_checked_sampling(sampling), {}, np.zeros(len(sampling), np.int64), 0)


def _checked_sampling(sampling: np.ndarray) -> np.ndarray:
    shares = np.asarray(sampling, np.float64)
    if shares.ndim != 1 or not np.isfinite(shares).all() or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"sampling must be a vector of shares >= 0 that sum to 1, got {shares.tolist()}")
    return shares


def counts(sampling: np.ndarray, rows: int) -> np.ndarray:
    """Rows per domain int64 [domains], by the largest remainder: their sum is `rows`, each is within 1 of its share."""
    shares = _checked_sampling(sampling)
    exact = shares / shares.sum() * rows
    whole = np.floor(exact).astype(np.int64)
    left = rows - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:left]] += 1
    return whole


def order(mixture: Mixture, sizes: Sequence[int], seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of an interval, in training order.

    The n-th row ever drawn from a domain is `permute(n % size, size, key)` with a key per epoch `n // size`:
    each epoch visits every row once. The rows of all domains are then shuffled with a key per interval. `rows` counts
    the whole interval: the order depends on it, so a resumed run passes the same number.

    Gives domain and row (an index in that domain), int64 [rows]; ValueError where a domain to draw from is empty.
    """
    size = _checked_sizes(sizes)
    if size.shape != mixture.sampling.shape:
        raise ValueError(f"the mixture has {mixture.sampling.size} domains, but {size.size} sizes were given")
    share = counts(mixture.sampling, rows)
    if ((share > 0) & (size == 0)).any():
        raise ValueError(f"domain {int(np.argmax((share > 0) & (size == 0)))} is drawn from but has no rows")
    domain = np.repeat(np.arange(size.size, dtype=np.int64), share)
    row = np.empty(rows, np.int64)
    for d in np.nonzero(share)[0]:
        n = int(mixture.drawn[d]) + np.arange(share[d], dtype=np.int64)
        row[domain == d] = permute(n % size[d], int(size[d]), (seed, _ROWS, int(d), n // size[d]))
    shuffle = permute(np.arange(rows), max(rows, 1), (seed, _SHUFFLE, mixture.interval))
    return domain[shuffle], row[shuffle]


def probe(domain: int, size: int, seed: int, interval: int, rows: int) -> np.ndarray:
    """Indices [rows] of training rows that a rule measures before an interval; no row repeats until all were used."""
    n = interval * rows + np.arange(rows, dtype=np.int64)
    return permute(n % size, size, (seed, _PROBE, domain, n // size))


def advance(mixture: Mixture, rows: int, sampling: np.ndarray | None = None) -> Mixture:
    """The next interval's mixture, after one of `rows` rows; `sampling` None keeps the shares [domains]."""
    new = mixture.sampling if sampling is None else _checked_sampling(sampling)
    if new.shape != mixture.sampling.shape:
        raise ValueError(f"the mixture has {mixture.sampling.size} domains, the new sampling has {new.size}")
    return mixture._replace(
        sampling=new, drawn=mixture.drawn + counts(mixture.sampling, rows), interval=mixture.interval + 1
    )
