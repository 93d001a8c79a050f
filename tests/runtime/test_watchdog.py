"""The watchdog, in processes of its own that stand still in earnest."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from harness import REPOSITORY, free_address, process_environment, tiny_arguments

from jaxkd.runtime import cluster, watchdog

STILL = """
import sys, time
from pathlib import Path
from jaxkd.runtime.watchdog import Watchdog
watch = Watchdog(Path(sys.argv[1]), float(sys.argv[3]), int(sys.argv[2]))
watch.phase("steps", 6)
watch.stepped(6, 0.001)
watch.stepped(7, 0.001)
print("ready", flush=True)
def wait_for_a_batch_that_never_comes():
    for _ in range(int(sys.argv[4])):
        time.sleep(0.05)
wait_for_a_batch_that_never_comes()
watch.close()
"""


def start(workdir, process: int, patience: float, naps: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", STILL, str(workdir), str(process), str(patience), str(naps)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_step_that_stands_still_ends_the_process_with_its_stacks(tmp_path):
    process = start(tmp_path, 3, 0.3, 1200)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == cluster.UNFORESEEN  # on which launchers start again
    assert "step 8 has made no progress for 0.3 s (run.stall_s=0.3), so process 3 ends with code 70" in errors
    for text in (errors, (tmp_path / "stalled-3.txt").read_text()):
        assert "wait_for_a_batch_that_never_comes" in text
    assert not (tmp_path / "heartbeat.json").exists()  # which is process 0's


def test_the_last_heartbeat_says_where_it_stood_still(tmp_path):
    """Although it began the phase after the beat before, of which there is one in five seconds."""
    process = start(tmp_path, 0, 0.3, 1200)
    process.communicate(timeout=60)
    assert process.returncode == cluster.UNFORESEEN
    last = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (last["phase"], last["step"], last["pid"]) == ("steps", 7, process.pid)


def test_a_process_that_was_stopped_is_not_late(tmp_path):
    """Ctrl-Z, or a suspended laptop: the clock goes on, the process could not."""
    process = start(tmp_path, 0, 1.0, 6)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    last = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (last["phase"], last["step"], last["pid"]) == ("end", 7, process.pid)
    assert abs(last["time"] - time.time()) < 60


def test_limits():
    assert watchdog.limit("steps", 600, 2.0) == 600
    assert watchdog.limit("steps", 600, 90.0) == 900  # a step that takes long is given ten times as long
    assert watchdog.limit("steps", 600, None) == 3600
    assert watchdog.limit("compile", 600, 2.0) == watchdog.limit("evaluation", 600, None) == 3600
    assert watchdog.limit("start", 600, None) is None  # rows may take days to build
    assert watchdog.limit("steps", 0, 2.0) is None


PAIR = """
import sys, time
from pathlib import Path
from jaxkd import unison
from jaxkd.runtime.watchdog import Watchdog
unison.join()
unison.meet("all")
first = unison.first()
print("ready", flush=True)
watch = Watchdog(Path(sys.argv[1]), 0.0 if first else 1.0, 0 if first else 1)
watch.phase("steps", 6)
time.sleep(600)  # as in a collective that waits for one that never comes
"""


@pytest.mark.slow
@pytest.mark.parametrize("coordinator_stands_still", [False, True])
def test_the_others_end_with_the_one_that_stands_still(tmp_path, coordinator_stands_still):
    """Process 1 ends itself. Process 0, which holds the store through which it says so, would wait for ever."""
    common = {
        **process_environment(), "JAX_PLATFORMS": "cpu", "JAXKD_COORDINATOR": free_address(), "JAXKD_NUM_PROCESSES": "2"
    }  # fmt: skip
    other, one = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(tmp_path)], env=common | {"JAXKD_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        assert (one.stdout.readline(), other.stdout.readline()) == ("ready\n", "ready\n")
        if coordinator_stands_still:
            other.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        _, errors = one.communicate(timeout=60)
        assert one.returncode == cluster.UNFORESEEN, errors
        assert time.monotonic() - start < 40  # not the 100 seconds after which JAX takes a silent process for dead
        sentence = "has made no progress for 6 s (run.stall_s=1)"  # before there is a median
        assert sentence in errors
        if coordinator_stands_still:
            return  # nobody could be told: a launcher that sees one end ends the rest
        _, errors = other.communicate(timeout=20)
        assert other.returncode == cluster.UNFORESEEN, errors
        last = errors.splitlines()[-1]
        assert last.startswith("jaxkd: process 1 failed: error: step 7 has made no progress for 6 s")
        assert last.endswith(f"what it was doing is in {tmp_path / 'stalled-1.txt'}")
    finally:
        one.kill()
        other.kill()
        other.communicate()


RUN = """
import sys, threading
from jaxkd import main
from jaxkd.data import loader
read, seen = loader.read_rows, []
def storage_that_hangs(*arguments):
    seen.append(1)
    if len(seen) > int(sys.argv[1]):
        threading.Event().wait()
    return read(*arguments)
loader.read_rows = storage_that_hangs
main.console(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_run_whose_storage_hangs_is_ended_and_goes_on(two_domains, tmp_path):
    workdir = tmp_path / "run"
    more = ["--config.run.steps=12", "--config.run.checkpoint_every=2", "--config.run.stall_s=8.0"]
    arguments = ["train", "--workdir", str(workdir), *tiny_arguments(two_domains, tmp_path / "rows", *more)]
    # Two domains' held-out rows, a check, and then a batch a step, of which some are read ahead.
    command = lambda reads: [sys.executable, "-c", RUN, str(reads), *arguments]
    run = lambda reads: subprocess.run(
        command(reads), env=process_environment(), capture_output=True, text=True, timeout=400, check=False
    )
    stalled = run(9)
    assert stalled.returncode == cluster.UNFORESEEN, stalled.stderr
    assert "has made no progress for" in stalled.stderr
    assert "storage_that_hangs" in (workdir / "stalled-0.txt").read_text()
    beat = json.loads((workdir / "heartbeat.json").read_text())
    assert beat["phase"] == "steps"
    reached = beat["step"]
    assert 0 < reached < 12
    again = run(1000)
    assert again.returncode == 0, again.stderr
    assert f"resuming at step {reached - reached % 2}" in again.stdout
    assert "in 2 processes" in again.stdout
