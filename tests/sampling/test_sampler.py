"""The queue of completions, and the distribution that tokens are drawn from."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import random_params
from test_generate import CONFIG, PROMPT_LENGTHS, VOCAB, plain_logprobs, row_keys, some_prompts

from jaxkd.models import quantized
from jaxkd.sampling.processors import Sampling, penalised, sampling_logprobs
from jaxkd.sampling.sampler import Sampler, decoder, sample, unrolled

LENGTH = 9


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, spread=0.3)


@functools.partial(jax.jit, static_argnums=0)
def run(settings, params, prompts, lengths, keys, limits):
    return sample(Sampler(decoder(CONFIG), VOCAB, LENGTH, **dict(settings)), params, prompts, lengths, keys, limits)


def write(params, rows=range(4), limits=(LENGTH,) * 4, **settings):
    rows = np.asarray(rows)
    inputs = some_prompts()[rows], PROMPT_LENGTHS[rows], row_keys(rows), np.asarray(limits)[rows]
    return jax.tree.map(np.asarray, run(tuple(settings.items()), params, *inputs))


def assert_same(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.ended, other.ended)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    np.testing.assert_allclose(one.drawn_logprobs, other.drawn_logprobs, atol=1e-4)


SETTINGS = {
    "plain": {},
    "cut off": {"sampling": Sampling(0.8, 20, 0.9, 0.02)},
    "penalties": {"sampling": Sampling(repetition_penalty=1.7, presence_penalty=0.5)},
}


@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cut off", "penalties"))]
)
def test_slots_of_a_queue_change_no_text(params, name):
    """Completions of unequal lengths, three of each prompt, in as many slots as there are, in two and in one."""
    options = SETTINGS[name] | {"ends": tuple(range(0, VOCAB, 6)), "n": 3}
    whole = write(params, **options)
    assert len({tuple(row) for row in whole.tokens}) == 12
    assert len(set(whole.lengths)) > 3
    assert whole.ended.any()
    for slots in (5, 1):
        assert_same(write(params, slots=slots, **options), whole)


def test_layers_apart_change_no_text(params):
    sampler = Sampler(unrolled(decoder(CONFIG)), VOCAB, LENGTH, SETTINGS["cut off"]["sampling"])
    inputs = some_prompts(), PROMPT_LENGTHS, row_keys(range(4)), np.full(4, LENGTH)
    apart = jax.jit(lambda params, *inputs: sample(sampler, params, *inputs))(params, *inputs)
    assert_same(jax.tree.map(np.asarray, apart), write(params, **SETTINGS["cut off"]))


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA before it drops optimization_barrier on CPUs")
def test_a_decoded_token_copies_no_cache(params):
    """The loop's own copies, at its entry, are one of each layer's keys and values."""
    sampler = Sampler(unrolled(decoder(CONFIG)), VOCAB, LENGTH, Sampling(0.0))
    inner = jax.eval_shape(sampler.decoder.prepare, params)
    queue = jax.eval_shape(sampler.queue, inner, some_prompts(), PROMPT_LENGTHS, row_keys(range(4)))
    state = jax.eval_shape(sampler.start, queue)
    text = jax.jit(sampler.advance).lower(inner, queue, state).compile().as_text()
    shape = ",".join(map(str, state.cache.keys[0].shape))
    copies = re.findall(rf"f32\[{shape}\]\S* copy\(", text)
    assert len(copies) <= 2 * CONFIG.layers


@pytest.mark.slow
def test_the_first_completion_is_the_only_one_and_rows_are_their_own(params):
    one, three = write(params), write(params, n=3, slots=4)
    assert_same(one, jax.tree.map(lambda x: x[::3], three))
    order = [2, 0, 3, 1]
    assert_same(write(params, order, slots=2), jax.tree.map(lambda x: x[order], one))


def test_limits_hold_and_a_completion_without_room_is_empty(params):
    text = write(params, limits=(3, 0, 9, 1), n=2, slots=3)
    np.testing.assert_array_equal(text.lengths, [3, 3, 0, 0, 9, 9, 1, 1])
    written = np.arange(LENGTH) < text.lengths[:, None]
    for values in (text.tokens, text.logprobs, text.drawn_logprobs):
        assert not values[~written].any()
    assert (text.logprobs[written] < 0).all()


def numpy_probabilities(z, s):
    """[V] probabilities, written plainly."""
    z = z / s.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p)
    if s.top_k:
        p[order[s.top_k :]] = 0
        p /= p.sum()
    if s.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= s.top_p]] = 0
        p /= p.sum()
    p[p < s.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(top_k=5), Sampling(top_p=0.6), Sampling(min_p=0.1), Sampling(1.3, 30, 0.8, 0.05)],
)
def test_probabilities_are_the_plain_ones(sampling):
    z = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32) * 3
    got = np.exp(np.asarray(sampling_logprobs(jnp.asarray(z), sampling)))
    np.testing.assert_allclose(got, [numpy_probabilities(row, sampling) for row in np.float64(z)], atol=1e-6)


def test_penalties():
    z = jnp.asarray([[2.0, -2.0, 1.0, -1.0]])
    seen, written = jnp.asarray([[True, True, False, False]]), jnp.asarray([[True, False, False, True]])
    got = penalised(z, Sampling(repetition_penalty=2.0, presence_penalty=0.5), seen, written)
    np.testing.assert_allclose(got, [[0.5, -4.0, 1.0, -1.5]])


def test_draws_follow_the_distribution_and_say_so(params):
    count, sampling = 3000, Sampling(1.5, top_p=0.7)
    inputs = np.repeat(some_prompts()[1:2], count, 0), np.full(count, 7, np.int32), row_keys(range(count))
    text = run((("sampling", sampling), ("slots", 1000)), params, *inputs, np.ones(count, np.int32))
    ids, shares = np.unique(text.tokens[:, 0], return_counts=True)
    probabilities = np.exp([text.drawn_logprobs[np.flatnonzero(text.tokens[:, 0] == i)[0], 0] for i in ids])
    np.testing.assert_allclose(probabilities.sum(), 1, atol=0.02)  # all that may be drawn was
    expected = count * probabilities
    assert ((shares - expected) ** 2 / expected).sum() < len(ids) + 4 * np.sqrt(2 * len(ids))


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
def test_a_setting_out_of_range_is_named(name):
    with pytest.raises(ValueError, match=name):
        Sampling()._replace(**{name: -1}).check()


def test_an_int8_copy_says_with_what_probability_it_drew(params):
    """So exp(log p - logprobs) is the importance ratio of the exact model p."""
    narrow = jax.tree.map(jnp.asarray, quantized.quantize(jax.tree.map(np.asarray, params)))
    text = write(narrow, n=2, slots=5, sampling=Sampling(0.7))
    lengths = np.repeat(PROMPT_LENGTHS, 2)
    rows = np.zeros((8, lengths.max() + LENGTH), np.int32)
    for row, prompt, size, written in zip(rows, np.repeat(some_prompts(), 2, 0), lengths, text.tokens):
        row[: size + LENGTH] = np.concatenate([prompt[:size], written])
    places = lengths[:, None] - 1 + np.arange(LENGTH)
    before = [np.asarray(plain_logprobs(CONFIG, p, jnp.asarray(rows))) for p in (narrow, params)]
    before = [np.take_along_axis(lp, places[..., None], 1) for lp in before]
    of_drawn = lambda lp: np.take_along_axis(lp, text.tokens[..., None], 2)[..., 0]
    np.testing.assert_allclose(text.logprobs, of_drawn(before[0]), atol=1e-4)
    tempered = np.asarray(jax.nn.log_softmax(before[0] / 0.7, -1))
    np.testing.assert_allclose(text.drawn_logprobs, of_drawn(tempered), atol=1e-4)
    off = np.abs(of_drawn(before[1]) - text.logprobs)
    assert 1e-3 < off.mean() < 0.5
