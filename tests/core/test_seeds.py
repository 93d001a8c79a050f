"""Every seed has a key of its own."""

import jax
import numpy as np
import pytest

from jaxkd.core import seeds

SMALL = (0, 5, 2**31 - 1, 2**31, 2**32 - 1)


def test_keys():
    large = (2**32, 2**32 + 5, 2**33, 2**40 + 5, 2**63 - 1)
    keys = [seeds.key(seed) for seed in (*SMALL, *large)]
    drawn = {tuple(np.asarray(jax.random.bits(key, 4)).tolist()) for key in keys}
    assert len(drawn) == len(keys)
    for seed, key in zip(SMALL, keys):  # published numbers are of such
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(seed)))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        seeds.key(seed)
