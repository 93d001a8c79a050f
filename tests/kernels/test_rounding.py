"""Float32 rounding: the last leading entry, boundaries between devices, large logits."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import cast, close, dense, fused, log_softmax, problem, topk
from test_pallas_tpu import tiled

from jaxkd.core.sharding import make_mesh
from jaxkd.core.types import LOG_FLOOR, Ensemble, Head, TopK, TopSet
from jaxkd.kernels import pointwise, sparsify
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences as d

VOCAB = 57  # of 64 columns


@pytest.mark.parametrize("mesh", [None, (1, 8), (4, 2)])
def test_kth_entry_of_a_recomputed_teacher_is_in_the_top_set(mesh):
    """A geometric mean is elementwise, so XLA may recompute it for each use, with other rounding."""
    rng, tokens, k = np.random.default_rng(0), 296, 4
    student, _, targets, _ = problem(tokens=tokens)
    heads = tuple(Head(rng.normal(size=(tokens, n)), rng.normal(size=(n, 64)) * 0.5) for n in (24, 12, 8))
    shares = np.float32(rng.dirichlet([1.0] * 3, tokens))
    lps = [log_softmax((h.hidden @ h.unembed)[:, :VOCAB]) for h in (student, *heads)]
    mean = log_softmax(sum(shares[:, i : i + 1] * lp for i, lp in enumerate(lps[1:])))
    p, q = np.exp(mean), np.exp(lps[0])
    ids = np.argsort(-p, -1)[:, :k]
    p, q = (np.take_along_axis(x, ids, -1) for x in (p, q))
    beside = lambda x: np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1)
    expected = (beside(p) * np.log(beside(p) / beside(q))).sum(-1)
    heads, weights = (student, Ensemble(heads, shares, True)), np.ones((1, tokens))
    np.testing.assert_allclose(
        dense((d.decoupled_topk(k),), *heads, targets, weights, (1.0,), VOCAB)[1][0], expected, rtol=1e-9
    )

    # LLVM's optimiser, disabled in tests, contracts a product and a sum to one rounding.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def fields(student, teacher, targets, weights):
        call = (d.decoupled_topk(k),), student, teacher, targets, weights, (1.0,)
        return linear_divergence(*call, vocab=VOCAB)[1][0]

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(*mesh)):
        found = fields(*cast(heads, jnp.float32), jnp.asarray(targets), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=5e-6)


def test_threshold_is_halfway_to_the_next_entry():
    """In nats, so that rounding does not change the set even near probability 1; entries at the floor are last."""
    lp = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1], [1 - 1e-7, 6e-8, 4e-8, 0.0], [0.25, 0.25, 0.25, 0.25]]))
    lp = jnp.maximum(lp, LOG_FLOOR)
    found = [np.asarray(pointwise.top_threshold(lp, which)) for which in (TopSet(entries=1), TopSet(mass=0.6))]
    middle = lambda *p: -np.mean(np.log(p))
    certain, even = middle(1.0, 6e-8), (middle(0.25) - LOG_FLOOR) / 2
    np.testing.assert_allclose(found[0], [middle(0.4, 0.3), certain, even], rtol=1e-5)
    np.testing.assert_allclose(found[1], [middle(0.3, 0.2), certain, even], rtol=1e-5)


def test_entries_that_differ_by_rounding_are_tied():
    lp = np.float32(np.log([[0.3, 0.2, 0.2, 0.2, 0.1]]))
    lp[0, 2:4] = np.nextafter(lp[0, 1], [-9, 9], dtype=np.float32)
    for k in (2, 3, 4):
        assert pointwise.top_set(jnp.asarray(lp), TopSet(entries=k)).tolist() == [[True, True, True, True, False]]


def test_draw_at_a_boundary_between_devices_has_one_owner():
    _, teacher, _, _ = problem(tokens=64)
    up_to = np.cumsum(np.exp(log_softmax((teacher.hidden @ teacher.unembed)[:, :VOCAB])), -1)
    edges = up_to[:, 7:56:8, None]  # 8 columns per device
    uniforms = np.float32(edges + np.arange(-6, 7) * 2.0**-24).reshape(64, -1)
    with jax.set_mesh(make_mesh(1, 8)):
        found = jax.jit(lambda head, u: sparsify.draw(head, u, VOCAB))(cast(teacher, jnp.float32), uniforms)
    ids, counts = (np.asarray(x) for x in found)
    assert ids.max() < VOCAB
    assert (counts.sum(-1) == uniforms.shape[1]).all()
    low, high = (np.take_along_axis(x, ids, -1)[..., None] for x in (np.pad(up_to, ((0, 0), (1, 0))), up_to))
    near = ((low - 1e-6 <= uniforms[:, None]) & (uniforms[:, None] <= high + 1e-6)).any(-1)
    assert near[counts > 0].all(), ids[(counts > 0) & ~near]


def near_equality(offset, tokens=24, columns=256):
    """Heads with products that are exact in float32, so that the float64 form has the same logits."""
    rng = np.random.default_rng(0)
    z = np.float32(rng.normal(size=(tokens, columns)) * 3 + offset)
    other = np.float32(z + rng.normal(size=z.shape) * max(1e-3, offset * 1e-6))
    return [Head(np.eye(tokens), np.float64(x)) for x in (z, other)]


KLS = (d.forward_kl(), d.reverse_kl())


@pytest.mark.parametrize("signal", ["head", "blend", "top_k", "pallas"])
@pytest.mark.parametrize("mesh", [None, (1, 8)])
def test_large_logits_lose_no_precision(signal, mesh):
    student, teacher = near_equality(8000.0)
    taught = {
        "top_k": topk(teacher, 32, 250, (2.0,)),
        "blend": Ensemble((teacher, teacher), np.full((24, 2), 0.5), True),
    }
    rest = (np.zeros(24, int), np.ones((2, 24)), (2.0, 2.0), 250)
    solve = tiled if signal == "pallas" else fused
    more = {"tails": (2.0,)} if signal == "top_k" else {}
    call = KLS, student, taught.get(signal, teacher), *rest
    got = solve(*call, mesh=None if mesh is None else make_mesh(*mesh), **more)
    want = dense(*call, **more)
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-6)
    assert np.linalg.norm(got[2][1] - want[2][1]) < 1e-4 * np.linalg.norm(want[2][1])


@pytest.mark.parametrize("mesh", [None, (1, 8)])
def test_stored_entries_of_large_logits(mesh):
    _, teacher = near_equality(8000.0)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(*mesh)):
        found = jax.jit(lambda head: sparsify.top_k(head, 8, (1.0, 3.0), 250))(cast(teacher, jnp.float32))
    expected = topk(teacher, 8, 250, (1.0, 3.0))
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-6)
    np.testing.assert_allclose(found.tail, expected.tail, atol=2e-6)


@pytest.mark.parametrize("term", [d.renyi(2.0), d.alpha_divergence(2.0)])
def test_padding_is_not_differentiated(term):
    """A nearly uniform teacher at T < 1: p^2 / q of a padding entry would overflow."""
    student, teacher, targets, weights = problem(columns=512, spread=0.05)
    entries = topk(teacher, 5, 512, (0.5,))
    beside = lambda x, *last: np.concatenate([x, np.tile(last, (24, 1))], -1).astype(x.dtype)
    filled = TopK(beside(entries.ids, -1, 9, 700), beside(entries.logprobs, -np.inf, -np.inf, 0.0), entries.tail)
    rest = targets, weights, (0.5,), 512
    got, want = (f((term,), student, x, *rest, tails=(0.5,)) for f, x in ((fused, filled), (dense, entries)))
    close(got, want, weights != 0)
