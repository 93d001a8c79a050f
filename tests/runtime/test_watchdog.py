"""The watchdog, in processes of its own whose main thread really hangs."""

import json
import signal
import subprocess
import time

import pytest
from harness import start

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


def hang(workdir, process: int, stall_s: float, naps: int) -> subprocess.Popen:
    [started] = start("-c", HANG, str(workdir), str(process), str(stall_s), str(naps))
    return started


def test_a_step_that_hangs_ends_the_process_with_its_stacks_and_a_last_heartbeat(tmp_path):
    """The heartbeat names the phase that hung, although heartbeats are five seconds apart."""
    for rank in (3, 0):
        process = hang(tmp_path, rank, 0.3, 1200)
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
    process = hang(tmp_path, 0, 1.0, 6)
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
def test_a_process_that_hangs_ends_itself_although_the_coordinator_is_stopped(tmp_path):
    """It cannot be told of it: a launcher that sees one process end ends the rest."""
    coordinator, other = start("-c", PAIR, str(tmp_path), count=2)
    try:
        assert (other.stdout.readline(), coordinator.stdout.readline()) == ("ready\n", "ready\n")
        coordinator.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        _, errors = other.communicate(timeout=60)
        assert other.returncode == cluster.EXIT_INTERNAL, errors
        assert time.monotonic() - begin < 40  # not the 100 seconds of JAX's heartbeat timeout
        assert "run.stall_s=1)" in errors
    finally:
        for process in (other, coordinator):
            process.kill()
            process.communicate()
