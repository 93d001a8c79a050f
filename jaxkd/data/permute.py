"""A keyed pseudo-random permutation of `range(size)` that is computed, not stored.

Row order has to be a pure function of the seed and the position, on any host and for corpora of any size: so
element `index` of the permutation is found directly, in constant memory, by a Feistel network with cycle
walking.
"""

import numpy as np

Key = int | tuple[int | np.ndarray, ...]
"""What selects the permutation; an array inside the tuple gives each index a permutation of its own."""

_ROUNDS = 8
_WORD = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words: a bijection in which each input bit moves about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(key: Key) -> np.ndarray:
    """Mix a key into 64-bit words.

    Args:
        key: an int, or a tuple of ints and integer arrays [n]; taken modulo 2**64.

    Returns:
        uint64, [] or [n].
    """
    parts = key if isinstance(key, tuple) else (key,)
    state = np.full(1, len(parts), np.uint64)  # one element, not a scalar: arrays wrap around silently
    for part in parts:
        if isinstance(part, np.ndarray):
            word = part.astype(np.int64).view(np.uint64)
        else:
            word = np.full(1, int(part) & _WORD, np.uint64)
        state = _mix((state ^ _mix(word + np.uint64(0x9E3779B97F4A7C15))) + np.uint64(0xD1B54A32D192ED03))
    return state


def _feistel(x: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    """Permute the words of `bits` bits; rounds alternate, so the halves may differ by one bit."""
    low = bits // 2
    low_mask, high_mask = np.uint64((1 << low) - 1), np.uint64((1 << (bits - low)) - 1)
    left, right = x >> np.uint64(low), x & low_mask
    for number in range(_ROUNDS):
        turn = _mix(key + np.uint64((number + 1) * 0x9E3779B97F4A7C15 & _WORD))
        if number % 2 == 0:
            left = left ^ (_mix(right ^ turn) & high_mask)
        else:
            right = right ^ (_mix(left ^ turn) & low_mask)
    return (left << np.uint64(low)) | right


def permute(index: np.ndarray, size: int, key: Key) -> np.ndarray:
    """Where a keyed permutation of `range(size)` sends each index.

    Args:
        index: integers [n] in `[0, size)`.
        size: number of elements, at least 1.
        key: int or tuple of ints; arrays [n] inside the tuple are keys per index.

    Returns:
        int64 [n].

    Raises:
        ValueError: `size` is not positive, or an index is outside the range.
    """
    index = np.asarray(index, np.int64)
    if size < 1:
        raise ValueError(f"cannot permute range({size}): the size must be at least 1")
    if index.size == 0:
        return index.copy()
    if index.min() < 0 or index.max() >= size:
        raise ValueError(f"indices must be in [0, {size}), got {index.min()} to {index.max()}")
    if size == 1:
        return np.zeros_like(index)
    bits = (size - 1).bit_length()
    words = np.broadcast_to(hash_key(key), index.shape)
    result = _feistel(index.astype(np.uint64), bits, words)
    # Words at or above `size` walk on along their cycle; the start was below, so each walk ends, after two
    # turns on average.
    while (outside := np.nonzero(result >= np.uint64(size))[0]).size:
        result[outside] = _feistel(result[outside], bits, words[outside])
    return result.astype(np.int64)
