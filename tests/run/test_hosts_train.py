"""`jaxkd train` in several processes: the same run as in one, and none that waits for one that is gone."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from harness import assert_same_run, final_state, jaxkd, lines, logged, start, write_domain

from jaxkd.runtime import cluster
from jaxkd.teachers import codec
from jaxkd.teachers.store import Store

STEPS = 12
SILENCE = 12  # seconds after which a process that says nothing is given up


class Job:
    """A command in several processes that find each other."""

    def __init__(self, count: int, *arguments: str, last: tuple[str, ...] = (), silence: int = SILENCE):
        seconds = {"JAXKD_HEARTBEAT_SECONDS": str(silence)}
        self.started = start("-m", "jaxkd", *arguments, count=count, last=last, **seconds)

    def wait_for(self, path: Path, count: int) -> None:
        """Until a file has so many lines."""
        until = time.monotonic() + 300
        while not path.exists() or path.read_text().count("\n") < count:
            assert time.monotonic() < until
            assert all(process.poll() is None for process in self.started), self.end()
            time.sleep(0.005)

    def end(self, seconds: float = 300) -> list[tuple[int, str, str]]:
        """Code, output and errors of each."""
        try:
            outputs = [process.communicate(timeout=seconds) for process in self.started]
        finally:
            for process in self.started:
                process.kill()
        return [(process.returncode, *output) for process, output in zip(self.started, outputs, strict=True)]

    def ends(self, code: int, seconds: float = 300) -> list[tuple[str, str]]:
        """Output and errors of each; all must end with this code."""
        results = self.end(seconds)
        assert [result[0] for result in results] == [code] * len(results), results
        return [result[1:] for result in results]


def assert_close_run(workdir: Path, reference: Path) -> None:
    """The same rows, and the same numbers but for the order of sums."""
    for name in ("metrics.jsonl", "mixture.jsonl", "evals.jsonl"):
        results, expected = logged(workdir, name), logged(reference, name)
        assert len(results) == len(expected), name
        for a, b in zip(results, expected, strict=True):
            assert a.keys() == b.keys()
            for key, value in b.items():
                exact = isinstance(value, str | int) or value is None
                assert a[key] == value if exact else abs(a[key] - value) < 1e-5 * max(abs(value), 1), (name, a, b)
    (state, mixture), (expected_state, expected_mixture) = final_state(workdir), final_state(reference)
    assert state.keys() == expected_state.keys()
    assert mixture == expected_mixture  # the rows drawn so far, and all that draws the next ones


@pytest.fixture(scope="module")
def spread(arguments) -> list[str]:
    return [*arguments, "--config.run.mesh.data=-1"]  # a device of each process


@pytest.fixture(scope="module")
def single(spread, tmp_path_factory) -> Path:
    """The workdir of the run `undisturbed` by a process of one device: of several the rounding differs."""
    workdir = tmp_path_factory.mktemp("runs") / "single"
    result = jaxkd("train", "--workdir", str(workdir), *spread)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture(scope="module")
def pair(spread, tmp_path_factory) -> Path:
    """The workdir of the run `undisturbed`, trained by two processes."""
    workdir = tmp_path_factory.mktemp("runs") / "pair"
    (output, _), (silent, other_errors) = Job(2, "train", "--workdir", str(workdir), *spread).ends(0)
    assert "report.html" in output
    assert "student" not in silent  # the second has nothing to print
    assert "step" not in other_errors  # and no bar
    return workdir


@pytest.mark.slow
def test_two_processes_train_as_one_does(pair, single, spread, tmp_path):
    """And bit for bit as one with both devices: a sum of two does not depend on who adds them."""
    assert_close_run(pair, single)
    assert json.loads((pair / "run.json").read_text())["processes"] == 2
    assert len(list((pair / "tensorboard").iterdir())) == 1
    alone = jaxkd("train", "--workdir", str(tmp_path / "alone"), *spread, devices=2)
    assert alone.returncode == 0, alone.stderr
    assert_same_run(pair, tmp_path / "alone")


@pytest.mark.slow
def test_evaluation_in_two_processes_is_that_of_the_run_and_export_wants_one(pair, tmp_path):
    workdir = shutil.copytree(pair, tmp_path / "pair")
    before = lines(workdir / "evals.jsonl")
    (output, _), (silent, _) = Job(2, "evaluate", "--workdir", str(workdir)).ends(0)
    last = [row for row in before if row["step"] == STEPS]
    assert all(f"{row['student_nats']:.3f}" in output for row in last)
    assert "alpha" not in silent
    assert lines(workdir / "evals.jsonl") == before
    for _, errors in Job(2, "export", "--workdir", str(workdir), "--output", str(tmp_path / "student")).ends(1):
        assert "`jaxkd export`" in errors
    assert not (tmp_path / "student").exists()


@pytest.mark.slow
def test_rows_that_differ_between_hosts_are_found_by_the_other_and_end_both(spread, tmp_path):
    other = write_domain(tmp_path / "other.jsonl", 7)
    job = Job(2, "train", "--workdir", str(tmp_path / "w"), *spread, last=(f"--config.data.domains.beta={other}",))
    (_, errors), (_, other_errors) = job.ends(1, 120)
    assert "jaxkd: error: the rows of the domains differ between hosts: 'beta' is " in other_errors
    assert "jaxkd: process 1 failed: error: the rows of the domains differ between hosts: 'beta'" in errors


@pytest.mark.slow
def test_a_workdir_that_one_host_does_not_see(spread, tmp_path, monkeypatch):
    job = Job(2, "train", "--workdir", str(tmp_path / "w"), *spread, last=("--workdir", str(tmp_path / "own")))
    _, (_, other_errors) = job.ends(1, 150)
    assert f"process 0 made {tmp_path / 'own'}" in other_errors


@pytest.mark.slow
def test_a_failure_of_one_while_the_others_are_in_a_collective(pair, spread, tmp_path):
    """Process 0 alone writes, and cannot; the other is on its way into an evaluation that never comes."""
    workdir = shutil.copytree(pair, tmp_path / "pair")
    (workdir / "metrics.jsonl").unlink()
    (workdir / "metrics.jsonl").mkdir()
    more = ["--config.run.steps=15", "--accept-changes"]
    began = time.monotonic()
    (_, errors), (_, other_errors) = Job(2, "train", "--workdir", str(workdir), *spread, *more).ends(1, 120)
    assert errors.splitlines()[-1].startswith("jaxkd: error: Is a directory")
    assert other_errors.splitlines()[-1].startswith("jaxkd: process 0 failed: error: Is a directory")
    assert time.monotonic() - began < 110  # and not the five minutes of a barrier


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_rows_of_all_hosts(spread, tmp_path):
    wild = ["--config.optim.lr.peak=1e30", "--config.optim.clip=1e30"]
    results = Job(2, "train", "--workdir", str(tmp_path / "wild"), *spread, *wild).ends(1)
    sentences = [re.search(r"(loss|grad_norm|param_norm) is .*", errors)[0] for _, errors in results]
    assert sentences[0] == sentences[1]
    assert "metrics.jsonl): step 1: " in sentences[0]
    left = [row["rows"] for row in lines(tmp_path / "wild" / "metrics.jsonl") if "rows" in row]
    assert [sum(map(len, rows.values())) for rows in left] == [8] * len(left)  # of both hosts


@pytest.mark.slow
def test_a_run_that_loses_processes_goes_on_with_any_number(single, spread, tmp_path):
    """Four, of which one gets SIGTERM; two, of which one is killed; two, of which the coordinator is; then one."""
    workdir = tmp_path / "moving"
    often = "--config.run.checkpoint_every=1"  # steps of milliseconds would be over before a signal comes
    train = ["train", "--workdir", str(workdir), *spread, often]
    metrics, evals = workdir / "metrics.jsonl", workdir / "evals.jsonl"

    job = Job(4, *train)
    job.wait_for(evals, 1)  # while the step compiles: JAX looks for SIGTERM about once a second
    job.started[2].send_signal(signal.SIGTERM)
    results = job.ends(cluster.EXIT_STOPPED)
    assert "the same command resumes" in results[0][0]
    reached = len(lines(metrics))
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [reached]

    for victim in (1, 0):
        job = Job(2, *train)
        job.wait_for(metrics, min(reached + 1, STEPS))
        job.started[victim].kill()
        killed = time.monotonic()
        results = job.end()
        survivor = results[1 - victim]
        assert survivor[0] not in (0, 1, 2, cluster.EXIT_STOPPED), survivor  # a launcher starts it again
        assert time.monotonic() - killed < 2 * SILENCE + 10
        reached = len(lines(metrics))

    last = jaxkd(*train)
    assert last.returncode == 0, last.stderr
    assert "resuming at step" in last.stdout
    assert_close_run(workdir, single)


def assert_same_cache(one: Store, two: Store) -> None:
    """The same rows of the same teacher; near ties among the most probable may be decided otherwise."""
    assert one.manifest == two.manifest
    for domain, splits in one.manifest["sizes"].items():
        for split, count in splits.items():
            stored = [codec.decode_rows(s.layout(split), s.read(domain, split, range(count))) for s in (one, two)]
            for a, b in zip(*stored, strict=True):
                a, b = (np.where(np.isfinite(x), x, 0.0) for x in (a, b))
                close = np.isclose(a, b, atol=5e-3)
                assert close.all() if split == "valid" else close.mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "model"])
def test_cached_teachers_and_a_measuring_rule_in_two_processes(mesh, spread, tmp_path):
    """Over `data` each process writes and reads rows of its own; over `model` both hold the same, and one writes."""
    common = [
        *spread, "--config.teacher.signal=top_k", "--config.teacher.entries=8", f"--config.run.mesh.{mesh}=2",
        f"--config.run.mesh.{'data' if mesh == 'model' else 'model'}=1", "--config.data.mixture=ddk(alpha=0.5)",
        "--config.run.eval_batch=6",
    ]  # fmt: skip
    cache = lambda name: f"--config.teacher.cache={tmp_path / name}"
    done = jaxkd("cache", *common, cache("alone"), devices=2)
    assert done.returncode == 0, done.stderr
    Job(2, "cache", *common, cache("together")).ends(0)
    assert_same_cache(Store(tmp_path / "alone"), Store(tmp_path / "together"))

    alone = jaxkd("train", "--workdir", str(tmp_path / "one"), *common, cache("together"), devices=2)
    assert alone.returncode == 0, alone.stderr
    job = Job(2, "train", "--workdir", str(tmp_path / "pair"), *common, cache("together"))
    output = job.ends(0)[0][0]
    assert "from its teacher" in output  # the cache was checked by both
    assert_close_run(tmp_path / "pair", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_write_the_text_that_one_writes(spread, tmp_path):
    """Student, teacher and replay buffer."""
    written = [
        *spread, "--config.data.rollout.student=0.5", "--config.data.rollout.teacher=0.2",
        "--config.data.rollout.prompt=8", "--config.data.rollout.length=12", "--config.data.rollout.buffer=16",
        "--config.data.interval=6", "--config.run.rollout_every=2", "--config.run.samples=3",
    ]  # fmt: skip
    workdir, alone = tmp_path / "pair", tmp_path / "alone"
    Job(2, "train", "--workdir", str(workdir), *written).ends(0)
    result = jaxkd("train", "--workdir", str(alone), *written, devices=2)
    assert result.returncode == 0, result.stderr
    assert_same_run(workdir, alone)
    assert sum(row["rollout_share"] for row in lines(alone / "metrics.jsonl")) > 0
    for name in ("samples.jsonl", "diagnostics.jsonl"):
        assert lines(workdir / name) == lines(alone / name)
    first = [row for row in lines(alone / "samples.jsonl") if (row["step"], row["author"]) == (0, "student")]
    assert len(first) == 3  # and not a fourth, which fills the second device


@pytest.mark.slow
def test_interrupt_of_one_stops_all(spread, tmp_path):
    job = Job(2, "train", "--workdir", str(tmp_path / "w"), *spread, "--config.run.steps=400")
    job.wait_for(tmp_path / "w" / "evals.jsonl", 1)
    job.started[1].send_signal(signal.SIGINT)
    results = job.ends(cluster.EXIT_STOPPED)
    assert "Traceback" not in results[0][1] + results[1][1]


@pytest.mark.slow
def test_a_process_that_stands_still_ends_all_with_the_sentence_of_the_first_to_notice(spread, tmp_path):
    """Process 1 is stopped for so long that process 0, in a collective with it, gives up; then it hears of it."""
    workdir = tmp_path / "w"
    more = ["--config.run.steps=4000", "--config.run.stall_s=10.0", "--config.run.checkpoint_every=1000"]
    job = Job(2, "train", "--workdir", str(workdir), *spread, *more, "--no-check", silence=100)
    job.wait_for(workdir / "metrics.jsonl", 5)
    job.started[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    while not (workdir / "stalled-0.txt").exists():
        assert time.monotonic() - stopped < 60
        time.sleep(0.05)
    job.started[1].send_signal(signal.SIGCONT)
    (_, errors), (_, other_errors) = job.ends(cluster.EXIT_INTERNAL, 60)
    assert time.monotonic() - stopped < 60  # and not when JAX takes a silent process for dead
    assert "run.stall_s=10" in errors
    assert other_errors.splitlines()[-1].startswith("jaxkd: process 0 failed: error: step ")
    assert not (workdir / "stalled-1.txt").exists()  # it stood still because it could not run
