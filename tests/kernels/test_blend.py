"""Ensembles in the kernel, against a numpy mixture and the float64 dense form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import FAMILY, cast, close, dense, fused, log_softmax, problem

from jaxkd.core import sharding
from jaxkd.core.types import Ensemble, Head
from jaxkd.kernels.api import linear_divergence, refusal
from jaxkd.losses import divergences

VOCAB = 57  # of 64 columns
TEACHES = [name for name, term in FAMILY.items() if term.uses_teacher]


def blend(geometric=False, seed=0, tokens=24):
    """Two teachers of different width, the second soft-capped; one token has the first only, one has no weight."""
    student, first, targets, weights = problem(seed, tokens)
    _, second, _, _ = problem(seed + 1, tokens, teacher_width=12)
    shares = np.random.default_rng(seed).dirichlet([1.0, 1.0], tokens)
    shares[5] = [1.0, 0.0]
    weights[:, 7], shares[7] = 0.0, 0.0
    return student, Ensemble((first, second._replace(softcap=3.0)), shares, geometric), targets, weights


def mixture(teacher: Ensemble, temperature: float) -> np.ndarray:
    """log p [N V] in numpy."""
    first, second = ((h.hidden @ h.unembed)[:, :VOCAB] for h in teacher.heads)
    lps = [log_softmax(z / temperature) for z in (first, 3.0 * np.tanh(second / 3.0))]
    a, b = teacher.weights[:, :1], teacher.weights[:, 1:]
    if teacher.geometric:
        return log_softmax(a * lps[0] + b * lps[1])
    with np.errstate(divide="ignore"):
        return np.log(a * np.exp(lps[0]) + b * np.exp(lps[1]))


@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_average_matches_numpy(geometric, temperature):
    student, teacher, targets, weights = blend(geometric)
    lp, lq = mixture(teacher, temperature), log_softmax((student.hidden @ student.unembed)[:, :VOCAB] / temperature)
    lp = np.maximum(lp, -700.0)  # the token without teachers
    expected = (np.exp(lp) * (lp - lq)).sum(-1)
    terms = (divergences.forward_kl(),)
    _, fields, _ = fused(terms, student, teacher, targets, weights, (temperature,), VOCAB, chunk=8)
    live = weights[0] != 0
    np.testing.assert_allclose(fields[0][live], expected[live], rtol=2e-5, atol=1e-6)
    if geometric:  # the softmax of the averaged logits
        z = [h.hidden @ h.unembed for h in teacher.heads]
        z[1] = 3.0 * np.tanh(z[1] / 3.0)
        mean = sum(teacher.weights[:, i : i + 1] * z[i] for i in (0, 1))[:, :VOCAB]
        np.testing.assert_allclose(lp[live], log_softmax(mean / temperature)[live], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("name", TEACHES)
def test_every_divergence_matches_dense_float64(name, geometric):
    student, teacher, targets, weights = blend(geometric)
    call = (FAMILY[name],), student, teacher, targets, weights, (1.0,), VOCAB
    close(fused(*call, chunk=10), dense(*call), weights != 0, 5e-6)


@pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (4, 2)])
@pytest.mark.parametrize("geometric", [False, True])
def test_sharded_equals_unsharded(mesh, geometric):
    student, teacher, targets, weights = blend(geometric)
    terms = (divergences.forward_kl(), divergences.generalized_jsd(0.3))
    weights = np.concatenate([weights, weights])
    call = terms, student, teacher, targets, weights, (2.0, 1.0), VOCAB
    close(fused(*call, mesh=sharding.make_mesh(*mesh)), dense(*call), weights != 0, 5e-6)


@pytest.mark.parametrize("geometric", [False, True])
def test_copies_of_the_student_are_ties_of_total_variation(geometric):
    """Their average equals the student up to rounding, whose sign must not enter the gradient."""
    student, teacher, targets, weights = blend(geometric)
    copies = dataclasses.replace(teacher, heads=(student, student))
    gradient = fused((divergences.total_variation(),), student, copies, targets, weights, (2.0,), VOCAB, chunk=8)[2]
    assert max(np.abs(g).max() for g in gradient) < 1e-6


@pytest.mark.parametrize("geometric", [False, True])
def test_head_without_weight_may_be_nan(geometric):
    """At one token or in a whole chunk: results are those of the other head alone."""
    student, teacher, targets, weights = blend(geometric)
    shares = np.tile([1.0, 0.0], (24, 1))
    nan = teacher.heads[1]._replace(hidden=teacher.heads[1].hidden * np.nan)
    call = lambda t: fused((divergences.reverse_kl(),), student, t, targets, weights, (1.0,), VOCAB, chunk=8)
    alone = call(teacher.heads[0])
    for some in (shares, np.where(np.arange(24)[:, None] == 7, np.nan, shares)):  # 7 has no weight in the loss
        close(call(Ensemble((teacher.heads[0], nan), some, geometric)), alone, weights != 0, 1e-6)


def test_head_without_weight_in_a_chunk_is_not_multiplied():
    """The product is inside a conditional of the compiled program."""
    student, teacher, targets, weights = blend()
    run = lambda *a: linear_divergence((divergences.forward_kl(),), *a, (1.0,), vocab=VOCAB, chunk=8)[0]
    text = jax.jit(run).lower(*cast((student, teacher, targets, weights), jnp.float32)).compile().as_text()
    assert text.count("conditional(") >= 2


def test_invalid_ensembles_raise():
    student, teacher, targets, weights = blend()
    call = lambda t: fused((divergences.forward_kl(),), student, t, targets, weights, (1.0,), VOCAB)
    with pytest.raises(ValueError, match="2 heads has weights for 3"):
        call(dataclasses.replace(teacher, weights=np.ones((24, 3))))
    narrow = Head(teacher.heads[0].hidden, teacher.heads[0].unembed[:, :60])
    with pytest.raises(ValueError, match="64 and 60 columns"):
        call(dataclasses.replace(teacher, heads=(narrow, teacher.heads[1])))
    with pytest.raises(ValueError, match="targets"):
        call(dataclasses.replace(teacher, weights=np.ones((23, 2))))
    assert "top-k" in refusal(divergences.partial_kl(), Ensemble)
