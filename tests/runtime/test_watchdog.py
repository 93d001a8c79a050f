"""The watchdog, in processes of its own whose main thread really hangs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from harness import REPOSITORY, free_address, process_environment, tiny_arguments

from jaxkd.runtime import cluster, watchdog

HANG = """
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


def start(workdir, process: int, stall_s: float, naps: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HANG, str(workdir), str(process), str(stall_s), str(naps)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_step_that_hangs_ends_the_process_with_its_stacks_and_a_last_heartbeat(tmp_path):
    """The heartbeat names the phase that hung, although heartbeats are five seconds apart."""
    for rank in (3, 0):
        process = start(tmp_path, rank, 0.3, 1200)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == cluster.EXIT_INTERNAL  # on which launchers restart
        assert "step 8" in errors
        assert "run.stall_s=0.3" in errors
        for text in (errors, (tmp_path / f"stalled-{rank}.txt").read_text()):
            assert "wait_for_a_batch_that_never_comes" in text
        assert (tmp_path / "heartbeat.json").exists() == (rank == 0)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["phase"], beat["step"], beat["pid"]) == ("steps", 7, process.pid)


def test_a_suspended_process_is_not_late(tmp_path):
    process = start(tmp_path, 0, 1.0, 6)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["phase"], beat["step"], beat["pid"]) == ("end", 7, process.pid)
    assert abs(beat["time"] - time.time()) < 60


def test_timeouts():
    assert watchdog.timeout("steps", 600, 2.0) == 600
    assert watchdog.timeout("steps", 600, 90.0) == 900  # ten times the median
    assert watchdog.timeout("steps", 600, None) == 3600
    assert watchdog.timeout("compile", 600, 2.0) == watchdog.timeout("evaluation", 600, None) == 3600
    assert watchdog.timeout("start", 600, None) is None  # building rows may take days
    assert watchdog.timeout("steps", 0, 2.0) is None


PAIR = """
import sys, time
from pathlib import Path
from jaxkd.runtime import multihost
from jaxkd.runtime.watchdog import Watchdog
multihost.join()
multihost.barrier("all")
main = multihost.is_main()
print("ready", flush=True)
watch = Watchdog(Path(sys.argv[1]), 0.0 if main else 1.0, 0 if main else 1)
watch.phase("steps", 6)
time.sleep(600)  # as in a collective that never completes
"""


@pytest.mark.slow
@pytest.mark.parametrize("coordinator_hangs", [False, True])
def test_all_processes_end_when_one_hangs(tmp_path, coordinator_hangs):
    """Process 1 ends itself, also when process 0, which hosts the store for the message, is stopped."""
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
        if coordinator_hangs:
            other.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        _, errors = one.communicate(timeout=60)
        assert one.returncode == cluster.EXIT_INTERNAL, errors
        assert time.monotonic() - begin < 40  # not the 100 seconds of JAX's heartbeat timeout
        assert "run.stall_s=1)" in errors
        if coordinator_hangs:
            return  # it cannot be told: a launcher that sees one process end ends the rest
        _, errors = other.communicate(timeout=20)
        assert other.returncode == cluster.EXIT_INTERNAL, errors
        last = errors.splitlines()[-1]
        assert last.startswith("jaxkd: process 1 failed: error: step 7")
        assert last.endswith(f"{tmp_path / 'stalled-1.txt'}")
    finally:
        one.kill()
        other.kill()
        other.communicate()


RUN = """
import sys, threading
from jaxkd.cli import main
from jaxkd.data import loader
read, calls = loader.read_rows, []
def storage_that_hangs(*arguments):
    calls.append(1)
    if len(calls) > int(sys.argv[1]):
        threading.Event().wait()
    return read(*arguments)
loader.read_rows = storage_that_hangs
main.console(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_run_whose_storage_hangs_is_ended_and_resumes(two_domains, tmp_path):
    workdir = tmp_path / "run"
    more = ["--config.run.steps=12", "--config.run.checkpoint_every=2", "--config.run.stall_s=8.0"]
    arguments = ["train", "--workdir", str(workdir), *tiny_arguments(two_domains, tmp_path / "rows", *more)]
    # The held-out rows of two domains, a check, then one batch per step, of which some are prefetched.
    command = lambda reads: [sys.executable, "-c", RUN, str(reads), *arguments]
    run = lambda reads: subprocess.run(
        command(reads), env=process_environment(), capture_output=True, text=True, timeout=400, check=False
    )
    stalled = run(9)
    assert stalled.returncode == cluster.EXIT_INTERNAL, stalled.stderr
    assert "run.stall_s=8" in stalled.stderr
    assert "storage_that_hangs" in (workdir / "stalled-0.txt").read_text()
    beat = json.loads((workdir / "heartbeat.json").read_text())
    assert beat["phase"] == "steps"
    reached = beat["step"]
    assert 0 < reached < 12
    again = run(1000)
    assert again.returncode == 0, again.stderr
    assert f"step {reached - reached % 2}" in again.stdout
