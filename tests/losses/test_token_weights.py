"""Factors of token weights: which tokens each counts, and how a term uses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of

from jaxkd.config import resolve
from jaxkd.config.schema import TeacherBlock, Term
from jaxkd.core.types import Head, Output
from jaxkd.losses import divergences as d
from jaxkd.losses import objective as objectives
from jaxkd.losses import token_weights as tw
from jaxkd.losses.feature_term import TokenWeights
from jaxkd.models.transformer import Config

VOCAB, WIDTH = 11, 5
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
LIVE = np.array([[0, 1, 1, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 1, 1, 1, 1]])  # a prompt, two turns, padding


def make_batch(**aux):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, VOCAB, LIVE.shape)
    weights = (LIVE * rng.uniform(0.5, 2, LIVE.shape)).astype(np.float32)
    return batch_of(targets, targets=targets, weights=weights, segments=SEGMENTS)._replace(
        aux={name: jnp.asarray(value) for name, value in aux.items()}
    )


BATCH = make_batch(author=np.array([1, 2]))


def output(seed):
    rng = np.random.default_rng(seed)
    hidden = np.where(LIVE[..., None] == 1, rng.normal(size=(*LIVE.shape, WIDTH)), np.nan)
    return Output(Head(*(jnp.asarray(x, jnp.float32) for x in (hidden, rng.normal(size=(WIDTH, VOCAB))))), {})


STUDENT, TEACHER = output(1), output(2)


def log_probs(model):
    return np.asarray(jax.nn.log_softmax(model.head.hidden @ model.head.unembed))


LQ, LP = log_probs(STUDENT), log_probs(TEACHER)


def gradient(terms, batch=BATCH, **factors):
    """The value's gradient in the student's unembedding, and the metrics."""
    objective = objectives.objective(terms, vocab=VOCAB, domains=("all",))

    def value(unembed):
        student = STUDENT._replace(head=STUDENT.head._replace(unembed=unembed))
        return objective.loss({}, student, TEACHER, batch, jnp.zeros((), jnp.int32), factors)

    return jax.jit(jax.grad(value, has_aux=True))(STUDENT.head.unembed)


def leading(scores, share):
    chosen = np.zeros(LIVE.shape)
    for row, live in enumerate(LIVE):
        index = np.flatnonzero(live)
        count = max(round(share * len(index)), 1)
        chosen[row, index[np.argsort(-scores[row, index])[:count]]] = 1
    return chosen


def iw_by_hand(gamma):
    size = np.abs(np.take_along_axis(LP - LQ, np.asarray(BATCH.targets)[..., None], -1))[..., 0]
    result = np.zeros(LIVE.shape)
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        tokens = np.flatnonzero((SEGMENTS[row] == segment) & (LIVE[row] == 1))
        before = np.r_[0.0, np.cumsum(size[row, tokens])]
        result[row, tokens] = 1 + gamma * (1 - before[:-1] / before[-1])
    return result


def tip_by_hand(share):
    entropy = np.where(LIVE, -np.sum(np.exp(LQ) * LQ, -1), 0.0)
    kl = np.where(LIVE, np.sum(np.exp(LQ) * (LQ - LP), -1), 0.0)
    h, k = entropy / np.log(VOCAB), kl / kl.max(1, keepdims=True)
    return leading(h + k - h * k, share)


H = -np.sum(np.exp(LP) * LP, -1)
FIRST = [[0, 1, 1, 0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 1, 0, 0, 0]]
CASES = {
    "half of each document": (tw.prefix(share=0.5), FIRST),  # of 4, 2 and 6 tokens
    "no less than one": (tw.prefix(0.01), [[0, 1, 0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0]]),
    "three tenths of ten": (tw.prefix(share=0.3), [[0, 1, 0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0]]),
    "two tokens": (tw.prefix(tokens=2), [[0, 1, 1, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0]]),
    "unsure teacher": (tw.teacher_entropy(above=1.5), np.where(LIVE, H, 0) > 1.5),
    "tip": (tw.tip(0.5), tip_by_hand(0.5)),
    "all": (tw.tip(1.0), LIVE),
    "iw": (tw.iw_opd(0.7), iw_by_hand(0.7)),
    "special": (tw.exclude([3, 4, 7]), LIVE * ~np.isin(BATCH.targets, [3, 4, 7])),
    "student": (tw.author("student"), LIVE * [[1], [0]]),
    "teacher": (tw.author("teacher"), LIVE * [[0], [1]]),
    "data": (tw.author("data"), 0 * LIVE),
    "of one's own": (TokenWeights(lambda batch: 2 / (batch.weights != 0)), 2 * LIVE),
}


@functools.lru_cache
def alone(name):
    term = {"kd": objectives.match(d.forward_kl(), 2.0), "ce": objectives.next_token()}[name]
    return lambda **factors: gradient({name: (1.0, term)}, **factors)


@pytest.mark.parametrize("name", CASES)
def test_each_scales_its_term_like_a_factor(name):
    """NaN in padding changes nothing; metrics and the token weight stay those of all tokens."""
    weights, factor = CASES[name]
    term = objectives.match(d.forward_kl(), 2.0, token_weights=weights)
    got, metrics = gradient({"kd": (1.0, term)})
    want, expected = alone("kd")(kd=jnp.asarray(factor, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for metric in expected:
        np.testing.assert_allclose(metrics[metric], expected[metric], rtol=1e-5)
    assert 0 < CASES["unsure teacher"][1].sum() < LIVE.sum()


def test_terms_of_one_objective_take_different_texts_and_factors_multiply():
    first, second = np.array(FIRST, np.float32), np.random.default_rng(0).uniform(0, 2, LIVE.shape).astype(np.float32)
    kd = objectives.match(d.forward_kl(), 2.0, token_weights=tw.prefix(share=0.5))
    ce = objectives.match(d.next_token(), token_weights=tw.iw_opd())
    got, _ = gradient({"kd": (1.0, kd), "ce": (1.0, ce)}, kd=jnp.asarray(second))
    want = alone("kd")(kd=jnp.asarray(first * second))[0] + alone("ce")(ce=jnp.asarray(iw_by_hand(0.5), jnp.float32))[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_term_without_a_teacher_that_is_weighted_by_one_needs_it():
    needs = lambda weights: (
        objectives.objective(
            {"ce": (1.0, objectives.match(d.next_token(), token_weights=weights))}, vocab=VOCAB, domains=("all",)
        ).uses_teacher
    )
    assert needs(tw.teacher_entropy())
    assert not needs(tw.prefix(tokens=3))


def test_of_a_recipe():
    block = lambda text, **term: {"x": Term(1.0, token_weights=text, **term)}
    config = Config(vocab=VOCAB, embed=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8)
    models = {"student": config, "teacher": config}
    terms = lambda block, **teacher: resolve.terms(block, 10, models, TeacherBlock(path="teacher", **teacher))
    for loss in ({"divergence": "reverse_kl"}, {"feature": "policy_gradient(clip=0.2)"}):
        [(_, term)] = terms(block("prefix(share=0.3)", **loss)).values()
        assert term.token_weights is not None
    for text in ("prefx(share=0.3)", "prefix(share=0.3, tokens=2)", "prefix()", "tip(share=0.0)", "author('me')"):
        with pytest.raises(ValueError, match=r"objective\.x\.token_weights"):
            terms(block(text, divergence="reverse_kl"))
    with pytest.raises(ValueError, match=r"objective\.x\.token_weights.*draws"):
        terms(block("tip()", divergence="cross_entropy"), signal="sampled")
    with pytest.raises(ValueError, match=r"objective\.x\.feature.*teacher\.signal"):
        terms(block("tip()", feature="minillm"), signal="top_k")
    with pytest.raises(ValueError, match=r"batch\.aux\['author'\]"):
        gradient(
            {"kd": (1.0, objectives.match(d.forward_kl(), token_weights=tw.author("student")))}, BATCH._replace(aux={})
        )
