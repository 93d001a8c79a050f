"""Reduced signals of an online teacher, computed in the step in the form of a cache's."""

from typing import Any

import jax

from jaxkd.core import seeds
from jaxkd.core.types import Batch, Head, Output, PyTree, Sampled, TopK
from jaxkd.kernels import sparsify
from jaxkd.teachers.base import Teacher

SIGNALS = ("head", "hidden", "top_k", "sampled", "token")
"""Values of `teacher.signal`, from the most informative to the least."""


def top_k(teacher: Teacher, entries: int, temperatures: tuple[float, ...], vocab: int) -> Teacher:
    """The K largest entries of a teacher's head, with log-probabilities, and the others' log-mass per temperature."""

    def signal(state: PyTree, batch: Batch, **options: Any) -> TopK:
        return sparsify.top_k(_head(teacher, state, batch, options), entries, temperatures, vocab)

    return Teacher(teacher.state, teacher.host_features, signal, _plain(teacher))


def sampled(teacher: Teacher, draws: int, seed: int, vocab: int) -> Teacher:
    """Draws from the teacher: random-sampling KD (arXiv 2503.16870), unbiased for divergences linear in p.

    `draws` per token, with replacement. A row's draws depend on the seed, the step, the row and its domain only.
    """

    def signal(state: PyTree, batch: Batch, *, step: Any, **options: Any) -> Sampled:
        head = _head(teacher, state, batch, options | ({"step": step} if "step" in teacher.requires else {}))
        return sparsify.draw(head, uniforms(seed, step, batch, draws), vocab)

    return Teacher(teacher.state, teacher.host_features, signal, tuple(dict.fromkeys(["step", *_plain(teacher)])))


def uniforms(seed: int, step: Any, batch: Batch, draws: int) -> jax.Array:
    """[B L draws] in [0, 1), from each row's own key."""
    key = jax.random.fold_in(seeds.key(seed), step)

    def row(domain: jax.Array, row: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, domain), row)
        return jax.random.uniform(own, (batch.tokens.shape[1], draws))

    return jax.vmap(row)(batch.domain, batch.row)


def _plain(teacher: Teacher) -> tuple[str, ...]:
    return tuple(name for name in teacher.requires if name != "taps")


def _head(teacher: Teacher, state: PyTree, batch: Batch, options: dict[str, Any]) -> Head:
    output = teacher.signal(state, batch, **options)
    if not isinstance(output, Output):
        raise ValueError(f"only one teacher's head can be reduced, and this signal is {type(output).__name__}")
    return jax.lax.stop_gradient(output.head)
