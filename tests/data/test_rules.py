"""Rules against closed forms: fixed points, floors, caps, limits, and what a state must survive."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkd.data import rules
from jaxkd.data.rules import Gaps, Gradients

SIZES = [50, 400, 10, 40]


def gaps(excess, teacher=2.0) -> Gaps:
    excess = np.asarray(excess, np.float64)
    there = np.full_like(excess, teacher)
    return Gaps(there + excess, there, (there + excess) / 2, there / 2)


def run(rule, measured, sizes=SIZES):
    """Shares of each interval: the first, and then one per measurement."""
    sampling, state = rule.init(sizes, measured[0])
    shares = [sampling]
    for interval, each in enumerate(measured[1:], 1):
        sampling, state = rule.update(json.loads(json.dumps(state)), each, interval)
        assert sampling.sum() == pytest.approx(1.0, abs=1e-12)
        assert (sampling >= 0).all()
        shares.append(sampling)
    return shares


def softmax(x):
    x = np.exp(np.asarray(x) - np.max(x))
    return x / x.sum()


def test_ddk_is_its_equations():
    """Two updates by hand; the first interval is the pool as it is."""
    first, second, third = run(rules.ddk(), [gaps([0.1, 0.5, 0.3, 0.0]), gaps([0.2, 0.4, 0.3, 0.1]), gaps([0.1] * 4)])
    np.testing.assert_allclose(first, np.asarray(SIZES) / 500)
    r = softmax(np.exp([0.1, 0.5, 0.3, 0.0]))
    for shares, excess in ((second, [0.2, 0.4, 0.3, 0.1]), (third, [0.1] * 4)):
        psi = r * np.exp(np.exp(excess))
        r = 0.5 * psi / psi.sum() + 0.5 / 4
        np.testing.assert_allclose(shares, r, rtol=1e-12)
    measured = [gaps([0.1, 0.9, 0.2, 0.4])] * 3
    np.testing.assert_allclose(run(rules.ddk(0.0), measured)[-1], 0.25)
    np.testing.assert_allclose(run(rules.ddk(1.0), measured)[1], softmax(2 * np.exp([0.1, 0.9, 0.2, 0.4])))
    np.testing.assert_allclose(run(rules.ddk(), [gaps([0.7] * 4)] * 3)[-1], 0.25)
    np.testing.assert_allclose(run(rules.ddk(first="uniform"), measured)[0], 0.25)
    # An untrained student: everything goes to that domain, up to the cap; a clip holds it back.
    measured = [gaps([9.0, 0.1, 0.1, 0.1])] * 3
    assert run(rules.ddk(), measured)[-1][0] == pytest.approx(0.625)
    assert run(rules.ddk(1.0, smooth=False), measured)[-1][0] == pytest.approx(1.0)
    clipped = run(rules.ddk(clip=2.0), measured)[-1]
    assert 0.3 < clipped[0] < 0.5
    # Scores.
    measured = [gaps([0.5, 0.1, 0.3, 0.2])] * 2
    of = lambda score: run(rules.ddk(1.0, score, smooth=False), measured)[-1]
    np.testing.assert_allclose(of("perplexity_ratio"), softmax(np.exp([0.5, 0.1, 0.3, 0.2])))
    np.testing.assert_allclose(of("excess_loss"), softmax([0.5, 0.1, 0.3, 0.2]))
    np.testing.assert_allclose(of("bits_per_byte"), softmax(np.exp(np.log(2) * np.array([0.5, 0.1, 0.3, 0.2]) / 2)))


@settings(max_examples=40)
@given(st.lists(st.floats(0.0, 1.5), min_size=2, max_size=6), st.floats(0.05, 0.9))
def test_constant_gaps_lead_to_the_fixed_point(excess, alpha):
    """r_i = ((1 - alpha) / N) / (1 - alpha exp(rho_i) / Z), wherever Z puts the sum.

    Each interval takes at least a (1 - alpha) / N-th of the way, here a sixtieth: so many are enough for seven digits.
    """
    count, rho = len(excess), np.exp(excess)
    last = run(rules.ddk(alpha), [gaps(excess)] * 1000, [1] * count)[-1]
    z = (last * np.exp(rho)).sum()
    np.testing.assert_allclose(last, (1 - alpha) / count / (1 - alpha * np.exp(rho) / z), rtol=1e-6)


@given(st.lists(st.floats(-3.0, 12.0), min_size=2, max_size=8), st.floats(0.0, 1.0))
def test_no_share_leaves_its_floor_and_its_cap(excess, alpha):
    count = len(excess)
    for sampling in run(rules.ddk(alpha), [gaps(excess)] * 6, [1] * count)[1:]:
        assert sampling.min() >= (1 - alpha) / count - 1e-12
        assert sampling.max() <= alpha + (1 - alpha) / count + 1e-12


@pytest.mark.parametrize("rule", [rules.ddk(), rules.ddk(smooth=False), rules.sheared_llama()])
def test_the_order_of_domains_means_nothing(rule):
    excess, order = np.array([0.5, 0.1, 0.9, 0.3]), [2, 0, 3, 1]
    plain = run(rule, [gaps(excess)] * 4)
    moved = run(rule, [gaps(excess[order])] * 4, [SIZES[i] for i in order])
    for a, b in zip(plain, moved, strict=True):
        np.testing.assert_allclose(a[order], b, rtol=1e-12)


def test_sheared_llama():
    """By hand; w_i = (c / N) / (1 - (1 - c) exp(delta_i) / Z) in the end; without a floor one domain takes all."""
    _, second, third = run(rules.sheared_llama(0.1), [gaps([0] * 4), gaps([0.5, -1.0, 0.0, 1.0]), gaps([0.2, 0, 0, 0])])
    w = np.asarray(SIZES) / 500
    for shares, delta in ((second, [0.5, 0.0, 0.0, 1.0]), (third, [0.2, 0.0, 0.0, 0.0])):
        w = w * np.exp(delta)
        w = 0.9 * w / w.sum() + 0.1 / 4
        np.testing.assert_allclose(shares, w, rtol=1e-12)
    excess, floor = np.array([0.5, 0.1, 0.0, -0.4]), 0.1
    last = run(rules.sheared_llama(floor), [gaps(excess)] * 600)[-1]
    growth = np.exp(np.maximum(excess, 0.0))
    np.testing.assert_allclose(last, floor / 4 / (1 - (1 - floor) * growth / (last * growth).sum()), rtol=1e-6)
    assert (last >= floor / 4).all()
    np.testing.assert_allclose(run(rules.sheared_llama(0.0), [gaps(excess)] * 200)[-1], [1, 0, 0, 0], atol=1e-12)
    still = run(rules.sheared_llama(0.0), [gaps([-0.5, 0.0, -0.1, 0.0])] * 50)[-1]
    np.testing.assert_allclose(still, np.asarray(SIZES) / 500)


NAMES = ("a", "b", "c", "d")
GRADIENTS = np.array([[0.3, 0.0, 0.4], [0.0, 0.5, 0.0], [0.3, 0.1, 0.0], [-0.2, 0.0, -0.2]])


def test_doge():
    """Four gradients in three dimensions; the last points away from the others, so its score is cut to 0."""
    # Targets are looked at, and none of them is drawn.
    measured = Gradients(GRADIENTS @ GRADIENTS.T, 0.1)
    first, second, third = run(rules.doge(mu=0.05)(NAMES), [None, measured, measured])
    np.testing.assert_allclose(first, 0.25)
    # <g_i, sum of the others>: a: 0.09 - 0.14, b: 0.05, c: 0.09 + 0.05 - 0.06, d: -0.14 - 0.06
    helped = np.array([-0.05, 0.05, 0.08, -0.20])
    length = (0.5 + 0.5 + np.sqrt(0.1) + np.sqrt(0.08)) / 4
    score = np.maximum(0.1 * helped / length, 0.0)
    np.testing.assert_allclose(second, softmax(score / 0.05), rtol=1e-4)
    np.testing.assert_allclose(third, softmax(2 * score / 0.05), rtol=1e-4)
    first, second = run(rules.doge(mu=0.05, targets=("c",))(NAMES), [None, measured])
    np.testing.assert_allclose(first, [1 / 3, 1 / 3, 0, 1 / 3])
    score = np.maximum(0.1 * np.array([0.09, 0.05, -0.06]) / ((0.5 + 0.5 + np.sqrt(0.08)) / 3), 0.0)
    np.testing.assert_allclose(second[[0, 1, 3]], softmax(score / 0.05), rtol=1e-4)
    assert second[2] == 0.0
    # The average of the shares.
    rule, measured = rules.doge(mu=0.01)(NAMES), Gradients(GRADIENTS @ GRADIENTS.T, 0.1)
    _, state = rule.init(SIZES, None)
    drawn = []
    for interval in range(1, 5):
        sampling, state = rule.update(json.loads(json.dumps(state)), measured, interval)
        drawn.append(sampling)
    np.testing.assert_allclose(state["average"], np.mean(drawn, 0), rtol=1e-12)
    # Long gradients and large scores are cut.
    long = np.array([[30.0, 0.0], [0.5, 0.0], [0.0, 0.4]])
    shares = lambda **options: run(
        rules.doge(mu=0.05, **options)(NAMES[:3]), [None, Gradients(long @ long.T, 0.1)], [1] * 3
    )[-1]
    helped = np.array([0.5, 0.5, 0.0])  # the first is cut to a length of 1
    np.testing.assert_allclose(shares(), softmax(0.1 * helped / ((1 + 0.5 + 0.4) / 3) / 0.05), rtol=1e-4)
    uncut = 0.1 * 30 * helped / ((30 + 0.5 + 0.4) / 3)
    np.testing.assert_allclose(shares(norm=0.0), softmax(uncut / 0.05), rtol=1e-4)
    np.testing.assert_allclose(shares(norm=0.0, limit=0.3), softmax(np.minimum(uncut, 0.03) / 0.05), rtol=1e-4)


def write_weights(path, weights, mixture="doremi_proxy()"):
    path.mkdir(exist_ok=True)
    (path / rules.DOMAIN_WEIGHTS).write_text(json.dumps({"mixture": mixture, "steps": 10, "weights": weights}))
    return str(path)


def test_doremi_draws_by_the_names_of_another_run_and_names_a_wrong_one(tmp_path):
    proxy = write_weights(tmp_path / "proxy", {"d": 0.1, "a": 0.2, "b": 0.3, "c": 0.4})
    shares = run(rules.doremi(proxy)(NAMES), [None] * 3)
    np.testing.assert_allclose(shares, [[0.2, 0.3, 0.4, 0.1]] * 3)
    begin = lambda where: rules.doremi(str(where))(NAMES).init(SIZES, None)
    with pytest.raises(FileNotFoundError, match=r"data\.mixture.*none"):
        begin(tmp_path / "none")
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(ValueError, match=r"data\.mixture.*unfinished"):
        begin(tmp_path / "unfinished")
    with pytest.raises(ValueError, match=r"data\.mixture.*other"):
        begin(write_weights(tmp_path / "other", {"a": 0.5, "x": 0.5}))
    (tmp_path / "other" / rules.DOMAIN_WEIGHTS).write_text("{")
    with pytest.raises(ValueError, match=r"data\.mixture.*domain_weights\.json"):
        begin(tmp_path / "other")


def test_rules_that_measure_nothing():
    nothing = [None] * 4
    np.testing.assert_allclose(run(rules.natural(), nothing)[-1], np.asarray(SIZES) / 500)
    np.testing.assert_allclose(run(rules.uniform(), nothing)[-1], 0.25)
    np.testing.assert_allclose(run(rules.doremi_proxy(), nothing)[-1], 0.25)
    np.testing.assert_allclose(run(rules.doremi_proxy(first="natural"), nothing)[-1], np.asarray(SIZES) / 500)
    np.testing.assert_allclose(run(rules.fixed([1, 0, 3, 0]), nothing)[-1], [0.25, 0, 0.75, 0])
    np.testing.assert_allclose(run(rules.temperature(1), nothing)[-1], np.asarray(SIZES) / 500)
    np.testing.assert_allclose(run(rules.temperature(1e9), nothing)[-1], 0.25, rtol=1e-6)
    stages = run(rules.staged({0: [1, 1, 1, 1], 2: [0, 0, 0, 1]}), nothing)
    assert [s[3] for s in stages] == [0.25, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.ddk(1.5), "alpha"),
        (lambda: rules.ddk(score="ratio"), "score"),
        (lambda: rules.ddk(clip=-1.0), "clip"),
        (lambda: rules.ddk(first="none"), "first"),
        (lambda: rules.temperature(0.5), "temperature"),
        (lambda: rules.staged({1: [1.0]}), "stages"),
        (lambda: rules.sheared_llama(1.0), "floor"),
        (lambda: rules.doremi_proxy(floor=-0.1), "floor"),
        (lambda: rules.doremi_proxy(eta=-1.0), "eta"),
        (lambda: rules.doremi_proxy(first="none"), "first"),
        (lambda: rules.doge(mu=0.0), "mu"),
        (lambda: rules.doge(targets=("x",))(NAMES), "targets.*'x'"),
        (lambda: rules.doge(targets=NAMES)(NAMES), "targets"),
        (lambda: run(rules.doge()(NAMES), [None, Gradients(np.full((4, 4), np.nan), 0.1)]), "gradient of domain 0"),
        (lambda: run(rules.ddk(), [gaps([0.1, np.nan, 0.1, 0.1])]), "domain 1"),
        (lambda: run(rules.sheared_llama(), [gaps([0.1] * 4), gaps([np.inf, 0, 0, 0])]), "domain 0"),
    ],
)
def test_bad_options_and_measurements(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_large_lasting_gap_draws_more_and_an_equal_share_does_not():
    def worst(rule):
        excess, sampling, state = np.array([1.6, 0.2, 0.2, 0.2]), *rule.init([1] * 4, gaps([1.6, 0.2, 0.2, 0.2]))
        for interval in range(1, 12):
            excess = excess * np.exp(-0.6 * sampling)
            sampling, state = rule.update(state, gaps(excess), interval)
        return excess.max()

    assert worst(rules.ddk()) < 0.8 * worst(rules.uniform())
