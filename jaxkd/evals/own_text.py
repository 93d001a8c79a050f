"""Student and teacher on text that the student wrote: what on-policy training sees, and where it goes wrong."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.core.types import Batch, Forward, Head, Metrics, Output, PyTree
from jaxkd.evals.metrics import distinct
from jaxkd.kernels.pointwise import logits

ENTRIES = 16  # of the sets of most probable tokens that are compared
_LOGITS = 2**24  # at a time: of all rows, and of each model


def make_diagnostics(student: Forward, signal: Callable[[PyTree, Batch], Any], vocab: int) -> Callable[..., Metrics]:
    """`diagnostics(student's params, inputs, batch) -> metrics` over the batch's weighted tokens, to be jitted.

    In nats: `student_entropy`, and beside a teacher whose `signal(inputs, batch)` is a whole distribution
    `teacher_entropy`, `forward_kl` KL(p || q), `reverse_kl` KL(q || p); `overlap`, the share of their `ENTRIES` most
    probable tokens that both have; `teacher_mass`, p of the student's. `importance_ratio` is the mean of q(y) over the
    probability of it under the model that wrote it, at temperature 1 (1 where sampler and forward pass agree).
    Logits exist of some tokens at a time.
    """

    def diagnostics(params: PyTree, inputs: PyTree, batch: Batch) -> Metrics:
        teacher = signal(inputs, batch)
        heads = [student(params, batch).head] + ([teacher.head] if isinstance(teacher, Output) else [])

        def log_probs(head: Head, hidden: jax.Array) -> jax.Array:
            z = logits(head, hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:2], -1)
            return jax.nn.log_softmax(jnp.where(jnp.arange(z.shape[-1]) < vocab, z, -jnp.inf), -1)

        def block(values: tuple[list[jax.Array], jax.Array, jax.Array, jax.Array]) -> dict[str, jax.Array]:
            hidden, targets, old, weights = values
            lq = log_probs(heads[0], hidden[0])
            of_target = jnp.take_along_axis(lq, targets[..., None], -1)[..., 0]
            fields = {"student_entropy": -_dot(lq, lq), "importance_ratio": jnp.exp(of_target - old)}
            if len(heads) > 1:
                lp = log_probs(heads[1], hidden[1])
                own = jax.lax.top_k(lq, min(ENTRIES, vocab))[1]
                least = jax.lax.top_k(lp, own.shape[-1])[0][..., -1:]
                of_own = jnp.take_along_axis(lp, own, -1)
                fields |= {
                    "teacher_entropy": -_dot(lp, lp),
                    "forward_kl": _dot(lp, lp - lq),
                    "reverse_kl": _dot(lq, lq - lp),
                    "overlap": (of_own >= least).mean(-1),
                    "teacher_mass": jnp.exp(of_own).sum(-1),
                }
            return {name: jnp.where(weights > 0, field * weights, 0).sum() for name, field in fields.items()}

        rows, length = batch.weights.shape
        size = min(length, max(_LOGITS // (rows * vocab), 1))
        count = -(-length // size)

        def blocks(x: jax.Array) -> jax.Array:  # of all rows, which stay on their devices
            x = jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)])
            return x.reshape(rows, count, size, *x.shape[2:]).swapaxes(0, 1)

        values = [head.hidden for head in heads], batch.targets, batch.aux["old_logprob"], batch.weights
        sums = jax.lax.map(block, jax.tree.map(blocks, values))
        return {name: (x.sum(), batch.weights.sum()) for name, x in sums.items()}

    return diagnostics


def _dot(lp: jax.Array, values: jax.Array) -> jax.Array:
    """sum_v p v with 0 where p is 0."""
    return jnp.where(lp > -jnp.inf, jnp.exp(lp) * jnp.where(lp > -jnp.inf, values, 0), 0).sum(-1)


def is_degenerate(text: Sequence[int]) -> bool:
    """Nothing but an end token, or a text of 16 tokens or more that mostly repeats its own pairs of tokens."""
    return len(text) < 2 or (len(text) >= 16 and distinct([text], 2) < 0.3)
