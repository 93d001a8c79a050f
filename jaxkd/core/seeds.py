"""Random keys from a run's seed."""

import jax
import numpy as np

LIMIT = 2**63
"""Upper bound of seeds, exclusive."""

_WORD = 2**32 - 1


def key(seed: int) -> jax.Array:
    """A key of all bits of a seed in [0, LIMIT); below 2**32 it is `jax.random.key(seed)`.

    (`jax.random.key` drops the bits above the 32nd without 64-bit types.)
    """
    if not 0 <= seed < LIMIT:
        raise ValueError(f"a seed must be from 0 to 2**63 - 1, got {seed}")
    low = jax.random.key(np.uint32(seed & _WORD))
    # Folded in twice, to differ from steps, which are folded in once.
    return jax.random.fold_in(jax.random.fold_in(low, _WORD), seed >> 32) if seed > _WORD else low
