"""A keyed permutation of `range(size)`, computed per index: a Feistel network with cycle walking."""

import numpy as np

Key = int | tuple[int | np.ndarray, ...]
"""Selects the permutation; an array [n] inside the tuple selects one per index."""

_ROUNDS = 8
_WORD = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: a bijection of 64-bit words in which each input bit flips about half the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(key: Key) -> np.ndarray:
    """Hash a key, whose integers are taken modulo 2**64, to uint64 [1] or, if it holds arrays [n], [n]."""
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
    """Permute words of `bits` bits; the rounds alternate sides, so the halves may differ by one bit."""
    low = bits // 2
    low_mask, high_mask = np.uint64((1 << low) - 1), np.uint64((1 << (bits - low)) - 1)
    left, right = x >> np.uint64(low), x & low_mask
    for number in range(_ROUNDS):
        round_key = _mix(key + np.uint64((number + 1) * 0x9E3779B97F4A7C15 & _WORD))
        if number % 2 == 0:
            left = left ^ (_mix(right ^ round_key) & high_mask)
        else:
            right = right ^ (_mix(left ^ round_key) & low_mask)
    return (left << np.uint64(low)) | right


def permute(index: np.ndarray, size: int, key: Key) -> np.ndarray:
    """The image int64 [n] of each index [n] in `[0, size)` under a keyed permutation of `range(size)`."""
    if size == 1:
        return np.zeros_like(index)
    bits = (size - 1).bit_length()
    words = np.broadcast_to(hash_key(key), index.shape)
    result = _feistel(index.astype(np.uint64), bits, words)
    # Cycle walking: results at or above `size` are permuted again. The start was below, so each walk ends, after two
    # turns or fewer on average.
    while (outside := np.nonzero(result >= np.uint64(size))[0]).size:
        result[outside] = _feistel(result[outside], bits, words[outside])
    return result.astype(np.int64)
