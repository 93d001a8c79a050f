"""Known properties of each divergence: signs, zeros, bounds, special cases, limits, finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import FAMILY, STORED, ZERO_AT_EQUALITY, dense, fused, log_softmax, problem, topk
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkd.core.types import Head
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences as d

NAMES = tuple(ZERO_AT_EQUALITY)
TERMS = tuple(FAMILY[n] for n in NAMES)
UPPER = {
    "jsd_0.1": -0.1 * np.log(0.1) - 0.9 * np.log(0.9),
    "jsd_0.5": np.log(2),
    "skew_kl": np.log(10),
    "skew_reverse_kl": np.log(10),
    "total_variation": 1.0,
    "squared_hellinger": 1.0,
    "alpha_divergence": 1 / (0.3 * 0.7),
}


def values(terms, seed=0, spread=1.0, tokens=24):
    """Fields [terms, N] of the fused kernel on random heads."""
    student, teacher, targets, _ = problem(seed, tokens=tokens, spread=spread)
    return fused(terms, student, teacher, targets, np.ones((len(terms), tokens)), (1.0,) * len(terms), 64)[1]


def exact(*terms, seed=0):
    """Fields [terms, N] of the dense form in float64."""
    student, teacher, targets, _ = problem(seed)
    return dense(terms, student, teacher, targets, np.ones((len(terms), 24)), (1.0,) * len(terms), 64)[1]


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.01, 8.0))
def test_never_negative_and_within_bounds(seed, spread):
    for name, field in zip(NAMES, values(TERMS, seed, spread), strict=True):
        assert field.min() > -3e-6, name
        assert field.max() <= UPPER.get(name, np.inf) * (1 + 1e-5), name


def test_positive_where_the_distributions_differ():
    for name, field in zip(NAMES, values(TERMS, spread=0.3), strict=True):
        assert field.min() > 1e-4, name


def test_special_cases_of_alpha_beta():
    of = d.alpha_beta
    rows = exact(
        of(1.0, 0.0), d.forward_kl(), of(0.0, 1.0), d.reverse_kl(), of(0.5, 0.5), d.squared_hellinger(),
        d.alpha_divergence(1.0), d.alpha_divergence(0.0),
    )  # fmt: skip
    np.testing.assert_allclose(rows[0], rows[1])
    np.testing.assert_allclose(rows[2], rows[3])
    np.testing.assert_allclose(rows[4], 4 * rows[5])
    np.testing.assert_allclose(rows[6], rows[1])
    np.testing.assert_allclose(rows[7], rows[3])


POINTS = [(0.5, 0.0), (0.0, 0.5), (0.5, -0.5), (0.0, 0.0)]


@pytest.mark.parametrize("point", POINTS)
def test_singular_cases_are_limits(point):
    at, before, after = exact(
        d.alpha_beta(*point), *[d.alpha_beta(point[0] + step, point[1] + step) for step in (-2e-3, 2e-3)]
    )
    np.testing.assert_allclose(at, (before + after) / 2, rtol=1e-3)


@pytest.mark.parametrize("point", POINTS)
def test_near_a_limit_raises_except_within_rounding(point):
    with pytest.raises(ValueError, match=r"within 0.001 of 0.0 float32 cancels"):
        d.alpha_beta(point[0] + 1e-5, point[1] + 1e-5)
    near, at = exact(d.alpha_beta(point[0] + 1e-17, point[1] + 1e-17), d.alpha_beta(*point))
    np.testing.assert_array_equal(near, at)
    np.testing.assert_allclose(*exact(d.alpha_beta(0.1 + 0.2, -0.3), d.alpha_beta(0.3, -0.3)))


def test_squared_l2():
    student, teacher, *_ = problem()
    p, q = (np.exp(log_softmax(h.hidden @ h.unembed)) for h in (teacher, student))
    np.testing.assert_allclose(exact(d.alpha_beta(1.0, 1.0))[0], 0.5 * ((p - q) ** 2).sum(-1))


def test_renyi_and_alpha_approach_forward_kl():
    forward, renyi, alpha, low, high = exact(
        d.forward_kl(), d.renyi(1.002), d.alpha_divergence(0.998), d.renyi(0.3), d.renyi(2.0)
    )
    np.testing.assert_allclose(renyi, forward, rtol=2e-2)
    np.testing.assert_allclose(alpha, forward, rtol=2e-2)
    assert (low <= forward).all()  # not decreasing in alpha
    assert (forward <= high).all()


def test_endpoints_of_jsd():
    """The conventions for the ends, and their scale relative to the formula."""
    jsd, forward, reverse = d.generalized_jsd, d.forward_kl(), d.reverse_kl()
    rows = exact(
        forward, jsd(0.0, "kl"), jsd(0.0, "scaled"), jsd(1e-8),
        reverse, jsd(1.0, "kl"), jsd(1.0, "scaled"), jsd(1 - 1e-8), jsd(0.3), jsd(0.3, "kl"), jsd(0.3, "scaled"),
    )  # fmt: skip
    for same, other in ((0, 1), (0, 2), (4, 5), (4, 6), (8, 9)):
        np.testing.assert_allclose(rows[other], rows[same])
    np.testing.assert_allclose(rows[10], rows[8] / 0.21)
    for end, near in ((0, 3), (4, 7)):  # limits of "scaled" and of the formula
        np.testing.assert_allclose(rows[near] / 1e-8, rows[end], rtol=1e-3)
    with pytest.raises(ValueError, match="paper, kl or scaled"):
        jsd(0.5, "trl")


def test_mixtures():
    forward, reverse, mixed, jeffreys = exact(d.forward_kl(), d.reverse_kl(), d.mixed_kl(0.9), d.jeffreys())
    np.testing.assert_allclose(mixed, 0.1 * forward + 0.9 * reverse)
    np.testing.assert_allclose(jeffreys, forward + reverse)


def test_decoupled_kd_adds_up_to_forward_kl():
    _, teacher, targets, _ = problem()
    p = np.exp(log_softmax(teacher.hidden @ teacher.unembed))[np.arange(24), targets]
    binary, others, forward = exact(d.decoupled_kd(1.0, 0.0), d.decoupled_kd(0.0, 1.0), d.forward_kl())
    np.testing.assert_allclose(binary + (1 - p) * others, forward)


def test_decoupled_topk_equals_kl_of_the_bucketed_distributions():
    student, teacher, targets, _ = problem()
    bucket = dense((d.forward_kl(),), student, topk(teacher, 8, 64), targets, np.ones((1, 24)), (1.0,), 64)[1]
    np.testing.assert_allclose(exact(d.decoupled_topk(8)), bucket)
    inside, mass = exact(d.decoupled_topk(8, 0.0, 1.0), d.decoupled_topk(8, 1.0, 0.0))
    np.testing.assert_allclose(inside + mass, bucket[0])


def test_generalised_kl_is_at_most_that_of_the_bucketed_distributions():
    student, teacher, targets, _ = problem()
    entries, rest = topk(teacher, 8, 64), (targets, np.ones((1, 24)), (1.0,), 64)
    for part, whole in ((d.generalized_kl(8), d.forward_kl()), (d.generalized_reverse_kl(8), d.reverse_kl())):
        g, full = exact(part, whole)
        bucket = dense((whole,), student, entries, *rest)[1][0]
        assert (g >= 0).all()
        assert (g <= bucket).all()
        assert (bucket <= full).all()
        np.testing.assert_allclose(dense((part,), student, entries, *rest)[1][0], g)  # all stored entries


@pytest.mark.parametrize("term", [d.generalized_kl(4), d.generalized_reverse_kl(4)])
def test_generalised_kl_is_zero_where_the_leading_entries_agree(term):
    """However the tails differ, and only then."""
    z = np.sort(np.random.default_rng(0).normal(size=16))[::-1]
    other = np.concatenate([z[:4], z[:3:-1]])  # the tail in reverse
    moved = z + 0.1 * (np.arange(16) == 2)
    solve = lambda x: fused(
        (term,), Head(np.eye(2), np.tile(x, (2, 1))), Head(np.eye(2), np.tile(z, (2, 1))), *rest, 16
    )
    rest = (np.zeros(2, int), np.ones((1, 2)), (1.0,))
    value, _, (_, gradient, _) = solve(other)
    assert abs(value) < 1e-6
    assert np.abs(gradient).max() < 1e-6
    assert solve(moved)[0] > 1e-4


def test_adaptive_kl_by_hand():
    """The head is the fewest entries that reach the mass: 0.4 + 0.3 here, not 0.4 alone."""
    p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.1, 0.3, 0.5])
    gap, head = np.abs(p - q), np.array([True, True, False, False])
    share = gap[head].sum() / gap.sum()
    want = share * (p * np.log(p / q)).sum() + (1 - share) * (q * np.log(q / p)).sum()
    heads = [Head(np.ones((2, 1)), np.log(x)[None]) for x in (q, p)]
    for solve in (fused, dense):
        got = solve((d.adaptive_kl(0.5),), *heads, np.zeros(2, int), np.ones((1, 2)), (1.0,), 4)[1]
        np.testing.assert_allclose(got, want, rtol=1e-5)
    more = fused((d.adaptive_kl(0.75),), *heads, np.zeros(2, int), np.ones((1, 2)), (1.0,), 4)[1]
    assert abs(more[0, 0] - want) > 1e-3


def test_ties_are_in_the_top_set_in_both_implementations():
    """The top set of a uniform teacher has all entries; total variation's gradient is zero at ties."""
    heads = [Head(np.ones((2, 1)), x[None]) for x in (np.linspace(-1, 1, 16), np.zeros(16))]
    rest = (np.zeros(2, int), np.ones((2, 2)), (1.0, 1.0), 16)
    terms = (d.decoupled_topk(3), d.adaptive_kl(0.2))
    for got, want in zip(fused(terms, *heads, *rest)[1:], dense(terms, *heads, *rest)[1:], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)
    same = fused((d.total_variation(),), heads[0], heads[0], rest[0], rest[1][:1], (1.0,), 16)
    assert not any(np.abs(g).max() > 1e-7 for g in same[2])


EXTREMES = {
    "one-hot teacher": (1.0, 1e4),
    "one-hot student": (1e4, 1.0),
    "both one-hot": (1e4, 1e4),
    "both flat": (1e-6, 1e-6),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_values_and_gradients_stay_finite(case):
    student, teacher, targets, _ = problem()
    student, teacher = (
        h._replace(hidden=h.hidden * spread) for h, spread in zip((student, teacher), EXTREMES[case], strict=True)
    )
    for i, (name, _) in enumerate(FAMILY.items()):
        weights = np.zeros((len(FAMILY), 24))
        weights[i] = 1.0
        rest = (targets, weights, (1.0,) * len(FAMILY), 64)
        value, fields, gradient = fused(tuple(FAMILY.values()), student, teacher, *rest)
        assert np.isfinite(value), name
        assert np.isfinite(fields[i]).all(), name
        assert all(np.isfinite(g).all() for g in gradient), name


def test_sparse_terms_stay_finite_at_the_extremes():
    student, teacher, targets, _ = problem()
    for spread_student, spread_teacher in EXTREMES.values():
        entries = topk(teacher._replace(hidden=teacher.hidden * min(spread_teacher, 30.0)), 5, 64)
        head = student._replace(hidden=student.hidden * spread_student)
        terms = tuple(STORED.values())
        value, fields, gradient = fused(
            terms, head, entries, targets, np.ones((len(terms), 24)), (1.0,) * len(terms), 64
        )
        assert np.isfinite(value)
        assert np.isfinite(fields).all()
        assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d.skew_kl(1.0), "skew_kl: alpha must be above 0.0 and below 1.0, got 1.0"),
        (lambda: d.skew_reverse_kl(-0.1), "skew_reverse_kl: alpha"),
        (lambda: d.adaptive_kl(0.0), "adaptive_kl: mass"),
        (lambda: d.mixed_kl(1.5), "mixed_kl: reverse is a share"),
        (lambda: d.renyi(-1.0), "renyi: alpha must be above 0"),
        (lambda: d.renyi(2.5), "at most 2, got 2.5"),
        (lambda: d.renyi(1.0001), "within 0.001 of 1.0"),
        (lambda: d.generalized_jsd(1e-5, "scaled"), "within 0.001 of 0.0"),
        (lambda: d.alpha_beta(0.5, -0.95), "powers below -0.9"),
        (lambda: d.decoupled_kd(others=float("inf")), "decoupled_kd: others must be a number from 0 on, got inf"),
        (lambda: d.decoupled_topk(4, inside=-1.0), "decoupled_topk: inside must be a number"),
        (lambda: d.alpha_beta(float("nan"), 1.0), "alpha_beta needs finite numbers"),
        (lambda: d.decoupled_topk(0), "decoupled_topk: k must be an integer from 1 on, got 0"),
        (lambda: d.generalized_kl(0), "generalized_kl: k must be an integer"),
        (lambda: d.generalized_reverse_kl(-1), "generalized_reverse_kl: k must be an integer"),
        (lambda: d.next_token(1.0), "next_token: smoothing"),
    ],
)
def test_parameters_out_of_range_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_smoothing_and_z_loss_by_hand():
    student, _, targets, _ = problem()
    z = student.hidden @ student.unembed
    lq = log_softmax(z)
    terms = (d.next_token(0.1), d.z_loss())
    smoothed, z_loss = fused(terms, student, None, targets, np.ones((2, 24)), (1.0, 1.0), 64)[1]
    np.testing.assert_allclose(smoothed, -0.9 * lq[np.arange(24), targets] - 0.1 * lq.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(z_loss, np.log(np.exp(z).sum(-1)) ** 2, rtol=1e-5)


def test_frozen_head_has_no_gradient_product():
    """Three of four matrix products remain, with equal gradients of the hidden states."""
    student, teacher, targets, weights = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32) if x.dtype == np.float64 else jnp.asarray(x), problem()
    )

    def value(hidden, unembed):
        head = Head(hidden, unembed)
        return linear_divergence((d.forward_kl(),), head, teacher, targets, weights, (1.0,), vocab=64)[0]

    both = jax.jit(jax.grad(value, (0, 1)))
    alone = jax.jit(jax.grad(value))
    frozen = jax.jit(jax.grad(lambda h, u: value(h, jax.lax.stop_gradient(u))))
    products = lambda f: f.lower(*student[:2]).as_text().count("stablehlo.dot_general")
    assert (products(both), products(alone), products(frozen)) == (4, 3, 3)
    np.testing.assert_allclose(alone(*student[:2]), both(*student[:2])[0], rtol=1e-6)
