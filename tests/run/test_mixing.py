"""What a rule measures on a mesh, and the state that moves with it."""

import json
from typing import NamedTuple

import jax
import numpy as np
import pytest
from harness import recipe, tiny_arguments, write_domain

from jaxkd.core.sharding import batch_sharding
from jaxkd.data import loader, mixture
from jaxkd.evals import compare
from jaxkd.run import job, load
from jaxkd.run.mixing import Mixing, make_gradients, make_losses


class Case(NamedTuple):
    job: job.Job
    rows: load.Domains
    student: dict


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """`make(rule, data, eval_batch)`: the tiny recipe on a mesh, with five and eleven held-out rows."""
    root = tmp_path_factory.mktemp("mixing")
    texts = {name: write_domain(root / f"{name}.jsonl", seed, 90) for seed, name in enumerate(("wide", "thin"))}
    cases: dict[tuple, Case] = {}

    def case(rule: str, data: int = 1, eval_batch: int = 8) -> Case:
        if (rule, data, eval_batch) not in cases:
            more = (
                f"data.mixture={rule}",
                f"run.mesh.data={data}",
                f"run.eval_batch={eval_batch}",
                "data.valid_rows=11",
            )
            arguments = tiny_arguments(texts, root / "rows", *(f"--config.{each}" for each in more))
            built = job.build(recipe(*arguments))
            with jax.set_mesh(built.mesh):
                rows = load.domains(built.experiment.data, built.models.tokenizer, progress=False)
                cases[rule, data, eval_batch] = Case(
                    built, rows, load.weights(built.models, built.experiment.student, rows, False).student
                )
        return cases[rule, data, eval_batch]

    return case


def evaluation(case: Case, teacher=(2.0, 3.0)):
    """What the evaluation before the first step would have said; the teacher's figures are made up."""
    bits = {"student_bits_per_byte": 8.2, "teacher_bits_per_byte": 3.0}
    return [{"domain": n, "student_nats": 5.5, "teacher_nats": t} | bits for n, t in zip(case.rows.names, teacher)]


def measure(case: Case, make):
    j = case.job
    return make(j.models.student, j.models.vocab, case.rows, j.experiment.run, j.mesh)


def mixing_of(case: Case, make=make_losses) -> Mixing:
    return Mixing(case.job.rule, case.rows, case.job.experiment.data, case.job.lr, measure(case, make))


def begun(case: Case) -> Mixing:
    mixing = mixing_of(case)
    mixing.first()
    mixing.begin(evaluation(case))
    return mixing


def test_eight_devices_and_ragged_rows_score_as_one_device_row_by_row(make):
    """Eleven rows in batches of eight over eight devices: what fills the last batch weighs nothing."""
    single, spread = make("ddk()", 1, 1), make("ddk()", 8, 8)
    assert len(single.rows.valid[0]) % 8
    results = []
    for case in (single, spread):
        mixing = begun(case)
        with jax.set_mesh(case.job.mesh):
            mixing.advance(case.student)
        assert mixing.gaps is not None
        results.append((mixing.gaps.student_nats, mixing.mixture.sampling))
    batch = next(iter(load.held_out(spread.rows, 8, batch_sharding(spread.job.mesh))["wide"]))[0]
    assert batch.tokens.sharding.num_devices == 8
    assert not batch.tokens.sharding.is_fully_replicated
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=2e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
    assert (results[0][0] > 5.0).all()  # an untrained student: a filling row that counted would hide nothing else


def test_the_teacher_is_scored_once_and_shares_compile_nothing(make):
    """Measuring needs no teacher: its losses are the first evaluation's, to the bit, also behind a checkpoint."""
    case = make("ddk()")
    mixing = begun(case)
    shares = [mixing.mixture.sampling]
    for _ in range(3):
        again = mixing_of(case)
        again.restore(json.loads(json.dumps(mixing.saved())))
        with jax.set_mesh(case.job.mesh):
            mixing.advance(case.student)
            again.advance(case.student)
        assert mixing.gaps is not None
        assert mixing.gaps.teacher_nats.tolist() == [2.0, 3.0]
        assert json.dumps(again.saved()) == json.dumps(mixing.saved())
        shares.append(mixing.mixture.sampling)
    assert not np.array_equal(shares[1], shares[2])
    rho = np.exp(mixing.gaps.student_nats - [2.0, 3.0])
    first = np.exp(5.5 - np.array([2.0, 3.0]))
    r = np.exp(first - first.max()) / np.exp(first - first.max()).sum()
    psi = r * np.exp(rho - rho.max())
    np.testing.assert_allclose(shares[1], 0.5 * psi / psi.sum() + 0.25, rtol=1e-9)
    mixing, data = begun(case), case.job.experiment.data
    # What an interval is drawn from.
    first = mixing.line(0)
    with jax.set_mesh(case.job.mesh):
        seconds = mixing.advance(case.student)
    line = mixing.line(2400, None, seconds, 0.5)
    assert (line["step"], line["interval"], line["tokens"]) == (data.interval, 1, 2400)
    sizes = {name: len(rows) for name, rows in zip(case.rows.names, case.rows.train)}
    assert sum(line[f"rows/{n}"] for n in sizes) == data.interval * data.batch
    for name, size in sizes.items():
        assert line[f"drawn/{name}"] == first[f"rows/{name}"]
        assert line[f"epochs/{name}"] == first[f"rows/{name}"] / size
        assert abs(line[f"rows/{name}"] - line[f"share/{name}"] * data.interval * data.batch) <= 1
        assert line[f"ratio/{name}"] > 1
    assert line["rule_share"] == pytest.approx(seconds / (seconds + 0.5 * data.interval))
    assert "rule_s" not in first


@pytest.mark.slow
def test_gradients_are_those_of_the_rows_that_are_named(make):
    case = make("doge(mu=0.001)", 8)
    mixing = mixing_of(case, make_gradients)
    mixing.first()
    np.testing.assert_allclose(mixing.mixture.sampling, 0.5)
    with jax.set_mesh(case.job.mesh):
        products = measure(case, make_gradients)(case.student, 3)
        mixing.advance(case.student)
    assert mixing.mixture.rule_state["rule"]["updates"] == 1
    assert mixing.mixture.sampling.sum() == pytest.approx(1.0)

    student = jax.tree.map(np.asarray, case.student)
    scoring = compare.make_scoring(case.job.models.student.forward, case.job.models.vocab)
    slope, gradients = jax.jit(jax.grad(lambda p, b: scoring(p, b)[0] / b.weights.sum())), []
    for d, rows in enumerate(case.rows.train):
        row = mixture.probe(d, len(rows), case.job.experiment.run.seed, 3, 8)
        assert len(set(row.tolist())) == 8
        batch = loader.to_devices(loader.read_rows(case.rows.train, np.full(8, d), row), 8, np.arange(8), None)
        gradients.append(np.concatenate([np.asarray(g).ravel() for g in jax.tree.leaves(slope(student, batch))]))
    expected = [[float(np.dot(a, b)) for b in gradients] for a in gradients]
    np.testing.assert_allclose(products, expected, rtol=1e-4)


def test_a_proxy_is_refused_a_teacher_that_says_too_little(tmp_path):
    arguments = tiny_arguments(
        {"wide": write_domain(tmp_path / "wide.jsonl", 0)},
        tmp_path / "rows",
        "--config.data.mixture=doremi_proxy()",
        "--config.teacher.signal=top_k",
    )
    with pytest.raises(ValueError, match=r"data\.mixture 'doremi_proxy\(\)' .*'top_k'.*teacher\.signal"):
        job.build(recipe(*arguments))
