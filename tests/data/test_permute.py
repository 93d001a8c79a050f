"""The keyed permutation is one, depends on its key, and looks random."""

import numpy as np
from corpus import quick
from hypothesis import given
from hypothesis import strategies as st

from jaxkd.data.permute import permute


@quick
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70))
def test_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@quick
@given(st.integers(1, 500), st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_each_index_alone_gives_the_same(size, key):
    together = permute(np.arange(size), size, tuple(key))
    one = size // 2
    assert permute(np.array([one]), size, tuple(key))[0] == together[one]


def test_values_keys_and_large_ranges():
    """The values decide which rows a run reads: they must never change."""
    assert permute(np.arange(10), 10, (1, 2)).tolist() == [2, 9, 4, 3, 1, 8, 6, 7, 5, 0]
    orders = {tuple(permute(np.arange(50), 50, key)) for key in [0, 1, (0, 0), (0, 1), (1, 0), (0, 0, 0)]}
    assert len(orders) == 6
    epoch = np.repeat([0, 1, 2], 20)
    together = permute(np.tile(np.arange(20), 3), 20, (7, epoch))  # a key for each index
    np.testing.assert_array_equal(together, np.concatenate([permute(np.arange(20), 20, (7, e)) for e in range(3)]))
    size = 2**61 + 3
    index = np.array([0, 1, size - 1])
    result = permute(index, size, 5)
    assert len(set(result)) == 3
    assert result.min() >= 0
    assert result.max() < size


def test_positions_are_uniform():
    """Where element 0 of 8 goes, over 4000 keys: chi-square with 7 degrees of freedom, 0.1% at 24.3."""
    for element in (0, 5):
        positions = permute(np.full(4000, element), 8, (np.arange(4000),))
        observed = np.bincount(positions, minlength=8)
        assert ((observed - 500) ** 2 / 500).sum() < 24.3
