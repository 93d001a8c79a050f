"""Runs that are killed, signalled and resumed: the same bits as one that never was."""

import random
import re
import signal
import subprocess
import sys
import time

import pytest
from harness import Background, assert_same_run, lines, lines_so_far, process_environment, succeeds

from jaxkd.runtime import cluster


@pytest.mark.slow
def test_killed_ten_times_equals_undisturbed(undisturbed, arguments, tmp_path):
    workdir, rng = tmp_path / "killed", random.Random(5)
    for _ in range(10):
        run = Background(workdir, arguments)
        reached = len(lines_so_far(workdir))
        run.wait_for_step(min(reached + rng.randint(1, 3), 12))
        time.sleep(rng.random() * 0.05)
        run.process.kill()
        run.finish()
    succeeds("train", "--workdir", str(workdir), *arguments)
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_once_equals_undisturbed(number, undisturbed, arguments, tmp_path):
    workdir = tmp_path / "stopped"
    run = Background(workdir, arguments, cache=False)
    # While the step compiles: these steps take milliseconds, and JAX looks for SIGTERM about once a second.
    run.wait_for_step(0, "evals.jsonl")
    run.process.send_signal(number)
    output = run.finish()
    assert run.process.returncode == cluster.EXIT_STOPPED, output  # saved, and to be started again
    assert "Traceback" not in output
    assert "the same command resumes" in output, "the run ended before the signal was noticed"
    printed = succeeds("train", "--workdir", str(workdir), *arguments)
    assert "resuming at step" in printed
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_a_resumed_run_hears_of_sigterm_before_its_first_step(undisturbed, arguments, tmp_path):
    """JAX has it stop one after the last number that it was asked with, which a new process has not asked with yet."""
    workdir = tmp_path / "stopped"
    Background(workdir, arguments).kill_at(7)
    phases = (workdir / "goodput.jsonl").read_text().count("\n")
    second = Background(workdir, arguments, cache=False)
    second.wait_for_step(phases + 2, "goodput.jsonl")  # it has started and loaded, and is about to compile its step
    second.process.send_signal(signal.SIGTERM)
    output = second.finish()
    assert second.process.returncode == cluster.EXIT_STOPPED, output
    [resumed] = re.findall(r"resuming at step (\d+) of 12", output)
    assert f"stopped by a signal: step {int(resumed) + 1} of 12 is saved" in output
    succeeds("train", "--workdir", str(workdir), *arguments)
    assert_same_run(workdir, undisturbed)


# jaxkd with an evaluation that takes its time: the first, before a step was made, or the second, after six.
JUDGING = """
import sys, time
from jaxkd.cli import main
from jaxkd.run import load
held_out, calls = load.held_out, []

def slowly(*arguments):
    calls.append(1)
    slow = len(calls) == int(sys.argv[1])
    return {name: paced(batches) if slow else batches for name, batches in held_out(*arguments).items()}

def paced(batches):
    for batch in batches:
        print("judging", flush=True)
        time.sleep(1)
        yield batch

load.held_out = slowly
main.console(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("evaluation", "saved"), [(1, 0), (2, 6)])
def test_sigterm_does_not_wait_for_an_evaluation(arguments, tmp_path, evaluation, saved):
    workdir, more = tmp_path / "run", [*arguments, "--config.run.eval_batch=1"]
    command = [sys.executable, "-c", JUDGING, str(evaluation), "train", "--no-check", "--workdir", str(workdir), *more]
    run = subprocess.Popen(
        command, env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in run.stdout:
        if line == "judging\n":
            break
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == cluster.EXIT_STOPPED, output
    assert output.count("judging") < 12  # of the sixteen rows that are held out
    evaluations = workdir / "evals.jsonl"
    judged = {row["step"] for row in lines(evaluations)} if evaluations.exists() else set()
    if saved:
        assert "stopped by a signal: step 6 of 12 is saved" in output
        assert judged == {0}
    else:
        assert "stopped by a signal before the first step" in output
        assert not judged
    printed = succeeds("train", "--workdir", str(workdir), *more)
    assert ("resuming at step 6" in printed) == bool(saved)
    assert {row["step"] for row in lines(evaluations)} == {0, 6, 12}
