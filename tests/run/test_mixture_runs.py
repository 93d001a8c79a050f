"""Runs whose mixture, or whose weights in the loss, follow what the student lacks."""

import json

import numpy as np
import pytest
from harness import Background, assert_same_run, final_state, here, lines, succeeds

from jaxkd.data import rules

DDK = "--config.data.mixture=ddk(alpha=0.5)"


@pytest.fixture(scope="module")
def weighed(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("weighed") / "run"
    succeeds("train", "--workdir", str(workdir), *arguments, DDK)
    return workdir


def shares(workdir) -> np.ndarray:
    return np.asarray([[row["share/alpha"], row["share/beta"]] for row in lines(workdir / "metrics.jsonl")])


def test_the_first_interval_is_the_pool_and_the_next_follow_the_rule(weighed, undisturbed):
    drawn = shares(weighed)
    assert (drawn[:5] == drawn[0]).all()
    assert (drawn[5:10] == drawn[5]).all()
    assert not (drawn[5] == drawn[0]).any()
    np.testing.assert_allclose(drawn.sum(1), 1.0)
    rows = {row["domain"]: row for row in lines(weighed / "evals.jsonl") if row["step"] == 0}
    column = lambda key: np.asarray([rows[name][key] for name in ("alpha", "beta")])
    start = rules.Gaps(*map(column, rules.Gaps._fields))
    rho = np.exp(start.student_nats - start.teacher_nats)
    assert abs(np.log(drawn[5][0] / drawn[5][1])) < 3 * abs(rho[0] - rho[1]) + 0.5  # a share, not a jump to one domain
    # What is trained on in the first interval is what a run with natural shares sees.
    assert [r["loss"] for r in lines(weighed / "metrics.jsonl")[:5]] == [
        r["loss"] for r in lines(undisturbed / "metrics.jsonl")[:5]
    ]
    # Intervals and their cost are written down.
    rows = lines(weighed / "mixture.jsonl")
    assert [(row["step"], row["interval"]) for row in rows] == [(0, 0), (5, 1), (10, 2)]
    for row, pair in zip(rows, drawn[::5], strict=True):
        assert [row["share/alpha"], row["share/beta"]] == pair.tolist()
    metrics = lines(weighed / "metrics.jsonl")
    assert [row["step"] for row in metrics if "rule_s" in row] == [6, 11]
    assert [row["tokens"] for row in rows] == [0, metrics[4]["tokens"], metrics[9]["tokens"]]
    for row in rows[1:]:
        assert 0 < row["rule_share"] < 1
        assert row["ratio/alpha"] > 0
    (events,) = (weighed / "tensorboard").iterdir()
    assert b"mixture/share/alpha" in events.read_bytes()
    page = (weighed / "report.html").read_text()
    assert "Shares that rows are drawn with" in page
    assert "rule measured 2 times" in page


@pytest.mark.slow
def test_killed_in_an_interval_equals_undisturbed(weighed, arguments, tmp_path):
    workdir = tmp_path / "killed"
    Background(workdir, [*arguments, DDK]).kill_at(7)
    succeeds("train", "--workdir", str(workdir), *arguments, DDK)
    assert_same_run(workdir, weighed)


PROXY = "--config.data.mixture=doremi_proxy(eta=5.0)"


@pytest.fixture(scope="module")
def proxy(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("proxies") / "whole"
    output = succeeds("train", "--workdir", str(workdir), *arguments, PROXY)
    assert "weights of the domains, averaged: alpha=" in output
    return workdir


@pytest.mark.slow
def test_a_killed_proxy_equals_an_undisturbed_one_and_stores_the_average_of_its_weights(proxy, arguments, tmp_path):
    Background(tmp_path / "killed", [*arguments, PROXY]).kill_at(7)
    succeeds("train", "--workdir", str(tmp_path / "killed"), *arguments, PROXY)
    assert_same_run(tmp_path / "killed", proxy)
    assert (tmp_path / "killed" / "domain_weights.json").read_text() == (proxy / "domain_weights.json").read_text()
    state, _ = final_state(proxy)
    average = np.frombuffer(state["['group_dro']['average']"], np.float32)
    stored = json.loads((proxy / "domain_weights.json").read_text())
    np.testing.assert_allclose(list(stored["weights"].values()), average / average.sum(), rtol=1e-6)
    # Metrics hold the weights that a step was made with; the last update is in the state alone.
    used = [[row["weight/alpha"], row["weight/beta"]] for row in lines(proxy / "metrics.jsonl")]
    last = np.exp(np.frombuffer(state["['group_dro']['log_weights']"], np.float32))
    np.testing.assert_allclose(np.mean([*used[1:], last], 0), average, rtol=1e-5)
    assert used[0] == [0.5, 0.5]
    assert len({tuple(pair) for pair in used}) == 12  # at every step


@pytest.mark.slow
def test_the_second_run_draws_by_them_and_says_early_what_is_missing(proxy, arguments, tmp_path):
    alone = [*arguments, "--config.run.eval_every=0"]
    second = [*alone, f"--config.data.mixture=doremi('{proxy}')"]
    succeeds("train", "--workdir", str(tmp_path / "second"), *second)
    stored = json.loads((proxy / "domain_weights.json").read_text())["weights"]
    for row in lines(tmp_path / "second" / "mixture.jsonl"):
        assert {name: row[f"share/{name}"] for name in stored} == pytest.approx(stored)
        assert all(abs(row[f"rows/{name}"] - 40 * weight) <= 1 for name, weight in stored.items())
    wrong = here("train", "--workdir", str(tmp_path / "third"), *alone, "--config.data.mixture=doremi('nowhere')")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].startswith("jaxkd: error: data.mixture: there is no run at nowhere")
