"""The decoder: packing, taps, rematerialisation, vocabulary padding, removed layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import random_params

from jaxkd.core.types import Batch
from jaxkd.losses.feature_term import FeatureTerm, nothing, per_token
from jaxkd.losses.objective import objective
from jaxkd.models import shrink, transformer
from jaxkd.models.transformer import Config

CONFIG = Config(vocab=100, embed=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp=48, qk_norm=True, qkv_bias=True)


def batch_of(documents: list[np.ndarray], length: int) -> Batch:
    """One row that holds the documents one after another."""
    tokens, segments, positions = (np.zeros((1, length), np.int32) for _ in range(3))
    start = 0
    for number, ids in enumerate(documents, 1):
        here = slice(start, start + len(ids))
        tokens[0, here], segments[0, here], positions[0, here] = ids, number, np.arange(len(ids))
        start += len(ids)
    weights = (segments > 0).astype(np.float32)
    one = np.zeros(1, np.int32)
    return Batch(*map(jnp.asarray, (tokens, tokens, weights, segments, positions, one, one)))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def hidden(params, batch, **options):
    return np.asarray(transformer.forward(CONFIG, params, batch, **options).head.hidden)


def test_packing_causality_and_relative_positions(params):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 100, n) for n in (5, 9, 3)]
    packed = hidden(params, batch_of(documents, 20))[0]
    start = 0
    for ids in documents:
        alone = hidden(params, batch_of([ids], len(ids)))[0]
        np.testing.assert_allclose(packed[start : start + len(ids)], alone, atol=2e-5)
        start += len(ids)
    # Causal.
    ids = np.arange(12) * 7 % 100
    changed = ids.copy()
    changed[8:] = 3
    first, second = (hidden(params, batch_of([x], 12))[0] for x in (ids, changed))
    np.testing.assert_array_equal(first[:8], second[:8])
    assert np.abs(first[8:] - second[8:]).max() > 1e-3
    # Only relative positions matter.
    ids = np.array([5, 6, 7])
    batch = batch_of([ids], 3)
    moved = batch._replace(positions=batch.positions + 11)
    np.testing.assert_allclose(hidden(params, batch), hidden(params, moved), atol=2e-5)
    spread = batch._replace(positions=batch.positions * 3)
    assert np.abs(hidden(params, batch) - hidden(params, spread)).max() > 1e-3


def test_taps_are_the_residual_stream_and_change_nothing(params):
    batch = batch_of([np.arange(10)], 10)
    plain = transformer.forward(CONFIG, params, batch)
    tapped = transformer.forward(CONFIG, params, batch, taps=("layer_1", "layer_4"))
    np.testing.assert_allclose(plain.head.hidden, tapped.head.hidden, atol=1e-6)
    assert not plain.taps
    assert set(tapped.taps) == {"layer_1", "layer_4"}
    first = dataclasses.replace(CONFIG, layers=1)
    cut = transformer.forward(first, shrink.keep_layers(params, (0,)), batch, taps=("layer_1",))
    np.testing.assert_allclose(tapped.taps["layer_1"], cut.taps["layer_1"], atol=1e-6)
    with pytest.raises(ValueError, match="layer_5"):
        transformer.forward(CONFIG, params, batch, taps=("layer_5",))


def test_rematerialisation_keeps_values_and_gradients_and_saves_memory(params):
    batch = batch_of([np.arange(64) % 100], 64)

    def loss(params, remat):
        return jnp.sum(jnp.square(transformer.forward(CONFIG, params, batch, remat=remat).head.hidden))

    plain, layer = (jax.jit(jax.value_and_grad(lambda p, r=r: loss(p, r))) for r in transformer.REMAT)
    for got, want in zip(jax.tree.leaves(layer(params)), jax.tree.leaves(plain(params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-4)
    used = [f.lower(params).compile().memory_analysis().temp_size_in_bytes for f in (plain, layer)]
    assert used[1] < 0.7 * used[0]


def test_logical_axes_cover_every_parameter(params):
    shapes, axes = transformer.abstract(CONFIG)
    assert jax.tree.map(lambda s: s.shape, shapes) == jax.tree.map(lambda x: x.shape, params)
    names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    for leaf, name in zip(jax.tree.leaves(shapes), names, strict=True):
        assert len(leaf.shape) == len(name)
        assert all(name)
    assert axes["layers"]["q"] == ("layers", "embed", "heads", "head_dim")
    config = dataclasses.replace(CONFIG, qkv_bias=False, qk_norm=False, tied=False)
    by_hand = 2 * 100 * 32 + 32 + 4 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert transformer.parameter_count(config) == by_hand


def test_left_out_layer_equals_the_shorter_decoder(params):
    batch = batch_of([np.arange(10)], 10)
    out = hidden(shrink.without_layer(params, 2), batch)
    short = dataclasses.replace(CONFIG, layers=3)
    cut = transformer.forward(short, shrink.keep_layers(params, (0, 1, 3)), batch).head.hidden
    np.testing.assert_allclose(out, cut, atol=1e-6)
    scores = np.array([9.0, 3.1, 3.3, 3.2, 7.0])
    assert shrink.most_important(scores, 3) == (0, 2, 4)
    with pytest.raises(ValueError, match=r"student\.keep"):
        shrink.most_important(scores, 6)


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (0, 4), (-1, 2)])
def test_bad_layers_are_named(params, layers):
    with pytest.raises(ValueError, match=r"student\.layers"):
        shrink.keep_layers(params, layers)


def test_aux_outputs_reach_a_feature_term(params):
    """Such as a router's loss per token: its gradient is that of the weighted sum."""
    batch = batch_of([np.arange(6), np.arange(9)], 20)

    def forward(params):
        output = transformer.forward(CONFIG, params, batch)
        return output._replace(aux={"router": jnp.square(output.head.hidden).mean(-1)})

    term = FeatureTerm(nothing, per_token(lambda own, student, *_: student.aux["router"]), uses_teacher=False)
    whole = objective({"router": (0.5, term)}, vocab=100, domains=("a",))
    value = lambda p: whole.loss({}, forward(p), None, batch, jnp.int32(0))[0]
    plain = lambda p: 0.5 * jnp.sum(batch.weights * forward(p).aux["router"])
    (got, got_gradient), (want, want_gradient) = (jax.value_and_grad(f)(params) for f in (value, plain))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got_gradient, want_gradient)
