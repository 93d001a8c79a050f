"""Rows of each signal as a teacher would make them, at random."""

import numpy as np

from jaxkd.core.types import Hidden, Sampled, TopK
from jaxkd.teachers.codec import Text


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def top_k_row(rng, length: int, vocab: int, entries: int, temperatures=(1.0,), sharpness: float = 3.0) -> TopK:
    """Most probable first, as `jax.lax.top_k` gives them."""
    z = sharpness * rng.normal(size=(length, vocab))
    order = np.argsort(-z, -1)[:, :entries]
    lp, others = np.take_along_axis(log_softmax(z), order, -1), np.ones((length, vocab), bool)
    np.put_along_axis(others, order, False, -1)
    with np.errstate(divide="ignore"):
        masses = [np.where(others, np.exp(log_softmax(z / t)), 0).sum(-1) for t in temperatures]
        tail = np.log(np.stack(masses, -1))
    return TopK(order.astype(np.int32), lp.astype(np.float32), tail.astype(np.float32))


def sampled_row(rng, length: int, vocab: int, draws: int, likely: int = 30) -> Sampled:
    """Ids rising, then -1 with a count of 0, as `sparsify.draw` gives them; `likely` ids have most of the mass."""
    ids, counts = np.full((length, draws), -1, np.int32), np.zeros((length, draws), np.int32)
    share = 1 / np.arange(1, min(likely, vocab) + 1)
    for t in range(length):
        some = rng.choice(vocab, size=len(share), replace=False)
        drawn, often = np.unique(rng.choice(some, size=draws, p=share / share.sum()), return_counts=True)
        ids[t, : len(drawn)], counts[t, : len(drawn)] = drawn, often
    return Sampled(ids, counts)


def hidden_row(rng, length: int, width: int, scale: float = 1.0) -> Hidden:
    return Hidden((scale * rng.normal(size=(length, width))).astype(np.float32))


def text_row(rng, length: int, vocab: int) -> tuple[Text, np.ndarray]:
    """Documents of random sizes and some padding, where the first tokens of each are a prompt; and what is live."""
    segments, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    start = number = 0
    while start < length and (size := int(rng.integers(1, length + 1))) <= length - start:
        number += 1
        segments[start : start + size], positions[start : start + size] = number, np.arange(size)
        start += size
    tokens = np.where(segments > 0, rng.integers(0, vocab, length), 0).astype(np.int32)
    targets, live = np.zeros(length, np.int32), np.zeros(length, bool)
    for t in range(length - 1):
        if segments[t] and segments[t] == segments[t + 1]:
            targets[t], live[t] = tokens[t + 1], positions[t] >= 1
    return Text(tokens, targets, live.astype(np.float32), segments, positions), live


def rising(row: TopK) -> TopK:
    order = np.argsort(row.ids, -1)
    return TopK(np.take_along_axis(row.ids, order, -1), np.take_along_axis(row.logprobs, order, -1), row.tail)
