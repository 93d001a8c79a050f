"""Sweeps: nothing is run twice, what was cut goes on, a failure stops nothing, and a stop stops the run inside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import REPOSITORY, assert_same_run, jaxkd, lines, process_environment

from jaxkd.cli import sweep

TINY = str(REPOSITORY / "configs" / "tiny.py")


def plan(workdir=Path("runs"), recipe=TINY, overrides=(), variants=(), runs=(), seeds=(0,)):
    return sweep.plan(recipe, overrides, workdir, variants, runs, seeds)


def test_seeds_go_round_the_variants():
    """A sweep that is cut has as many seeds of one variant as of another."""
    found = plan(runs=["low: --config.optim.lr.peak=1e-4", "high: --config.optim.lr.peak=1e-2"], seeds=(0, 7))
    assert [str(run) for run in found] == ["low, seed 0", "high, seed 0", "low, seed 7", "high, seed 7"]
    assert [run.experiment.optim.lr.peak for run in found] == [1e-4, 1e-2, 1e-4, 1e-2]
    assert [run.experiment.run.seed for run in found] == [0, 0, 7, 7]
    assert str(found[3].workdir) == "runs/high/seed-7"


def test_a_variant_goes_behind_the_recipes_argument():
    [run] = plan(recipe=str(REPOSITORY / "configs/ddk.py") + ":small", variants=["uniform"])
    assert run.experiment.data.mixture == "uniform"
    assert set(run.experiment.data.domains) == {"code", "manual", "legal", "scripture", "dialogue", "math"}
    named = plan(recipe=str(REPOSITORY / "configs/ddk.py"), runs=["mine: :small,kd --config.run.steps=3"])
    assert (named[0].variant, named[0].experiment.data.mixture, named[0].experiment.run.steps) == ("mine", "natural", 3)


def test_a_recipe_alone_is_a_variant():
    assert [run.variant for run in plan()] == ["tiny"]


def test_runs_of_a_file(tmp_path):
    file = tmp_path / "runs.txt"
    file.write_text("# peaks\n\na: --config.optim.lr.peak=1e-4\n  b:\n")
    assert sweep.read_runs(file) == ["a: --config.optim.lr.peak=1e-4", "b:"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runs": ["a: --config.optim.lr.peek=1"]}, r"variant 'a': unknown key --config.optim.lr.peek: did you mean"),
        ({"variants": ["x"]}, "variant 'x': configs?.*takes no argument, got 'x'"),
        ({"runs": ["a: steps=3"]}, r"'steps=3' in 'a: steps=3' describes no run: write"),
        ({"runs": ["--config.run.steps=3"]}, r"'--config.run.steps=3' describes no run: write"),
        ({"runs": ["a:", "a: --config.run.steps=3"]}, "two variants are called 'a'"),
        ({"runs": ["../a:"]}, r"'\.\./a' cannot be a variant's name"),
        ({"seeds": (1, 1)}, "a seed is given twice: 1 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(given, message):
    with pytest.raises(ValueError, match=message):
        plan(**given)


class Sweep:
    """`jaxkd sweep` in the background, to be signalled."""

    def __init__(self, workdir: Path, arguments: list[str]):
        self.workdir = workdir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxkd", "sweep", "--workdir", str(workdir), *arguments],
            env=process_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def child(self) -> int:
        [child] = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def wait_for_step(self, step: int, workdir: Path) -> None:
        deadline, file = time.monotonic() + 120, workdir / "metrics.jsonl"
        while time.monotonic() < deadline and self.process.poll() is None:
            if file.exists() and file.read_text().count("\n") >= step:
                return
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached")

    def finish(self) -> str:
        return self.process.communicate(timeout=300)[0]


@pytest.fixture(scope="module")
def given(arguments) -> list[str]:
    """`good` is the suite's undisturbed run, `bad` finds no text, `short` takes two steps."""
    missing = "--config.data.domains.alpha=no/such/file.jsonl"
    return [*arguments, "--run", "good:", "--run", f"bad: {missing}", "--run", "short: --config.run.steps=2"]


@pytest.fixture(scope="module")
def swept(given, tmp_path_factory):
    """A sweep stopped by Ctrl-C, killed together with its child, and run to its end: where, and what it said."""
    workdir = tmp_path_factory.mktemp("sweep") / "runs"
    run = workdir / "good" / "seed-0"
    first = Sweep(workdir, given)
    first.wait_for_step(2, run)
    child = first.child()
    first.process.send_signal(signal.SIGINT)
    stopped = first.finish()
    assert not Path(f"/proc/{child}").exists()
    second = Sweep(workdir, given)
    second.wait_for_step(7, run)
    child = second.child()
    for process in (second.process.pid, child):
        os.kill(process, signal.SIGKILL)
    second.finish()
    wait_until_dead(child)
    third = Sweep(workdir, given)
    return workdir, (stopped, first.process.returncode), (third.finish(), third.process.returncode)


def wait_until_dead(process: int) -> None:
    status = Path(f"/proc/{process}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_saves_the_run_and_ends_the_sweep(swept):
    workdir, (said, code), _ = swept
    assert code == 130
    assert "good, seed 0: stopped; the same command goes on from here" in said
    assert "bad" not in said
    assert "stopped by a signal: step" in (workdir / "good" / "seed-0.log").read_text()


@pytest.mark.slow
def test_what_was_killed_goes_on_and_equals_an_undisturbed_run(swept, undisturbed):
    workdir, _, (said, _) = swept
    assert "good, seed 0: done in" in said
    assert (workdir / "good" / "seed-0.log").read_text().count("resuming at step") == 2
    assert_same_run(workdir / "good" / "seed-0", undisturbed)


@pytest.mark.slow
def test_a_failure_is_named_and_the_rest_is_run(swept):
    workdir, _, (said, code) = swept
    assert code == 1
    assert "2 of 3 runs are done" in said
    assert "failed: bad, seed 0: jaxkd: error: no/such/file.jsonl does not exist" in said
    assert lines(workdir / "short" / "seed-0" / "evals.jsonl")[-1]["step"] == 2


@pytest.mark.slow
def test_what_is_done_is_left_alone(swept, given):
    """By what it left: a run whose last checkpoint is gone is not done, whatever else is there."""
    workdir, _, _ = swept
    files = lambda: {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    before = files()
    good = [word for word in given if not word.startswith("bad:")]
    del good[good.index("--run", good.index("good:") + 1)]  # that of bad
    done = jaxkd("sweep", "--workdir", str(workdir), *good)
    assert (done.returncode, files()) == (0, before), done.stdout
    assert "2 are done, 0 to go" in done.stdout
    left = jaxkd("sweep", "--workdir", str(workdir), *given, "--print")
    [command] = left.stdout.splitlines()
    assert "jaxkd train --workdir" in command
    assert "bad/seed-0" in command
    marker = workdir / "short" / "seed-0" / "checkpoints" / "2" / "commit_success.txt"
    marker.rename(marker.with_suffix(".away"))
    left = jaxkd("sweep", "--workdir", str(workdir), *good, "--print")
    marker.with_suffix(".away").rename(marker)
    assert "short/seed-0" in left.stdout
    other = jaxkd("sweep", "--workdir", str(workdir), *good, "--config.optim.clip=2.0", "--print")
    assert other.stdout.count("jaxkd train") == 2  # another experiment is not done by what this one left


def test_a_cache_comes_first(two_domains, tmp_path):
    cached = ["--config.teacher.signal=hidden", f"--config.teacher.cache={tmp_path / 'cache'}"]
    found = plan(tmp_path, overrides=cached, runs=["a:", "b: --config.run.steps=2"])
    verbs = [line.split("jaxkd ")[1].split()[0] for line in sweep.printed(found, tmp_path)]
    assert verbs == ["cache", "train", "train"]
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text('{"complete": false}')
    assert [command.words[0] for command in sweep.commands(found, tmp_path)] == ["cache", "train", "train"]
    manifest.write_text('{"complete": true}')
    assert [command.words[0] for command in sweep.commands(found, tmp_path)] == ["train", "train"]
