"""Sparse teachers: top-k with a tail, forms without one, and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import FAMILY, STORED, cast, close, dense, each_alone, fused, log_softmax, problem, sampled, topk
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkd.core.sharding import make_mesh
from jaxkd.core.types import Head, Sampled, TopK
from jaxkd.kernels.api import linear_divergence, refusal
from jaxkd.losses import divergences as d


@pytest.mark.parametrize(
    ("vocab", "chunk", "temperature"), [(51, 10, 2.0), pytest.param(64, 24, 1.0, marks=pytest.mark.slow)]
)
def test_each_on_top_k_matches_dense_float64(vocab, chunk, temperature):
    student, teacher, targets, one = problem()
    teacher = topk(teacher, 5, vocab, (1.0, 2.0))
    for weights in each_alone(len(STORED), one):
        arguments = (tuple(STORED.values()), student, teacher, targets % vocab, weights)
        arguments += (tuple(1.0 if term.normaliser else temperature for term in STORED.values()), vocab)
        close(fused(*arguments, chunk=chunk, tails=(1.0, 2.0)), dense(*arguments, tails=(1.0, 2.0)), weights != 0)


@pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (4, 2)])
def test_sparse_teachers_on_a_mesh(mesh):
    student, teacher, targets, one = problem()
    names = ("forward_kl", "reverse_kl", "renyi", "decoupled_topk", "conditional_kl", "next_token")
    terms = tuple(STORED[n] for n in names)
    for weights in each_alone(len(names), one):
        arguments = (terms, student, topk(teacher, 5, 51), targets % 51, weights, (1.0,) * len(names), 51)
        close(fused(*arguments, chunk=2, mesh=make_mesh(*mesh)), dense(*arguments), weights != 0)
    arguments = ((d.cross_entropy(),), student, sampled(teacher, 12, 51), targets % 51, one, (1.0,), 51)
    close(fused(*arguments, chunk=2, mesh=make_mesh(*mesh)), dense(*arguments), one != 0)


def test_draws_with_a_hard_target_match_dense_float64():
    student, teacher, targets, one = problem()
    terms = (d.cross_entropy(), d.next_token())
    weights = np.concatenate([one, 0.5 * one])
    arguments = (terms, student, sampled(teacher, 12, 51), targets % 51, weights, (1.0, 1.0), 51)
    close(fused(*arguments, chunk=10), dense(*arguments), weights != 0)


@pytest.mark.parametrize("mesh", [None, pytest.param((1, 8), marks=pytest.mark.slow)])
def test_padding_entries_change_nothing(mesh):
    """Ids out of range and log-probabilities of -inf."""
    student, teacher, targets, one = problem()
    mesh = None if mesh is None else make_mesh(*mesh)
    terms = (d.forward_kl(), d.reverse_kl(), d.conditional_kl(), d.decoupled_topk(4), d.adaptive_kl())
    weights, temperatures = np.tile(one, (len(terms), 1)), (1.0,) * len(terms)
    entries, draws = topk(teacher, 5, 51), sampled(teacher, 12, 51)
    beside = lambda x, *last: np.concatenate([x, np.tile(last, (24, 1))], -1).astype(x.dtype)
    filled = TopK(
        beside(entries.ids, -1, 51, 10**9, entries.ids[0, 0]),
        beside(entries.logprobs, -1.0, -0.5, 0.0, -np.inf),
        entries.tail,
    )
    pairs = [(terms, weights, temperatures, entries, filled)]
    more = Sampled(beside(draws.ids, -1, 51, 7), beside(draws.counts, 3, 4, 0))
    pairs.append(((d.cross_entropy(),), one, (1.0,), draws, more))
    for terms, weights, temperatures, plain, padded in pairs:
        rest = (targets % 51, weights, temperatures, 51)
        without, filled = (fused(terms, student, signal, *rest, mesh=mesh) for signal in (plain, padded))
        close(filled, jax.tree.map(np.float64, without), weights != 0)
        close(filled, dense(terms, student, padded, *rest), weights != 0)


@pytest.mark.parametrize("offset", [0.0, -50.0, -300.0])
def test_all_columns_stored(offset):
    """With very negative logits."""
    student, teacher, targets, weights = problem(columns=32)
    with np.errstate(divide="ignore"):
        entries = topk(teacher, 32, 32)  # the tail is log 0
    student = student._replace(bias=np.full(32, offset))
    live = fused((d.forward_kl(),), student, teacher, targets, weights, (1.0,), 32)
    stored = fused((d.forward_kl(),), student, entries, targets, weights, (1.0,), 32)
    close(stored, jax.tree.map(np.float64, live), weights != 0, tolerance=1e-5)


def test_sparse_bfloat16():
    student, teacher, targets, one = problem(tokens=32, width=64, columns=1024, spread=0.5)
    entries = cast(topk(teacher, 16, 1000), jnp.float32)
    rounded = cast(cast(student, jnp.bfloat16), np.float32)
    half = rounded._replace(hidden=rounded.hidden.astype(jnp.bfloat16))
    terms = (d.forward_kl(), d.reverse_kl(), d.next_token())
    rest = (targets % 1000, np.tile(one, (3, 1)), (1.0,) * 3, 1000)
    got, want = fused(terms, half, entries, *rest, chunk=8, dtype=None), dense(terms, rounded, entries, *rest)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(got[2], want[2], strict=True):
        assert np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b) < 4e-3


def test_a_drawn_token_stored_beside_the_leading_ones_has_its_exact_probability():
    """The sampled terms then equal those of the whole distribution; a drawn token that leads needs no entry more."""
    student, teacher, _, weights = problem(columns=48)
    leading = topk(teacher, 4, 48).ids
    targets = np.random.default_rng(1).integers(0, 48, 24)
    targets[:6] = leading[:6, 1]
    lp = log_softmax(teacher.hidden @ teacher.unembed)
    drawn = np.where((leading == targets[:, None]).any(-1), -1, targets)
    ids = np.concatenate([leading, drawn[:, None]], -1).astype(np.int32)
    logprobs = np.take_along_axis(lp, np.maximum(ids, 0), -1)
    tail = np.log1p(-np.where(ids >= 0, np.exp(logprobs), 0).sum(-1, keepdims=True))
    for term in (d.generalized_reverse_kl(4, sampled_tail=True), d.sampled_reverse_kl()):
        rest = (targets, weights, (1.0,), 48)
        stored = fused((term,), student, TopK(ids, logprobs, tail), *rest)
        live = fused((term,), student, teacher, *rest)
        close(stored, jax.tree.map(np.float64, live), weights != 0, tolerance=1e-5)


def test_all_entries_stored_equals_the_online_teacher():
    student, teacher, targets, weights = problem(columns=48)
    names = ("forward_kl", "reverse_kl", "jsd_0.5", "total_variation", "renyi", "decoupled_kd")
    terms, temperatures = tuple(FAMILY[n] for n in names), (1.0,) * len(names)
    weights = np.tile(weights, (len(names), 1))
    entries = topk(teacher, 47, 48)  # the 48th is the tail
    stored = fused(terms, student, entries, targets, weights, temperatures, 48)
    live = fused(terms, student, teacher, targets, weights, temperatures, 48)
    close(stored, jax.tree.map(np.float64, live), weights != 0, tolerance=1e-5)


F_DIVERGENCES = (
    "forward_kl", "reverse_kl", "jeffreys", "mixed_kl", "jsd_0.1", "jsd_0.5", "skew_kl", "skew_reverse_kl",
    "total_variation", "squared_hellinger", "renyi", "alpha_divergence",
)  # fmt: skip


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 4.0))
def test_bucketed_value_never_exceeds_the_full_value(seed, spread):
    """The data-processing inequality of f-divergences."""
    student, teacher, targets, weights = problem(seed, spread=spread)
    terms, temperatures = tuple(FAMILY[n] for n in F_DIVERGENCES), (1.0,) * len(F_DIVERGENCES)
    weights = np.ones((len(terms), 24))
    full = fused(terms, student, teacher, targets, weights, temperatures, 64)[1]
    bucket = fused(terms, student, topk(teacher, 5, 64), targets, weights, temperatures, 64)[1]
    assert (bucket <= full * (1 + 1e-5) + 1e-5).all()
    assert (bucket >= -1e-5).all()


def test_bucketed_value_does_not_decrease_with_k():
    student, teacher, targets, weights = problem()
    values = [
        dense((d.forward_kl(),), student, topk(teacher, k, 64), targets, weights * 0 + 1, (1.0,), 64)[1]
        for k in (1, 4, 16, 63)
    ]
    full = dense((d.forward_kl(),), student, teacher, targets, weights * 0 + 1, (1.0,), 64)[1]
    for fewer, more in zip(values, [*values[1:], full], strict=True):
        assert (fewer <= more + 1e-12).all()
    np.testing.assert_allclose(values[-1], full)


def test_student_without_mass_on_the_entries_is_penalised_by_the_bucket_only():
    student, teacher, targets, weights = problem()
    entries = topk(teacher, 5, 64)
    # This student avoids the teacher's entries equally at every token.
    bias = np.zeros(64)
    bias[np.unique(entries.ids)] = -30.0
    student = Head(student.hidden * 0, student.unembed, bias)
    value = lambda term: fused((term,), student, entries, targets, weights, (1.0,), 64)[1]
    assert (value(d.forward_kl()) > 5).all()
    assert (value(d.conditional_kl()) < 2).all()  # it ignores the mass on S


def test_partial_form_may_be_negative():
    _, teacher, targets, weights = problem()
    stored = topk(teacher, 3, 64)
    # The student is more confident in the first entry than the teacher.
    student = Head(np.zeros((24, 1)), np.zeros((1, 64)), np.where(np.arange(64) == stored.ids[0, 0], 40.0, 0.0))
    unsure = TopK(np.tile(stored.ids[0], (24, 1)), np.log(np.full((24, 3), [0.3, 1e-9, 1e-9])), np.full((24, 1), -0.36))
    assert fused((d.partial_kl(),), student, unsure, targets, weights, (1.0,), 64)[1].max() < -0.1


def test_draws_are_unbiased():
    """The mean gradient over many draws approaches forward KL's at the rate of independent draws."""
    student, teacher, targets, weights = problem(tokens=8, columns=64)
    terms = (d.cross_entropy(),)
    exact = dense((d.forward_kl(),), student, teacher, targets, weights, (1.0,), 64)[2][0]

    def error(repeats, first):
        draws = [
            fused(terms, student, sampled(teacher, 12, 64, first + i), targets, weights, (1.0,), 64)
            for i in range(repeats)
        ]
        return np.linalg.norm(np.mean([g[2][0] for g in draws], 0) - exact) / np.linalg.norm(exact)

    single, many = np.mean([error(1, i) for i in range(16)]), error(256, 100)
    assert 0.4 < many * 16 / single < 2.5


def test_a_small_tail_is_exact():
    """Far below float32's resolution of 1 - sum: the tail is summed, not subtracted."""
    z = np.full((8, 64), 0.0)
    z[:, :4] = 30.0
    student = Head(np.eye(8), z)
    teacher = TopK(np.tile(np.arange(4), (8, 1)), np.full((8, 4), np.log(0.2)), np.full((8, 1), np.log(0.2)))
    arguments = ((d.reverse_kl(), d.forward_kl()), student, teacher, np.zeros(8, int), np.ones((2, 8)), (1.0, 1.0), 64)
    close(fused(*arguments), dense(*arguments), np.ones((2, 8), bool))


def test_200k_vocabulary_and_ties():
    rng = np.random.default_rng(0)
    student = Head(rng.normal(size=(8, 4)), rng.normal(size=(4, 200_064)))
    teacher = Head(np.round(rng.normal(size=(8, 2))), np.round(rng.normal(size=(2, 200_064))))  # thousands of ties
    weights = np.ones((3, 8))
    terms = (d.forward_kl(), d.adaptive_kl(0.5), d.decoupled_topk(32))
    arguments = (terms, student, teacher, np.arange(8), weights, (1.0, 1.0, 1.0), 200_019)
    close(fused(*arguments), dense(*arguments), weights != 0, tolerance=2e-5)
    entries = topk(teacher, 64, 200_019)
    arguments = ((d.forward_kl(),), student, entries, np.arange(8), weights[:1], (1.0,), 200_019)
    close(fused(*arguments), dense(*arguments), weights[:1] != 0, tolerance=2e-5)


def test_unsupported_signals_raise():
    student, teacher, targets, weights = problem()
    entries, draws = cast(topk(teacher, 5, 64), jnp.float32), sampled(teacher, 12, 64)
    student, teacher = cast((student, teacher), jnp.float32)
    call = lambda term, signal, t=1.0, **k: linear_divergence(
        (term,), student, signal, jnp.asarray(targets), jnp.asarray(weights), (t,), vocab=64, **k
    )
    with pytest.raises(ValueError, match=r"tail is stored at temperature 1.0, not at 2.0"):
        call(d.forward_kl(), entries, 2.0)
    with pytest.raises(ValueError, match=r"not at a schedule"):
        call(d.forward_kl(), entries, jnp.float32(2.0))
    assert jnp.isfinite(call(d.conditional_kl(), entries, 2.0)[0])
    with pytest.raises(ValueError, match="linear in p: use cross_entropy"):
        call(d.forward_kl(), jax.tree.map(jnp.asarray, draws))
    with pytest.raises(ValueError, match="serve no other temperature"):
        call(d.cross_entropy(), jax.tree.map(jnp.asarray, draws), 2.0)
    with pytest.raises(ValueError, match="'partial' form is for a top-k teacher"):
        call(d.partial_kl(), teacher)
    with pytest.raises(ValueError, match="asks for the teacher's 6 leading entries, and 5 are stored"):
        call(d.decoupled_topk(6), entries)
    with pytest.raises(ValueError, match="standardising needs all"):
        call(d.forward_kl(), entries, standardized=(True,))
    assert refusal(d.next_token(), Sampled) is None


def test_log_probabilities_are_normalised():
    """Checks the tests' own top-k: entries and tail have all the mass, at each temperature."""
    teacher = problem()[1]
    entries = topk(teacher, 5, 64, (1.0, 2.0))
    np.testing.assert_allclose(np.exp(entries.logprobs).sum(-1) + np.exp(entries.tail[:, 0]), 1)
    z = log_softmax((teacher.hidden @ teacher.unembed) / 2)
    np.testing.assert_allclose(np.exp(np.sort(z)[:, :-5]).sum(-1), np.exp(entries.tail[:, 1]))
