"""Sampling: cached decoding against the forward pass, and what a row's completion depends on."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import collectives, random_params

import jaxkd as kd
from jaxkd.core.sharding import make_mesh, shardings
from jaxkd.core.types import Batch, Head
from jaxkd.kernels.reference import logits
from jaxkd.models import transformer
from jaxkd.models.transformer import CausalLM, Config, RopeScaling
from jaxkd.sampling import generate
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.sampler import Decoder, Sampler, sample

CONFIG = Config(vocab=100, embed=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, max_length=64)
VOCAB = 90  # the tokenizer's, fewer than the weights have
PROMPT_LENGTHS = np.array([3, 7, 1, 5], np.int32)
LENGTH = 17  # no other size of these models
OPTIONS = {
    "llama": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16), "rope_theta": 500.0},
    "qwen2": {"qkv_bias": True, "tied": False},
    "qwen3": {"qk_norm": True, "norm_eps": 1e-2},
    "one head of keys": {"kv_heads": 1},
    "as many heads of keys": {"kv_heads": 4},
}


class Marks(NamedTuple):
    """A cache without slots."""

    length: jax.Array


def row_keys(rows, seed=0):
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(rows))


def some_prompts(width=7, filling=0):
    prompts = np.random.default_rng(0).integers(0, VOCAB, (4, 7)).astype(np.int32)
    prompts = np.pad(prompts, ((0, 0), (0, width - 7)))
    return np.where(np.arange(width) < PROMPT_LENGTHS[:, None], prompts, filling).astype(np.int32)


def run(config, params, prompts, lengths, keys, **options):
    options = {"length": LENGTH, "vocab": VOCAB} | options
    return jax.tree.map(np.asarray, generate.generate(config, params, prompts, lengths, keys, **options))


def run_traced(params, lengths):
    return generate.generate(CONFIG, params, some_prompts(), lengths, row_keys(range(4)), length=LENGTH, vocab=VOCAB)


@jax.jit(static_argnums=0)
def plain_logprobs(config, params, tokens):
    """[B L vocab] next-token log-probabilities of `forward` on whole rows."""
    one, row = jnp.ones_like(tokens), jnp.zeros(len(tokens), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = Batch(tokens, tokens, jnp.ones(tokens.shape), one, positions, row, row)
    head = transformer.forward(config, params, batch).head
    return jax.nn.log_softmax(logits(head)[..., :VOCAB], -1)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, spread=0.3)  # far from uniform, so that a wrong position or key shows


@pytest.fixture(scope="module")
def text(params):
    return run(CONFIG, params, some_prompts(), PROMPT_LENGTHS, row_keys(range(4)))


@pytest.mark.parametrize("temperature", [0.0, pytest.param(0.7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", OPTIONS)
def test_tokens_and_logprobs_match_the_forward_pass(family, temperature):
    config = dataclasses.replace(CONFIG, **OPTIONS[family])
    params, prompts = random_params(config, 1, spread=0.3), some_prompts()
    text = run(config, params, prompts, PROMPT_LENGTHS, row_keys(range(4)), temperature=temperature)
    before = np.asarray(plain_logprobs(config, params, jnp.asarray(text.tokens)))[:, :-1]
    after = text.tokens[:, 1:]
    written = np.arange(1, LENGTH) >= PROMPT_LENGTHS[:, None]
    want = np.take_along_axis(before, after[..., None], -1)[..., 0]
    np.testing.assert_allclose(text.logprobs[:, 1:], np.where(written, want, 0), atol=1e-4)
    assert (text.logprobs[:, 0] == 0).all()
    assert (text.lengths == LENGTH).all()
    given = np.arange(7) < PROMPT_LENGTHS[:, None]
    np.testing.assert_array_equal(text.tokens[:, :7][given], prompts[given])
    if temperature == 0:
        np.testing.assert_array_equal(after[written], before.argmax(-1)[written])
    else:
        assert (after != before.argmax(-1))[written].any()


def test_bfloat16(params):
    text = run(CONFIG, params, some_prompts(), PROMPT_LENGTHS, row_keys(range(4)), dtype=jnp.bfloat16)
    exact = np.asarray(plain_logprobs(CONFIG, params, jnp.asarray(text.tokens)))[:, :-1]
    exact = np.take_along_axis(exact, text.tokens[:, 1:, None], -1)[..., 0]
    written = np.arange(1, LENGTH) >= PROMPT_LENGTHS[:, None]
    np.testing.assert_allclose(text.logprobs[:, 1:][written], exact[written], atol=0.3)
    _, cache = transformer.prefill(CONFIG, params, jnp.asarray(some_prompts()), dtype=jnp.bfloat16)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert cache.keys.shape == (3, 4, 2, 7, 8)


def assert_same(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.slow
def test_a_completion_depends_on_its_prompt_key_and_position_alone(params, text):
    order = np.array([2, 0, 3, 1])
    moved = run(CONFIG, params, some_prompts()[order], PROMPT_LENGTHS[order], row_keys(order))
    assert_same(moved, jax.tree.map(lambda x: x[order], text))
    for row in range(4):
        here = slice(row, row + 1)
        alone = run(CONFIG, params, some_prompts()[here], PROMPT_LENGTHS[here], row_keys([row]))
        assert_same(alone, jax.tree.map(lambda x, here=here: x[here], text))
    wider = run(CONFIG, params, some_prompts(width=12, filling=5), PROMPT_LENGTHS, row_keys(range(4)))
    assert_same(wider, text)
    ended = run(CONFIG, params, some_prompts(12, 5), PROMPT_LENGTHS, row_keys(range(4)), end=tuple(range(VOCAB)))
    assert (ended.tokens[np.arange(LENGTH) > PROMPT_LENGTHS[:, None]] == 0).all()
    # Lengths are clipped under jit.
    lengths = np.array([3, 99, 0, 5], np.int32)
    jitted = jax.jit(lambda lengths: run_traced(params, lengths))
    assert_same(jax.tree.map(np.asarray, jitted(lengths)), text)
    # A longer limit extends the same text.
    longer = run(CONFIG, params, some_prompts(), PROMPT_LENGTHS, row_keys(range(4)), length=LENGTH + 5)
    np.testing.assert_array_equal(longer.tokens[:, :LENGTH], text.tokens)
    # Rows, seeds and positions draw independently.
    same = [np.repeat(x[1:2], 4, 0) for x in (some_prompts(), PROMPT_LENGTHS)]
    drawn = run(CONFIG, params, *same, row_keys(range(4)))
    assert len({tuple(row) for row in drawn.tokens}) == 4
    other = run(CONFIG, params, some_prompts(), PROMPT_LENGTHS, row_keys(range(4), seed=1))
    assert (other.tokens != text.tokens).any()
    hot = run(CONFIG, params, some_prompts(), PROMPT_LENGTHS, row_keys(range(4)), temperature=1e5)
    assert len(set(hot.tokens[2, 1:])) > 10  # nearly uniform over 90 ids: one draw for all positions would repeat


def test_samples_follow_the_tempered_distribution(params):
    count, temperature = 4000, 2.0
    prompts = np.repeat(some_prompts()[1:2], count, 0)
    lengths = np.full(count, 7, np.int32)
    options = {"length": 8, "vocab": 6}
    drawn = run(CONFIG, params, prompts, lengths, row_keys(range(count)), temperature=temperature, **options)
    logprobs = np.asarray(plain_logprobs(CONFIG, params, jnp.asarray(prompts[:1])))[0, -1, :6]
    model = np.exp(logprobs) / np.exp(logprobs).sum()
    softened = model ** (1 / temperature) / (model ** (1 / temperature)).sum()
    shares = np.bincount(drawn.tokens[:, 7], minlength=6) / count
    assert np.abs(model - softened).max() > 0.1
    np.testing.assert_allclose(shares, softened, atol=0.03)
    np.testing.assert_allclose(drawn.logprobs[:, 7], np.log(model)[drawn.tokens[:, 7]], atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1e4])
def test_ids_beyond_the_true_vocabulary_are_never_sampled(temperature):
    config = dataclasses.replace(CONFIG, tied=False)
    params = random_params(config, 2)
    params["unembed"] = params["unembed"].at[:, VOCAB:].set(jnp.sign(params["unembed"][:, :1]) * 50)
    both = np.concatenate([some_prompts(), some_prompts()])
    lengths = np.concatenate([PROMPT_LENGTHS, PROMPT_LENGTHS])
    text = run(config, params, both, lengths, row_keys(range(8)), length=64, temperature=temperature)
    assert text.tokens.max() < VOCAB
    assert np.isfinite(text.logprobs).all()


def test_end_tokens_stop_rows_and_decoding(params, text, monkeypatch):
    first, second = text.tokens[0, 6], text.tokens[3, 10]
    ended = run(CONFIG, params, some_prompts(), PROMPT_LENGTHS, row_keys(range(4)), end=(int(first), int(second)))
    for row, prompt in enumerate(PROMPT_LENGTHS):  # an end token within a prompt does not count
        stops = np.flatnonzero(np.isin(text.tokens[row, prompt:], (first, second)))
        length = prompt + stops[0] + 1 if len(stops) else LENGTH
        assert ended.lengths[row] == length
        np.testing.assert_array_equal(ended.tokens[row], np.where(np.arange(LENGTH) < length, text.tokens[row], 0))
        want = np.where(np.arange(LENGTH) < length, text.logprobs[row], 0)
        np.testing.assert_allclose(ended.logprobs[row], want, atol=1e-4)
    assert (ended.lengths < LENGTH).sum() >= 2
    only = run(CONFIG, params, some_prompts(), PROMPT_LENGTHS, row_keys(range(4)), end=int(first))
    assert only.tokens[0, only.lengths[0] - 1] == first
    # Decoding stops when all rows have ended.
    steps = []

    def counted(*arguments, **options):
        jax.debug.callback(lambda: steps.append(1))
        return extend(*arguments, **options)

    extend = transformer.extend
    monkeypatch.setattr(transformer, "extend", counted)
    everything = tuple(range(VOCAB))
    text = run(CONFIG, params, some_prompts(), PROMPT_LENGTHS, row_keys(range(4)), length=60, end=everything)
    jax.effects_barrier()
    np.testing.assert_array_equal(text.lengths, PROMPT_LENGTHS + 1)
    assert len(steps) == 1  # one for all, at each row's own position


def test_prompts_of_full_length_and_bad_arguments(params):
    prompts = some_prompts()
    text = run(CONFIG, params, prompts, PROMPT_LENGTHS, row_keys(range(4)), length=7)
    np.testing.assert_array_equal(text.tokens[1], prompts[1])
    assert text.lengths[1] == 7
    assert (text.logprobs[1] == 0).all()
    assert (text.logprobs[0, 3:] < 0).all()
    prompts, keys = some_prompts(), row_keys(range(4))

    def refused(message, prompts=prompts, lengths=PROMPT_LENGTHS, **options):
        with pytest.raises(ValueError, match=message):
            run(CONFIG, params, prompts, lengths, keys, **options)

    refused("empty prompt", lengths=np.array([3, 0, 1, 5], np.int32))
    refused("empty prompt", prompts=prompts[:, :0], lengths=np.zeros(4, np.int32))
    refused("lengths", prompts=prompts[:, :6])
    refused("length=6", length=6)
    refused("context of 64", length=65)
    refused("vocab", vocab=101)
    refused("temperature", temperature=-1.0)


@pytest.mark.parametrize(("data", "model", "context"), [(4, 1, 1), (2, 2, 2)])
def test_on_a_mesh(params, text, data, model, context):
    mesh = make_mesh(data, model, jax.devices()[: data * model * context], context=context)
    shapes, axes = transformer.abstract(CONFIG)
    spread = jax.device_put(params, shardings(axes, shapes, mesh))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    inputs = jax.device_put((some_prompts(), PROMPT_LENGTHS, row_keys(range(4))), rows)
    with jax.set_mesh(mesh):
        whole = jax.jit(lambda *inputs: generate.generate(CONFIG, *inputs, length=LENGTH, vocab=VOCAB))
        compiled = whole.lower(spread, *inputs).compile()
        assert_same(jax.tree.map(np.asarray, compiled(spread, *inputs)), text)
    assert compiled.output_shardings.tokens.is_equivalent_to(rows, 2)
    moved = {shape for one in collectives(compiled.as_text()) for shape in one.shapes}
    assert not [shape for shape in moved if LENGTH in shape]  # neither the cache nor the text is exchanged


@pytest.mark.slow
def test_the_real_teacher_knows_france():
    from jaxkd.data import tokenize
    from jaxkd.models import weights

    try:
        checkpoint = weights.open_checkpoint("smollm2-135m-instruct")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = tokenize.from_gguf(checkpoint.tokenizer_fields)
    [(ids, _)] = tokenizer.encode(["The capital of France is"])
    prompt = np.array([ids], np.int32)
    params = jax.device_put(checkpoint.load())
    options = {"length": len(ids) + 8, "temperature": 0.0, "vocab": tokenizer.vocab, "end": tokenizer.end}
    text = run(checkpoint.config, params, prompt, np.array([len(ids)], np.int32), row_keys([0]), **options)
    written = tokenizer.tokenizer.decode(text.tokens[0, len(ids) : text.lengths[0]].tolist())
    assert " Paris" in written, written


def test_large_logits_cost_the_log_probabilities_no_digits():
    z = jnp.asarray([[8000.0, 8000.5, 7999.0]])
    heads = Decoder(
        lambda params, tokens: Marks(jnp.zeros(1, jnp.int32)), lambda *a: (Head(jnp.ones((1, 1, 1)), z), a[2])
    )
    prompt = jnp.zeros((1, 1), jnp.int32)
    text = sample(Sampler(heads, 3, 1, Sampling(0.0)), {}, prompt, jnp.ones(1, jnp.int32), row_keys([0]))
    assert text.tokens.tolist() == [[1]]
    np.testing.assert_allclose(text.logprobs, [[-np.log(np.exp(-0.5) + 1 + np.exp(-1.5))]], rtol=1e-6)


def test_completions_depend_on_their_own_prompt():
    config = dataclasses.replace(CONFIG, vocab=90)
    model, params = CausalLM(config), random_params(config, 0)
    both = kd.generate(model, params, [[5, 6, 7], [9]], max_new_tokens=6, vocab=80)
    assert [len(ids) for ids in both] == [6, 6]
    assert max(ids.max() for ids in both) < 80
    np.testing.assert_array_equal(kd.generate(model, params, [[9]], max_new_tokens=6, vocab=80)[0], both[1])
    ended = kd.generate(model, params, [[9]], max_new_tokens=6, vocab=80, end=int(both[1][2]))[0]
    first = int(np.flatnonzero(both[1] == both[1][2])[0])
    np.testing.assert_array_equal(ended, both[1][: first + 1])
    with pytest.raises(ValueError, match="prompt"):
        kd.generate(model, params, [[]])
