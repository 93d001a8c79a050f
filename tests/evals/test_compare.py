"""Evaluation against the dense form: nats, bits per byte, KL, agreement, the gap."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of, random_params

from jaxkd.core import sharding
from jaxkd.core.types import Batch
from jaxkd.evals import compare
from jaxkd.models import transformer
from jaxkd.models.transformer import Config

STUDENT = Config(vocab=250, embed=32, layers=1, heads=4, kv_heads=2, head_dim=8, mlp=32)
TEACHER = Config(vocab=250, embed=48, layers=2, heads=6, kv_heads=2, head_dim=8, mlp=32)


@functools.lru_cache
def sides():
    forward = [functools.partial(transformer.forward, c) for c in (STUDENT, TEACHER)]
    return forward, [random_params(STUDENT, 0, 0.3), random_params(TEACHER, 1, 0.3)]


def make_batch(seed: int, rows=8, length=12) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 250, (rows, length))
    weights = (rng.random((rows, length)) < 0.7).astype(np.float32)
    weights[:, -1] = 0
    return batch_of(tokens, weights=weights)


def dense(batch: Batch) -> dict[str, float]:
    (student, teacher), params = sides()
    heads = [f(p, batch).head for f, p in ((student, params[0]), (teacher, params[1]))]
    lq, lp = (jax.nn.log_softmax(np.asarray(h.hidden @ h.unembed, np.float64)[..., :250]) for h in heads)
    live = np.asarray(batch.weights)
    pick = lambda logs: -np.take_along_axis(np.asarray(logs), np.asarray(batch.targets)[..., None], -1)[..., 0]
    kl = np.asarray(jnp.sum(jnp.exp(lp) * (lp - lq), -1))
    same = np.asarray(lq.argmax(-1) == lp.argmax(-1))
    rows = {"student_nats": pick(lq), "teacher_nats": pick(lp), "kl": kl, "agreement": same}
    sums_by_name = {name: float((values * live).sum()) for name, values in rows.items()} | {"tokens": float(live.sum())}
    for side, logs in (("student", lq), ("teacher", lp)):
        top, right = np.exp(logs.max(-1)), np.asarray(logs.argmax(-1) == np.asarray(batch.targets))
        bins = np.minimum((np.asarray(top) * compare.BINS).astype(int), compare.BINS - 1)
        sums_by_name[f"{side}_calibration"] = np.asarray(
            [((right - np.asarray(top)) * live)[bins == b].sum() for b in range(compare.BINS)]
        )
    return sums_by_name


@pytest.mark.parametrize("mesh", [pytest.param(None, marks=pytest.mark.slow), {"data": 2, "context": 2, "model": 2}])
def test_equals_the_dense_form(mesh):
    (student, teacher), params = sides()
    comparison = jax.jit(compare.make_comparison(student, teacher, 250))
    batches = [make_batch(0), make_batch(1)]
    sums = [dense(batch) for batch in batches]
    expected = {name: sum(each[name] for each in sums) for name in compare.Sums._fields}

    def run():
        one = lambda batch: comparison(*params, batch)
        return compare.evaluate(
            one, {"d": [(b, np.full(8, 20)) for b in batches]}, step=3, start={"d": 9.0, "mean": 9.0}
        )

    if mesh is None:
        row, mean = run()
    else:
        with jax.set_mesh(sharding.make_mesh(**mesh)):
            row, mean = run()
    tokens = expected["tokens"]
    for name in ("student_nats", "teacher_nats", "kl", "agreement"):
        assert row[name] == pytest.approx(expected[name] / tokens, rel=1e-5)
    for side in ("student", "teacher"):
        assert row[f"{side}_ece"] == pytest.approx(np.abs(expected[f"{side}_calibration"]).sum() / tokens, rel=1e-4)
    assert row["tokens"] == tokens
    assert row["student_bits_per_byte"] == pytest.approx(expected["student_nats"] / math.log(2) / 320, rel=1e-5)
    assert row["gap_closed"] == pytest.approx((9 - row["student_nats"]) / (9 - row["teacher_nats"]))
    assert mean["domain"] == "mean"
    assert mean["kl"] == row["kl"]


def sums(student: float, teacher: float, kl: float, agreement: float, tokens: float) -> compare.Sums:
    return compare.Sums(student, teacher, kl, agreement, np.zeros(compare.BINS), np.zeros(compare.BINS), tokens)


def test_a_student_that_is_as_right_as_it_is_sure_has_no_calibration_error():
    """Half right at a confidence of a half, and always right when sure; over-confidence shows as its distance."""
    top = jnp.asarray([0.5, 0.5, 1.0, 0.9, 0.9])
    right = jnp.asarray([1.0, 0.0, 1.0, 0.0, 0.0])
    error = lambda weights: np.abs(compare._calibration(top, right, jnp.asarray(weights))).sum()
    assert error([1.0, 1.0, 1.0, 0.0, 0.0]) == pytest.approx(0.0, abs=1e-6)
    assert error([0.0, 0.0, 0.0, 1.0, 1.0]) == pytest.approx(1.8)
    assert np.isfinite(compare._calibration(top * jnp.nan, right, jnp.zeros(5))).all()


def test_means_gaps_and_nan():
    values = iter([(4.0, 2.0), (8.0, 2.0)])

    def comparison(batch):
        student, teacher = next(values)
        return sums(student * 10, teacher * 10, 5.0, 5.0, 10.0)

    domains = {"a": [(make_batch(0), np.array([7]))], "b": [(make_batch(0), np.array([7]))]}
    *_, mean = compare.evaluate(comparison, domains, 5, {"a": 6.0, "b": 10.0, "mean": 8.0})
    assert (mean["student_nats"], mean["teacher_nats"], mean["tokens"]) == (6.0, 2.0, 20)
    assert mean["gap_closed"] == pytest.approx(1 / 3)
    # No gap where the student was not behind.
    comparison = lambda batch: sums(10.0, 30.0, 1.0, 1.0, 10.0)
    row, _ = compare.evaluate(comparison, {"a": [(make_batch(0), np.array([7]))]}, 0)
    assert row["gap_closed"] is None
    row, _ = compare.evaluate(comparison, {"a": [(make_batch(0), np.array([7]))]}, 4, {"a": 2.0, "mean": 2.0})
    assert row["gap_closed"] is None
    assert " - " in compare.table([row], {"a": 2.0})
    # A teacher that gives NaN is named.
    comparison = lambda batch: sums(10.0, math.nan, 1.0, 1.0, 10.0)
    with pytest.raises(ValueError, match=r"teacher_nats.*'law'.*step 7"):
        compare.evaluate(comparison, {"law": [(make_batch(0), np.array([7]))]}, 7)
    with pytest.raises(ValueError, match="'law'"):
        compare.evaluate(lambda b: sums(0, 0, 0, 0, 0.0), {"law": [(make_batch(0), np.array([0]))]}, 7)
