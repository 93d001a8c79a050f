"""Random keys of seeds."""

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
    for seed, key in zip(SMALL, keys):  # keeps published results reproducible
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(seed)))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_raise(seed):
    with pytest.raises(ValueError, match="seed"):
        seeds.key(seed)
