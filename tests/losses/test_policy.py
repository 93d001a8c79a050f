"""Losses on the student's own text, over every sequence of a small vocabulary: expected gradients are exact sums."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of
from jax.lax import stop_gradient

from jaxkd.core.types import Divergence, Head, Output
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences as d
from jaxkd.losses import objective as objectives

VOCAB, STEPS, STOP = 4, 3, 3
TEXT = np.array(list(itertools.product(range(VOCAB), repeat=STEPS)))  # every row; what follows a stop is junk
ALIVE = np.cumsum(np.pad(TEXT == STOP, ((0, 0), (1, 0)))[:, :STEPS], 1) == 0  # until the stop, which counts
# The distinct prefixes of 0, 1, 2 tokens, and which of them each token of each row follows.
PREFIX = np.stack([(VOCAB**t - 1) // (VOCAB - 1) + TEXT[:, :t] @ VOCAB ** np.arange(t) for t in range(STEPS)], 1)


def table(seed, spread=1.0):
    """Logits [prefixes V]."""
    return jnp.asarray(spread * np.random.default_rng(seed).normal(size=(PREFIX.max() + 1, VOCAB)), jnp.float32)


STUDENT, TEACHER = table(0), table(1)


def log_probs(logits):
    """log q [rows, steps, V]."""
    return jax.nn.log_softmax(logits)[PREFIX]


def of_target(values):
    return jnp.take_along_axis(values, TEXT[..., None], -1)[..., 0]


def law(logits):
    """Probability of each row; the junk after a stop is uniform."""
    return jnp.exp(jnp.where(ALIVE, of_target(log_probs(logits)), -jnp.log(VOCAB)).sum(1))


def over_text(by_prefix, author=STUDENT):
    """The expected sum of a function of the prefix [prefixes] over the author's text, which carries no gradient."""
    return jnp.sum(stop_gradient(law(author))[:, None] * ALIVE * by_prefix[PREFIX])


def kl(a, b):
    """KL(a || b) of every prefix, from logits."""
    a, b = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return jnp.sum(jnp.exp(a) * (a - b), -1)


def output(logits):
    return Output(Head(jax.nn.one_hot(PREFIX, len(logits)), logits), {})


@functools.lru_cache
def program(term):
    """The value's gradient in the student's logits, of a batch."""
    objective = objectives.objective({"opd": (1.0, term)}, vocab=VOCAB, domains=("all",))

    def value(logits, batch):
        return objective.loss({}, output(logits), output(TEACHER), batch, jnp.zeros((), jnp.int32))

    return jax.jit(jax.grad(value, has_aux=True))


def batch_by(author=STUDENT, **aux):
    """Every row, with its probability under its author as weight."""
    weights = law(author)[:, None] * ALIVE
    return batch_of(np.zeros_like(TEXT), targets=TEXT, weights=weights.astype(jnp.float32))._replace(aux=aux)


def expected(term, author=STUDENT, **aux):
    return program(term)(STUDENT, batch_by(author, **aux))[0]


def exact(objective):
    return jax.grad(objective)(STUDENT)


def assert_same(got, want):
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 3e-6, error


REVERSE_KL = exact(lambda logits: over_text(kl(logits, TEACHER)))


def test_every_row_is_counted_once():
    assert law(STUDENT).sum() == pytest.approx(1.0, abs=1e-6)
    assert len(np.unique(PREFIX)) == 21


@pytest.mark.parametrize(
    "divergence",
    [
        d.reverse_kl(),
        d.sampled_reverse_kl(),
        d.sampled_reverse_kl(baseline=True),
        d.generalized_reverse_kl(1, sampled_tail=True),
        d.generalized_reverse_kl(3, sampled_tail=True),
    ],
)
def test_expected_gradient_and_value_are_those_of_reverse_kl(divergence):
    gradient, metrics = program(objectives.match(divergence))(STUDENT, batch_by())
    assert_same(gradient, REVERSE_KL)
    assert metrics["loss"][0] == pytest.approx(float(over_text(kl(STUDENT, TEACHER))), rel=1e-5)


def test_backpropagating_the_sampled_log_ratio_has_no_expected_gradient():
    ratio = Divergence(lambda lp, lq, side: (jnp.where(side.is_target, lq - lp, 0.0),))
    assert np.abs(expected(objectives.match(ratio))).max() < 1e-6


def test_differentiated_k3_is_forward_kl_and_a_kl_from_oneself_is_nothing():
    """k3 = p/q - 1 - log(p/q): an unbiased value of KL(q || p), whose gradient is that of KL(p || q)."""
    k3 = Divergence(lambda lp, lq, side: (jnp.where(side.is_target, jnp.exp(lp - lq) - 1 - (lp - lq), 0.0),))
    assert_same(expected(objectives.match(k3)), exact(lambda logits: over_text(kl(TEACHER, logits))))
    itself = Divergence(lambda lp, lq, side: (jnp.exp(lq) * (lq - stop_gradient(lq)),), uses_teacher=False)
    assert np.abs(expected(objectives.match(itself))).max() < 1e-6


def test_a_truncated_sum_beside_the_sampled_tail_is_biased_by_the_gradient_of_its_mass():
    whole = d.generalized_reverse_kl(2, sampled_tail=True)
    mass = lambda lq, side: jnp.where(side.in_top_set, jnp.exp(lq) - stop_gradient(jnp.exp(lq)), 0.0)
    naive = whole._replace(phi=lambda lp, lq, side: (whole.phi(lp, lq, side)[0] + mass(lq, side),))
    leading = jax.nn.one_hot(jnp.argsort(TEACHER)[:, -2:], VOCAB).sum(1)
    bias = exact(lambda logits: over_text(jnp.sum(leading * jax.nn.softmax(logits), -1)))
    assert_same(expected(objectives.match(naive)) - REVERSE_KL, bias)


def test_the_detached_skew_is_a_policy_gradient():
    """With the reward log(a p/q + 1 - a) of TOP-D, whose a is one minus ours."""
    a = 0.7

    def surrogate(logits):
        lq, lp = of_target(log_probs(logits)), of_target(log_probs(TEACHER))
        reward = jnp.log(a * jnp.exp(lp - stop_gradient(lq)) + 1 - a)
        return -jnp.sum(stop_gradient(law(logits))[:, None] * ALIVE * reward * lq)

    assert_same(expected(objectives.match(d.skew_reverse_kl(1 - a, detach=True))), exact(surrogate))
    attached = expected(objectives.match(d.skew_reverse_kl(1 - a)))
    assert np.linalg.norm(attached - exact(surrogate)) > 0.1 * np.linalg.norm(attached)


def test_baseline_lowers_the_variance_and_the_exact_sum_has_none():
    """Of one token's gradient, over every token that it can be; with a handful of tokens the baseline may not help."""
    q, p = 2.0 * np.random.default_rng(0).normal(size=(2, 64))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(term):
        student, teacher = (Head(jnp.eye(64), jnp.asarray(np.tile(x, (64, 1)), jnp.float32)) for x in (q, p))
        value = lambda unembed: linear_divergence(
            (term,), student._replace(unembed=unembed), teacher, jnp.arange(64), jnp.ones((1, 64)), (1.0,), vocab=64
        )[0]
        return jax.grad(value)(student.unembed)

    def variance(term):
        chance, slopes = jax.nn.softmax(q)[:, None], gradients(term)
        return float(jnp.sum(chance * jnp.square(slopes - jnp.sum(chance * slopes, 0))))

    plain, with_baseline = (variance(d.sampled_reverse_kl(baseline)) for baseline in (False, True))
    assert plain > 1.5 * with_baseline
    assert variance(d.reverse_kl()) < 1e-6 * plain
