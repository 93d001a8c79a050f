"""Top-k and draws of a head: against numpy, in chunks, on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import cast, log_softmax, problem, topk

from jaxkd.core import sharding
from jaxkd.core.types import Head
from jaxkd.kernels import sparsify

VOCAB = 57  # of 64 columns


def teacher(tokens=300) -> tuple[Head, Head]:
    """In float64 for numpy and float32 for the kernel; tokens are no multiple of a chunk."""
    _, head, _, _ = problem(tokens=tokens)
    return head, cast(head, jnp.float32)


def probabilities(head: Head) -> np.ndarray:
    return np.exp(log_softmax((head.hidden @ head.unembed)[:, :VOCAB]))


@pytest.mark.parametrize("entries", [1, 5, VOCAB])
@pytest.mark.parametrize("mesh", [None, (1, 8), (4, 2)])
def test_top_k_matches_sorting(entries, mesh):
    exact, head = teacher(296)
    run = jax.jit(lambda head: sparsify.top_k(head, entries, (1.0, 2.0), VOCAB))
    if mesh is None:
        found = run(head)
    else:
        with jax.set_mesh(sharding.make_mesh(*mesh)):
            found = run(head)
    expected = topk(exact, entries, VOCAB, (1.0, 2.0)) if entries < VOCAB else None
    if expected is None:
        assert np.all(np.sort(found.ids, -1) == np.arange(VOCAB))
        assert np.all(np.asarray(found.tail) == -np.inf)
        np.testing.assert_allclose(np.exp(found.logprobs).sum(-1), 1.0, rtol=1e-5)
        return
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-5)
    np.testing.assert_allclose(found.tail, expected.tail, atol=2e-5)


def test_more_entries_than_ids_raise():
    with pytest.raises(ValueError, match="58 entries"):
        sparsify.top_k(teacher()[1], VOCAB + 1, (1.0,), VOCAB)


def test_order_of_tokens_with_sharded_length():
    _, head = teacher(296)
    rows = head._replace(hidden=head.hidden.reshape(4, 74, -1))
    run = jax.jit(lambda head: sparsify.top_k(head, 5, (1.0,), VOCAB))
    with jax.set_mesh(sharding.make_mesh(2, 2, context=2)):
        found = run(rows)
    assert found.ids.shape == (4, 74, 5)
    np.testing.assert_array_equal(found.ids.reshape(296, 5), run(head).ids)


@pytest.mark.parametrize("mesh", [None, *(pytest.param(m, marks=pytest.mark.slow) for m in ((1, 8), (4, 2)))])
def test_draws_match_the_inverse_cdf(mesh):
    exact, head = teacher(296)
    uniforms = np.random.default_rng(0).uniform(size=(296, 40)).astype(np.float32)
    run = jax.jit(lambda head, u: sparsify.draw(head, u, VOCAB))
    if mesh is None:
        found = run(head, uniforms)
    else:
        with jax.set_mesh(sharding.make_mesh(*mesh)):
            found = run(head, uniforms)
    assert np.all(np.asarray(found.counts).sum(-1) == 40)
    assert np.asarray(found.ids).max() < VOCAB
    up_to = np.cumsum(probabilities(exact), -1)
    wrong = 0
    for token in range(296):
        expected = np.bincount(np.searchsorted(up_to[token], uniforms[token], side="right"), minlength=VOCAB)
        got = np.zeros(VOCAB, int)
        for i, c in zip(found.ids[token], found.counts[token]):
            got[i] += c if c else 0
        wrong += np.abs(got - expected).sum() // 2
    assert wrong <= 3  # draws at a boundary may differ in float32


def test_draws_are_unbiased():
    exact, head = teacher(8)
    run = jax.jit(lambda head, u: sparsify.draw(head, u, VOCAB))
    draws = 4096
    found = run(head, jax.random.uniform(jax.random.key(1), (8, draws)))
    p, share = probabilities(exact), np.zeros((8, VOCAB))
    for token in range(8):
        for i, c in zip(np.asarray(found.ids)[token], np.asarray(found.counts)[token]):
            share[token, i] += c / draws if c else 0.0
    assert np.all(np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / draws) + 1e-4)


def test_entry_without_mass_is_never_drawn():
    """Even with the largest uniform number below 1 and last columns without mass."""
    hidden = jnp.ones((1, 1))
    unembed = jnp.where(jnp.arange(64) < 3, 0.0, -200.0)[None]
    top = np.nextafter(np.float32(1), np.float32(0))
    found = sparsify.draw(Head(hidden, unembed), jnp.asarray([[0.0, 0.5, top]]), VOCAB)
    assert sorted(i for i, c in zip(*map(np.ravel, found)) if c) == [0, 1, 2]


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    temporary = lambda tokens: (
        jax.jit(functools.partial(sparsify.top_k, entries=8, temperatures=(1.0,), vocab=8000))
        .lower(Head(shape(tokens, 16), shape(16, 8000)))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    assert temporary(8192) - temporary(4096) < 4096 * 8000  # a quarter of the additional logits
