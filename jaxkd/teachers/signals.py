"""Reduced signals of an online teacher, made in the step as a cache would store them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core import seeds
from jaxkd.core.sharding import RULES, Rules, table
from jaxkd.core.types import Batch, Head, Output, PyTree, Sampled, TopK
from jaxkd.kernels import sparsify
from jaxkd.models.transformer import Config
from jaxkd.sampling import generate
from jaxkd.teachers.base import Teacher, untouched

SIGNALS = ("head", "hidden", "top_k", "sampled", "token")
"""Values of `teacher.signal`, from the most informative to the least."""


def top_k(teacher: Teacher, entries: int, temperatures: tuple[float, ...], vocab: int) -> Teacher:
    """The teacher's K largest entries with their true log-probabilities, and the log-mass of all others.

    Args:
        teacher: whose signal is a head.
        entries: K.
        temperatures: at which the others' mass is given.
        vocab: true vocabulary size.
    """

    def signal(state: PyTree, batch: Batch, **options: Any) -> TopK:
        return sparsify.top_k(_head(teacher, state, batch, options), entries, temperatures, vocab)

    return Teacher(teacher.state, teacher.host_features, signal, _plain(teacher))


def sampled(teacher: Teacher, draws: int, seed: int, vocab: int) -> Teacher:
    """Draws from the teacher: random-sampling KD (arXiv 2503.16870), unbiased for divergences linear in p.

    The draws of a row depend on the seed, the step, the row and its domain, not on its position in a batch.

    Args:
        teacher: whose signal is a head.
        draws: with replacement, per token.
        seed: of the draws.
        vocab: true vocabulary size.
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


class Writing(NamedTuple):
    """How a teacher's own text is made."""

    config: Config
    prompt: int  # tokens of a row's first document that it goes on from
    temperature: float  # of its draws; 0 takes the most probable token each time
    vocab: int  # true vocabulary
    end: int | None  # the token that ends a text
    dtype: Any = jnp.float32  # of its activations
    rules: Rules = RULES  # where they lie


def token(params: PyTree, how: Writing, seed: int) -> Teacher:
    """The teacher's own text in the place of the data's: sequence-level KD (Kim and Rush 2016, arXiv 1606.07947).

    Args:
        params: the teacher's.
        how: the text is made.
        seed: of the draws, which depend on the step and the row too.
    """

    def signal(state: PyTree, batch: Batch, *, step: Any) -> Batch:
        return written(how, state, batch, jax.random.fold_in(seeds.key(seed), step))

    return Teacher(params, untouched, signal, ("step",), writes=True)


def written(how: Writing, params: PyTree, batch: Batch, key: jax.Array) -> Batch:
    """Each row's beginning, gone on with by the teacher; the prompt has no weight.

    Args:
        how: the text is made.
        params: the teacher's.
        batch: rows, of which the first document is read.
        key: of the draws; a row's own follows from it, the domain and the row.
    """
    length = batch.tokens.shape[1]
    width = min(how.prompt, length - 1)
    prompt = jnp.maximum((batch.segments[:, :width] == 1).sum(-1), 1)
    own = jax.vmap(lambda domain, row: jax.random.fold_in(jax.random.fold_in(key, domain), row))
    with table(how.rules):
        text = generate.generate(
            how.config, params, batch.tokens[:, :width], prompt, own(batch.domain, batch.row), length=length,
            temperature=how.temperature, vocab=how.vocab, end=how.end, dtype=how.dtype,
        )  # fmt: skip
    place = jnp.arange(length)
    inside = place < text.lengths[:, None]
    after = (place + 1 < text.lengths[:, None]) & (place + 1 >= prompt[:, None])
    follows = place + 1 < text.lengths[:, None]
    return batch._replace(
        tokens=jnp.where(inside, text.tokens, 0),
        targets=jnp.where(follows, jnp.roll(text.tokens, -1, 1), 0),
        weights=after.astype(jnp.float32),
        segments=inside.astype(jnp.int32),
        positions=jnp.where(inside, place, 0),
    )


def _plain(teacher: Teacher) -> tuple[str, ...]:
    return tuple(name for name in teacher.requires if name != "taps")


def _head(teacher: Teacher, state: PyTree, batch: Batch, options: dict[str, Any]) -> Head:
    output = teacher.signal(state, batch, **options)
    if not isinstance(output, Output):
        raise ValueError(f"only one teacher's head can be reduced, and this signal is {type(output).__name__}")
    return jax.lax.stop_gradient(output.head)
