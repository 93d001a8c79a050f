"""An interval's rows: right counts, each row once per epoch, and a pure function of the state."""

import numpy as np
import pytest
from corpus import quick
from hypothesis import given
from hypothesis import strategies as st

from jaxkd.data import mixture as mixtures

shares = st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda w: sum(w) > 0.01)


@quick
@given(shares, st.integers(0, 5000))
def test_counts_within_one_row(weights, rows):
    sampling = mixtures.fixed(weights, [1] * len(weights))
    counts = mixtures.counts(sampling, rows)
    assert counts.sum() == rows
    assert (np.abs(counts - sampling * rows) < 1 + 1e-6).all()
    assert (counts[np.array(weights) == 0] == 0).all()


@quick
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 1)), min_size=1, max_size=4),
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.integers(0, 100),
)
def test_each_epoch_visits_each_row_once(domains, intervals, seed):
    sizes = [size for size, _ in domains]
    mixture = mixtures.init(mixtures.fixed([weight for _, weight in domains], sizes))
    seen: list[list[int]] = [[] for _ in sizes]
    for rows in intervals:
        before = mixture.drawn.copy()
        domain, row = mixtures.order(mixture, sizes, seed, rows)
        mixture = mixtures.advance(mixture, rows)
        np.testing.assert_array_equal(np.bincount(domain, minlength=len(sizes)), mixture.drawn - before)
        for d, size in enumerate(sizes):
            drawn = row[domain == d]
            assert ((drawn >= 0) & (drawn < size)).all()
            seen[d].extend(drawn)
            # Within an interval the order is shuffled, so whole epochs are compared as counts.
            times = np.bincount(seen[d], minlength=size)
            assert times.max() - times.min() <= 1


def test_order_zero_shares_and_advance():
    sizes, mixture = [30, 50], mixtures.init(np.array([0.3, 0.7]))
    once, again = mixtures.order(mixture, sizes, 3, 40), mixtures.order(mixture, sizes, 3, 40)
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, mixtures.order(mixture, sizes, 4, 40))
    assert not np.array_equal(once[0], mixtures.order(mixture._replace(interval=1), sizes, 3, 40)[0])
    alone = mixtures.init(np.array([1.0]))
    halves = [mixtures.order(m, [100], 0, 50)[1] for m in (alone, mixtures.advance(alone, 100))]
    assert set(halves[0]) != set(halves[1])  # of two epochs: the same half only if the key ignored the epoch
    domain, _ = mixtures.order(mixtures.init(np.array([0.5, 0.5])), [1000, 1000], 0, 1000)
    assert 200 < domain[:500].sum() < 300  # interleaved
    for rows in range(1, 200):
        assert mixtures.counts(np.array([0.0, 0.1, 0.2, 0.7]), rows)[0] == 0
    mixture = mixtures.advance(mixtures.init(np.array([0.25, 0.75])), 8, np.array([0.5, 0.5]))
    assert mixture.drawn.tolist() == [2, 6]
    assert mixture.interval == 1
    assert mixture.sampling.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixtures.fixed([1], [1, 1]), "domain weights"),
        (lambda: mixtures.fixed([1, -1], [1, 1]), "domain weights"),
        (lambda: mixtures.fixed([1, float("nan")], [1, 1]), "domain weights"),
        (lambda: mixtures.fixed([0, 0], [1, 1]), "domain weights"),
        (lambda: mixtures.fixed([1, 1], [1, 0]), "domain 1"),
        (lambda: mixtures.uniform([]), "domain sizes"),
        (lambda: mixtures.init(np.array([0.5, 0.6])), "sampling"),
        (lambda: mixtures.order(mixtures.init(np.array([1.0])), [1, 2], 0, 4), "2 sizes"),
        (lambda: mixtures.order(mixtures.init(np.array([1.0])), [0], 0, 4), "domain 0"),
        (lambda: mixtures.advance(mixtures.init(np.array([1.0])), 4, np.array([0.5, 0.5])), "sampling"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
