"""Decoders that draw from a student and a teacher together, from one distribution for every token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core.types import LOG_FLOOR, Head, PyTree, TopSet
from jaxkd.kernels.attention import Cache
from jaxkd.kernels.pointwise import logits, top_set
from jaxkd.sampling.sampler import Decoder, slots_of

Combine = Callable[[jax.Array, jax.Array], jax.Array]
"""(log q, log p) [B V], of student and teacher -> log-probabilities [B V] of the draw."""


class _Caches(NamedTuple):
    """Both models' caches, whose rows have the same lengths."""

    student: dict[str, jax.Array]
    teacher: dict[str, jax.Array]
    length: jax.Array


def mixture(alpha: float) -> Combine:
    """alpha p + (1 - alpha) q: MiniLLM's teacher-mixed sampling (arXiv 2306.08543, section 2.2)."""

    def combine(lq: jax.Array, lp: jax.Array) -> jax.Array:
        return jnp.logaddexp(jnp.log(alpha) + lp, jnp.log1p(-alpha) + lq)

    return combine


def speculative(entries: int) -> Combine:
    """q on the teacher's `entries` most probable tokens K, and its mass outside of K drawn from p instead.

        q(v) 1[v in K] + (1 - q(K)) p(v)

    This is the distribution of speculative knowledge distillation (arXiv 2410.11325): the student proposes, and the
    teacher draws the token in the place of a proposal that is not among its most probable ones.
    """

    def combine(lq: jax.Array, lp: jax.Array) -> jax.Array:
        inside = jnp.where(top_set(jnp.maximum(lp, LOG_FLOOR), TopSet(entries=entries)), jnp.exp(lq), 0)
        return jnp.log(inside + jnp.maximum(1 - inside.sum(-1, keepdims=True), 0) * jnp.exp(lp))

    return combine


def mixed(student: Decoder, teacher: Decoder, combine: Combine, vocab: int) -> Decoder:
    """A decoder over parameters (student's, teacher's), with the distribution that `combine` makes of both.

    Both models read every token, at temperature 1. Ids at and above `vocab` have no mass.
    """

    def prefill(params: tuple[PyTree, PyTree], tokens: jax.Array) -> _Caches:
        caches = [side.prefill(own, tokens) for side, own in zip((student, teacher), params, strict=True)]
        return _Caches(slots_of(caches[0]), slots_of(caches[1]), caches[0].length)

    def decode(params: tuple[PyTree, PyTree], tokens: jax.Array, cache: _Caches) -> tuple[jax.Array, _Caches]:
        def side(decoder: Decoder, own: PyTree, slots: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            head, after = decoder.decode(own, tokens, Cache(**slots, length=cache.length))
            z = logits(head, head.hidden[:, 0]) if isinstance(head, Head) else head
            return jax.nn.log_softmax(jnp.where(jnp.arange(z.shape[-1]) < vocab, z, -jnp.inf), -1)[:, :vocab], after

        lq, new_student = side(student, params[0], cache.student)
        lp, new_teacher = side(teacher, params[1], cache.teacher)
        return combine(lq, lp), _Caches(slots_of(new_student), slots_of(new_teacher), new_student.length)

    return Decoder(prefill, decode, lambda params: (student.prepare(params[0]), teacher.prepare(params[1])))
