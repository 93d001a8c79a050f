"""Rollouts: what a row's text depends on, and the fields of the batch that it becomes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import random_params
from test_step import make_batch

from jaxkd.core import sharding
from jaxkd.kernels.reference import logits
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.sampler import decoder
from jaxkd.train.rollout import DATA, LOGPROBS, STUDENT, TEACHER, Limits, rollout

CONFIG = Config(vocab=250, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64)
PROMPT, VOCAB, END = 6, 240, 7
OPTIONS = {"limits": Limits(PROMPT), "vocab": VOCAB, "ends": (END,)}


@functools.lru_cache
def writer(**options):
    return jax.jit(functools.partial(rollout, decoder(CONFIG), **OPTIONS | options))


@functools.lru_cache
def params():
    return random_params(CONFIG, 0, 0.3)


def write(batch, step=3, **options):
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.tree.map(np.asarray, writer(**options)(params(), batch, key))


def same(one, other):
    """Equal text; log-probabilities up to the rounding of programs of another shape."""
    for name in LOGPROBS:
        np.testing.assert_allclose(one.aux[name], other.aux[name], atol=2e-5)
    bare = lambda batch: batch._replace(aux={"author": batch.aux["author"]})
    jax.tree.map(np.testing.assert_array_equal, bare(one), bare(other))


@pytest.mark.slow
def test_a_rows_text_is_its_own():
    """It depends on seed, step, domain and row, not on the place in the batch, the batch's size or the devices."""
    batch, order = make_batch(), np.asarray([3, 0, 7, 1, 2, 6, 5, 4])
    text = write(batch)
    take = lambda rows: jax.tree.map(lambda x: x[rows], (batch, text))
    for rows in (order, np.arange(4)):
        moved, expected = take(rows)
        same(write(moved), expected)
    same(write(batch, micro_batches=4), text)
    mesh = sharding.make_mesh(4, 2)
    with jax.set_mesh(mesh):
        spread_as = sharding.shardings(transformer.abstract(CONFIG)[1], transformer.abstract(CONFIG)[0], mesh)
        spread = functools.partial(rollout, decoder(CONFIG), **OPTIONS, micro_batches=2)
        key = jax.random.fold_in(jax.random.key(0), 3)
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        sharded = jax.jit(spread)(jax.device_put(params(), spread_as), placed, key)
    same(jax.tree.map(np.asarray, sharded), text)
    for other in (write(batch, step=4), write(batch._replace(row=batch.row + 1))):
        assert (other.tokens != text.tokens).any(1).all()
    assert (write(batch._replace(domain=batch.domain + 1)).tokens != text.tokens).any(1).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_one_document_whose_prompt_has_no_weight(temperature):
    batch = make_batch()
    short = batch.segments.at[2, 3:].set(2)  # a document of three tokens
    text = write(batch._replace(segments=short), sampling=Sampling(temperature))
    live = text.weights != 0
    for row in range(8):
        kept, length = 3 if row == 2 else PROMPT, int(text.segments[row].sum())
        written = text.tokens[row, :length]
        np.testing.assert_array_equal(written[:kept], batch.tokens[row, :kept])
        assert END not in written[kept : length - 1]
        assert length == 24 or written[-1] == END
        np.testing.assert_array_equal(text.segments[row], np.arange(24) < length)
        np.testing.assert_array_equal(text.positions[row, :length], np.arange(length))
        np.testing.assert_array_equal(np.flatnonzero(live[row]), np.arange(kept - 1, length - 1))
        np.testing.assert_array_equal(text.targets[row, : length - 1], written[1:])
        assert not text.tokens[row, length:].any()
    assert text.targets[live].max() < VOCAB
    if temperature == 0:  # every token that it wrote is what the forward pass finds most probable
        head = transformer.forward(CONFIG, params(), jax.tree.map(jnp.asarray, text)).head
        best = np.asarray(logits(head)[..., :VOCAB].argmax(-1))
        np.testing.assert_array_equal(best[live], text.targets[live])


def test_only_chosen_rows_are_written_and_who_wrote_them_is_said():
    batch, chosen = make_batch(), jnp.arange(8) % 3 == 0
    text = write(batch, author=TEACHER)
    mixed = writer(author=STUDENT)(params(), batch, jax.random.fold_in(jax.random.key(0), 3), chosen=chosen)
    assert mixed.aux["author"].tolist() == [STUDENT if c else DATA for c in chosen]
    for name in ("tokens", "targets", "weights", "segments", "positions"):
        expected = np.where(chosen[:, None], getattr(text, name), getattr(batch, name))
        np.testing.assert_array_equal(getattr(mixed, name), expected)
    again = writer(author=TEACHER)(params(), mixed, jax.random.key(1), chosen=~chosen)  # the teacher writes the others
    assert again.aux["author"].tolist() == [STUDENT if c else TEACHER for c in chosen]
    np.testing.assert_array_equal(again.tokens[chosen], mixed.tokens[chosen])
    np.testing.assert_array_equal(again.aux["old_logprob"][chosen], mixed.aux["old_logprob"][chosen])


def test_log_probabilities_are_of_the_targets_under_the_model_and_under_the_distribution_of_the_draw():
    text = jax.tree.map(jnp.asarray, write(make_batch(), sampling=Sampling(0.5, top_k=8)))
    z = logits(transformer.forward(CONFIG, params(), text).head)[..., :VOCAB]
    of = lambda lp: jnp.where(text.weights > 0, jnp.take_along_axis(lp, text.targets[..., None], -1)[..., 0], 0)
    np.testing.assert_allclose(text.aux["old_logprob"], of(jax.nn.log_softmax(z)), atol=2e-5)
    cut = jnp.where(z >= jax.lax.top_k(z, 8)[0][..., -1:], z / 0.5, -jnp.inf)
    np.testing.assert_allclose(text.aux["drawn_logprob"], of(jax.nn.log_softmax(cut)), atol=2e-5)


def test_a_prompt_may_end_where_the_weights_begin_and_the_text_be_limited():
    batch = make_batch()
    weights = jnp.ones_like(batch.weights).at[:, :4].set(0)  # the fifth token is the last of the prompt
    answers = batch._replace(weights=weights, segments=jnp.ones_like(batch.segments))
    text = write(answers, limits=Limits(0, 7))
    for row in range(8):
        np.testing.assert_array_equal(np.flatnonzero(text.weights[row])[:1], [4])
        np.testing.assert_array_equal(text.tokens[row, :5], batch.tokens[row, :5])
        assert text.weights[row].sum() <= 7
    assert (text.weights.sum(-1) == 7).any()
