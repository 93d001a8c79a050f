"""Student and teacher on text that the student wrote: what on-policy training sees, and where it goes wrong."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.core.types import Batch, Forward, Head, Metrics, Output, PyTree
from jaxkd.evals.metrics import distinct
from jaxkd.kernels.pointwise import logits

ENTRIES = 16  # of the sets of most probable tokens that are compared


def make_diagnostics(student: Forward, signal: Callable[[PyTree, Batch], Any], vocab: int) -> Callable[..., Metrics]:
    """`diagnostics(student's params, inputs, batch) -> metrics` over the batch's weighted tokens, to be jitted.

    In nats: `student_entropy`, and beside a teacher whose `signal(inputs, batch)` is a whole distribution
    `teacher_entropy`, `forward_kl` KL(p || q), `reverse_kl` KL(q || p); `overlap`, the share of their `ENTRIES` most
    probable tokens that both have; `teacher_mass`, p of the student's. `importance_ratio` is the mean of q(y) over the
    probability with which the text was sampled (1 where sampler and forward pass agree, and the text is not stale).
    Logits exist of one row at a time.
    """

    def diagnostics(params: PyTree, inputs: PyTree, batch: Batch) -> Metrics:
        teacher = signal(inputs, batch)
        heads = [student(params, batch).head] + ([teacher.head] if isinstance(teacher, Output) else [])

        def log_probs(head: Head, hidden: jax.Array) -> jax.Array:
            z = logits(head, hidden)
            return jax.nn.log_softmax(jnp.where(jnp.arange(z.shape[-1]) < vocab, z, -jnp.inf), -1)

        def row(values: tuple[list[jax.Array], Batch]) -> dict[str, jax.Array]:
            hidden, one = values
            lq = log_probs(heads[0], hidden[0])
            of_target = jnp.take_along_axis(lq, one.targets[:, None], 1)[:, 0]
            fields = {"student_entropy": -_dot(lq, lq), "importance_ratio": jnp.exp(of_target - one.aux["old_logprob"])}
            if len(heads) > 1:
                lp = log_probs(heads[1], hidden[1])
                own = jax.lax.top_k(lq, min(ENTRIES, vocab))[1]
                least = jax.lax.top_k(lp, own.shape[1])[0][:, -1:]
                of_own = jnp.take_along_axis(lp, own, 1)
                fields |= {
                    "teacher_entropy": -_dot(lp, lp),
                    "forward_kl": _dot(lp, lp - lq),
                    "reverse_kl": _dot(lq, lq - lp),
                    "overlap": (of_own >= least).mean(-1),
                    "teacher_mass": jnp.exp(of_own).sum(-1),
                }
            live = one.weights > 0
            return {name: jnp.where(live, field * one.weights, 0).sum() for name, field in fields.items()}

        bare = batch._replace(view=None, teacher=None)
        sums = jax.lax.map(row, ([head.hidden for head in heads], bare))
        return {name: (x.sum(), batch.weights.sum()) for name, x in sums.items()}

    return diagnostics


def _dot(lp: jax.Array, values: jax.Array) -> jax.Array:
    """sum_v p v with 0 where p is 0."""
    return jnp.where(lp > -jnp.inf, jnp.exp(lp) * jnp.where(lp > -jnp.inf, values, 0), 0).sum(-1)


def is_degenerate(text: Sequence[int]) -> bool:
    """Nothing but an end token, or a text of 16 tokens or more that mostly repeats its own pairs of tokens."""
    return len(text) < 2 or (len(text) >= 16 and distinct([text], 2) < 0.3)
