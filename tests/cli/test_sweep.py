"""Sweeps: finished runs are skipped, interrupted ones resume, a failed one stops no other, signals reach the child."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from harness import REPOSITORY, Background, assert_same_run, here, lines

from jaxkd.cli import sweep

TINY = str(REPOSITORY / "configs" / "tiny.py")


def plan(workdir=Path("runs"), recipe=TINY, overrides=(), variants=(), runs=(), seeds=(0,)):
    return sweep.plan(recipe, overrides, workdir, variants, runs, seeds)


def test_runs_seeds_variants_and_files(tmp_path):
    planned = plan(runs=["low: --config.optim.lr.peak=1e-4", "high: --config.optim.lr.peak=1e-2"], seeds=(0, 7))
    assert [str(run) for run in planned] == ["low, seed 0", "high, seed 0", "low, seed 7", "high, seed 7"]
    assert [run.experiment.optim.lr.peak for run in planned] == [1e-4, 1e-2, 1e-4, 1e-2]
    assert [run.experiment.run.seed for run in planned] == [0, 0, 7, 7]
    assert str(planned[3].workdir) == "runs/high/seed-7"
    assert [run.variant for run in plan()] == ["tiny"]
    [run] = plan(recipe=str(REPOSITORY / "configs/ddk.py") + ":small", variants=["uniform"])
    assert run.experiment.data.mixture == "uniform"
    assert set(run.experiment.data.domains) == {"code", "manual", "legal", "scripture", "dialogue", "math"}
    named = plan(recipe=str(REPOSITORY / "configs/ddk.py"), runs=["mine: :small,kd --config.run.steps=3"])
    assert (named[0].variant, named[0].experiment.data.mixture, named[0].experiment.run.steps) == ("mine", "natural", 3)
    file = tmp_path / "runs.txt"
    file.write_text("# peaks\n\na: --config.optim.lr.peak=1e-4\n  b:\n")
    assert sweep.read_runs(file) == ["a: --config.optim.lr.peak=1e-4", "b:"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runs": ["a: --config.optim.lr.peek=1"]}, r"'a'.*optim\.lr\.peek"),
        ({"variants": ["x"]}, "tiny.py.*'x'"),
        ({"runs": ["a: steps=3"]}, r"--run .*steps=3"),
        ({"runs": ["--config.run.steps=3"]}, r"--run .*--config.run.steps=3"),
        ({"runs": ["a:", "a: --config.run.steps=3"]}, "'a'"),
        ({"runs": ["../a:"]}, r"'\.\./a'"),
        ({"seeds": (1, 1)}, "--seeds.*1 1"),
    ],
)
def test_errors_come_before_anything_runs(given, message):
    with pytest.raises(ValueError, match=message):
        plan(**given)


def child_of(sweep: Background) -> int:
    [child] = Path(f"/proc/{sweep.process.pid}/task/{sweep.process.pid}/children").read_text().split()
    return int(child)


@pytest.fixture(scope="module")
def given(arguments) -> list[str]:
    """`good` is the suite's undisturbed run, `bad` has no text, `short` takes two steps."""
    missing = "--config.data.domains.alpha=no/such/file.jsonl"
    return [*arguments, "--run", "good:", "--run", f"bad: {missing}", "--run", "short: --config.run.steps=2"]


@pytest.fixture(scope="module")
def swept(given, tmp_path_factory):
    """A sweep stopped by Ctrl-C, then killed with its child, then run to its end: workdir, outputs and exit codes."""
    workdir = tmp_path_factory.mktemp("sweep") / "runs"
    metrics = "good/seed-0/metrics.jsonl"
    first = Background(workdir, given, verb="sweep")
    first.wait_for_step(2, metrics)
    child = child_of(first)
    first.process.send_signal(signal.SIGINT)
    stopped = first.finish()
    assert not Path(f"/proc/{child}").exists()
    second = Background(workdir, given, verb="sweep")
    second.wait_for_step(7, metrics)
    child = child_of(second)
    for process in (second.process.pid, child):
        os.kill(process, signal.SIGKILL)
    second.finish()
    wait_until_dead(child)
    third = Background(workdir, given, verb="sweep")
    return workdir, (stopped, first.process.returncode), (third.finish(), third.process.returncode)


def wait_until_dead(process: int) -> None:
    status = Path(f"/proc/{process}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_a_kill_and_a_failure(swept, undisturbed):
    workdir, (stopped, stop_code), (output, code) = swept
    assert stop_code == 130
    assert "good, seed 0: stopped" in stopped
    assert "bad" not in stopped
    assert "stopped by a signal: step" in (workdir / "good" / "seed-0.log").read_text()
    assert "good, seed 0: done in" in output
    assert (workdir / "good" / "seed-0.log").read_text().count("resuming at step") == 2
    assert_same_run(workdir / "good" / "seed-0", undisturbed)
    assert code == 1
    assert "2 of 3 runs" in output
    assert re.search("failed: bad, seed 0: .*no/such/file.jsonl", output)
    assert lines(workdir / "short" / "seed-0" / "evals.jsonl")[-1]["step"] == 2


@pytest.mark.slow
def test_finished_runs_are_skipped(swept, given):
    """A run without its last checkpoint is not finished, whatever else is there."""
    workdir, _, _ = swept
    files = lambda: {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    before = files()
    good = [word for word in given if not word.startswith("bad:")]
    del good[good.index("--run", good.index("good:") + 1)]  # that of bad
    done = here("sweep", "--workdir", str(workdir), *good)
    assert (done.returncode, files()) == (0, before), done.stdout
    assert "2 finished, 0 to go" in done.stdout
    left = here("sweep", "--workdir", str(workdir), *given, "--print")
    [command] = left.stdout.splitlines()
    assert "jaxkd train --workdir" in command
    assert "bad/seed-0" in command
    marker = workdir / "short" / "seed-0" / "checkpoints" / "2" / "commit_success.txt"
    marker.rename(marker.with_suffix(".away"))
    left = here("sweep", "--workdir", str(workdir), *good, "--print")
    marker.with_suffix(".away").rename(marker)
    assert "short/seed-0" in left.stdout
    other = here("sweep", "--workdir", str(workdir), *good, "--config.optim.clip=2.0", "--print")
    assert other.stdout.count("jaxkd train") == 2  # runs of another experiment are not those


def test_a_cache_comes_first(two_domains, tmp_path):
    cached = ["--config.teacher.signal=hidden", f"--config.teacher.cache={tmp_path / 'cache'}"]
    planned = plan(tmp_path, overrides=cached, runs=["a:", "b: --config.run.steps=2"])
    verbs = [line.split("jaxkd ")[1].split()[0] for line in sweep.printed(planned, tmp_path)]
    assert verbs == ["cache", "train", "train"]
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text('{"complete": false}')
    assert [command.words[0] for command in sweep.commands(planned, tmp_path)] == ["cache", "train", "train"]
    manifest.write_text('{"complete": true}')
    assert [command.words[0] for command in sweep.commands(planned, tmp_path)] == ["train", "train"]
