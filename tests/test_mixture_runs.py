"""Runs whose mixture follows what the student lacks."""

import numpy as np
import pytest
from harness import Background, assert_same_run, jaxkd, lines

from jaxkd.data import rules

DDK = "--config.data.mixture=ddk(alpha=0.5)"


@pytest.fixture(scope="module")
def weighed(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("weighed") / "run"
    done = jaxkd("train", "--workdir", str(workdir), *arguments, DDK)
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


@pytest.mark.parametrize("step", [4, 7])
def test_killed_in_an_interval_equals_undisturbed(step, weighed, arguments, tmp_path):
    workdir = tmp_path / "killed"
    run = Background(workdir, [*arguments, DDK])
    run.wait_for_step(step)
    run.process.kill()
    run.finish()
    done = jaxkd("train", "--workdir", str(workdir), *arguments, DDK)
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, weighed)
