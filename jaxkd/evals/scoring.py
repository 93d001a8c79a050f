"""How probable given continuations are after given contexts, in a few fixed shapes."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import Batch, PyTree
from jaxkd.kernels.api import RANKED, linear_comparison
from jaxkd.losses.divergences import next_token
from jaxkd.models.transformer import CausalLM

_SMALLEST = 16  # tokens of a row


class Score(NamedTuple):
    """Of one continuation."""

    logprobs: np.ndarray  # float32 [n]: log q(token | all tokens before it), in nats
    greedy: bool  # whether each of its tokens is the most probable one

    @property
    def total(self) -> float:
        """Their sum in float64."""
        return float(self.logprobs.sum(dtype=np.float64))


def score(
    forward: CausalLM, params: PyTree, pairs: Sequence[tuple[Any, Any]], *, vocab: int | None = None, batch: int = 8
) -> list[Score]:
    """The log-probability of each continuation after its context.

        logprobs[i] = log q(y_i | x, y_<i)

    Rows of similar length run together, padded to one of the sizes 16, 24, 32, 48, 64, ...; a program is compiled for
    each size that occurs, and no row has an effect on another. The head is multiplied with the continuations' hidden
    states alone, in chunks. A context that is too long for the model loses its first tokens.

    Args:
        forward: the model, of `load_model`.
        pairs: token ids of a context and of a continuation, at least one each.
        vocab: the tokenizer's `vocab`; later ids have no probability. None: the model's own.
        batch: rows that run at a time.

    Raises ValueError: an empty context or continuation, or one that is longer than the model's context.
    """
    longest, vocab = forward.config.max_length, forward.config.vocab if vocab is None else vocab
    rows = []
    for i, (context, continuation) in enumerate(pairs, 1):
        if not len(context) or not len(continuation):
            raise ValueError(f"pair {i}: the context and the continuation need at least one token each")
        if len(continuation) > longest:
            raise ValueError(f"pair {i}: a continuation of {len(continuation)} tokens, and the model takes {longest}")
        rows.append(np.concatenate([context, continuation])[-longest - 1 :].astype(np.int32))
    counts = np.asarray([len(continuation) for _, continuation in pairs], np.int32)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), counts[i]))
    scores: list[Any] = [None] * len(rows)
    for start in range(0, len(rows), batch):
        chosen = order[start : start + batch]
        width = min(_size(max(len(rows[i]) for i in chosen) - 1), longest)
        room = min(_size(int(counts[chosen].max())), width)
        tokens, lengths = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
        places, targets = np.zeros((2, batch, room), np.int32)
        for j, i in enumerate(chosen):
            row, count, lengths[j] = rows[i], counts[i], len(rows[i]) - 1
            tokens[j, : lengths[j]], targets[j, :count] = row[:-1], row[-count:]
            places[j, :count] = np.arange(lengths[j] - count, lengths[j])
        values = _scored(forward, vocab, params, tokens, lengths, places, targets)
        logprobs, greedy = jax.device_get(values)
        for j, i in enumerate(chosen):
            scores[i] = Score(logprobs[j, : counts[i]], bool(greedy[j, : counts[i]].all()))
    return scores


def _size(count: int) -> int:
    """The smallest size that holds so many tokens: a power of two, or three quarters of one."""
    power = max(_SMALLEST, 1 << (count - 1).bit_length())
    return max(_SMALLEST, power * 3 // 4) if count <= power * 3 // 4 else power


@partial(jax.jit, static_argnums=(0, 1))
def _scored(forward: CausalLM, vocab: int, params, tokens, lengths, places, targets) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and whether the target is the most probable token, [B K], of the hidden states at `places`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    live = (positions < lengths[:, None]).astype(jnp.int32)
    row = jnp.zeros_like(lengths)
    head = forward(params, Batch(tokens, tokens, live.astype(jnp.float32), live, positions, row, row)).head
    head = head._replace(hidden=jnp.take_along_axis(head.hidden, places[..., None], 1))
    # The kernel compares with a teacher, which is nothing here: a head of width 1 costs no product of note. It is no
    # constant, whose sums over the vocabulary XLA would fold for minutes.
    teacher = head._replace(hidden=head.hidden[..., :1], unembed=head.unembed[:1])
    values = linear_comparison((next_token(),), head, teacher, targets, vocab=vocab)
    return -values[0], values[1 + RANKED.index("student_right")] > 0
