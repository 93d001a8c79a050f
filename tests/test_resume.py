"""Runs that are killed, signalled and resumed: the same bits as one that never was."""

import random
import signal
import time

import pytest
from harness import Background, assert_same_run, jaxkd, lines_so_far

from jaxkd import processes


@pytest.mark.slow
def test_killed_ten_times_equals_undisturbed(undisturbed, arguments, tmp_path):
    workdir, rng = tmp_path / "killed", random.Random(5)
    for _ in range(10):
        run = Background(workdir, arguments, cache=False)
        reached = len(lines_so_far(workdir))
        run.wait_for_step(min(reached + rng.randint(1, 3), 12))
        time.sleep(rng.random() * 0.05)
        run.process.kill()
        run.finish()
    result = jaxkd("train", "--workdir", str(workdir), *arguments)
    assert result.returncode == 0, result.stderr
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_once_equals_undisturbed(number, undisturbed, arguments, tmp_path):
    workdir = tmp_path / "stopped"
    run = Background(workdir, arguments, cache=False)
    if number == signal.SIGKILL:
        run.wait_for_step(4)
    else:  # while the step compiles: these steps take milliseconds, and JAX looks for SIGTERM about once a second
        run.wait_for_step(0, "evals.jsonl")
    run.process.send_signal(number)
    output = run.finish()
    if number != signal.SIGKILL:
        assert run.process.returncode == processes.STOPPED, output  # saved, and to be started again
        assert "Traceback" not in output
        if "the same command goes on" not in output:
            pytest.fail(f"the run ended before the signal was noticed: {output[-500:]}")
    result = jaxkd("train", "--workdir", str(workdir), *arguments)
    assert result.returncode == 0, result.stderr
    if number != signal.SIGKILL:  # which may come before the first checkpoint is whole
        assert "resuming at step" in result.stdout
    assert_same_run(workdir, undisturbed)
