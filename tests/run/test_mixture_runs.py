"""Runs whose mixture, or whose weights in the loss, follow what the student lacks."""

import json

import numpy as np
import pytest
from harness import Background, assert_same_run, final_state, here, lines

from jaxkd.data import rules

DDK = "--config.data.mixture=ddk(alpha=0.5)"


@pytest.fixture(scope="module")
def weighed(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("weighed") / "run"
    done = here("train", "--workdir", str(workdir), *arguments, DDK)
    assert done.returncode == 0, done.stderr
    return workdir


def shares(workdir) -> np.ndarray:
    return np.asarray([[row["share/alpha"], row["share/beta"]] for row in lines(workdir / "metrics.jsonl")])


def test_the_first_interval_is_the_pool_and_the_next_follow_the_rule(weighed, undisturbed):
    """Intervals of five steps: natural shares, then those that the held-out losses at the boundary ask for."""
    found = shares(weighed)
    assert (found[:5] == found[0]).all()
    assert (found[5:10] == found[5]).all()
    assert not (found[5] == found[0]).any()
    np.testing.assert_allclose(found.sum(1), 1.0)
    rows = {row["domain"]: row for row in lines(weighed / "evals.jsonl") if row["step"] == 0}
    column = lambda key: np.asarray([rows[name][key] for name in ("alpha", "beta")])
    start = rules.Gaps(*map(column, rules.Gaps._fields))
    rho = np.exp(start.student_nats - start.teacher_nats)
    assert abs(np.log(found[5][0] / found[5][1])) < 3 * abs(rho[0] - rho[1]) + 0.5  # a share, not a jump to one domain
    # What is trained on in the first interval is what a run with natural shares sees.
    assert [r["loss"] for r in lines(weighed / "metrics.jsonl")[:5]] == [
        r["loss"] for r in lines(undisturbed / "metrics.jsonl")[:5]
    ]


@pytest.mark.slow
def test_killed_in_an_interval_equals_undisturbed(weighed, arguments, tmp_path):
    workdir = tmp_path / "killed"
    run = Background(workdir, [*arguments, DDK])
    run.wait_for_step(7)
    run.process.kill()
    run.finish()
    done = here("train", "--workdir", str(workdir), *arguments, DDK)
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, weighed)


def test_intervals_and_their_cost_are_written_down(weighed):
    rows = lines(weighed / "mixture.jsonl")
    assert [(row["step"], row["interval"]) for row in rows] == [(0, 0), (5, 1), (10, 2)]
    for row, found in zip(rows, shares(weighed)[::5], strict=True):
        assert [row["share/alpha"], row["share/beta"]] == found.tolist()
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


PROXY = "--config.data.mixture=doremi_proxy(eta=5.0)"


@pytest.fixture(scope="module")
def proxy(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("proxies") / "whole"
    done = here("train", "--workdir", str(workdir), *arguments, PROXY)
    assert done.returncode == 0, done.stderr
    assert "weights of the domains, averaged: alpha=" in done.stdout
    return workdir


@pytest.mark.slow
def test_a_proxy_that_was_killed_equals_an_undisturbed_one(proxy, arguments, tmp_path):
    run = Background(tmp_path / "killed", [*arguments, PROXY])
    run.wait_for_step(7)
    run.process.kill()
    run.finish()
    done = here("train", "--workdir", str(tmp_path / "killed"), *arguments, PROXY)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "killed", proxy)
    assert (tmp_path / "killed" / "domain_weights.json").read_text() == (proxy / "domain_weights.json").read_text()


@pytest.mark.slow
def test_a_proxy_stores_the_average_of_the_weights_of_all_its_steps(proxy):
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
    done = here("train", "--workdir", str(tmp_path / "second"), *second)
    assert done.returncode == 0, done.stderr
    stored = json.loads((proxy / "domain_weights.json").read_text())["weights"]
    for row in lines(tmp_path / "second" / "mixture.jsonl"):
        assert {name: row[f"share/{name}"] for name in stored} == pytest.approx(stored)
        assert all(abs(row[f"rows/{name}"] - 40 * weight) <= 1 for name, weight in stored.items())
    wrong = here("train", "--workdir", str(tmp_path / "third"), *alone, "--config.data.mixture=doremi('nowhere')")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].startswith("jaxkd: error: data.mixture: there is no run at nowhere")
