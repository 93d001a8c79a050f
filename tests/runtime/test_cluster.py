"""How processes find each other: what the environment says, the roll call, and two real ones that join."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from harness import REPOSITORY, free_address, process_environment

from jaxkd.runtime import cluster
from jaxkd.runtime.cluster import Place, place, roll_call

HERE = {"JAXKD_COORDINATOR": "10.0.0.2:8476", "JAXKD_NUM_PROCESSES": "4", "JAXKD_PROCESS_ID": "3"}
TASK = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[01-02]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "platforms", "found"),
    [
        ({}, "", Place("one")),
        (HERE, "", Place("explicit", "10.0.0.2:8476", 4, 3)),
        (HERE | TASK, "", Place("explicit", "10.0.0.2:8476", 4, 3)),  # what was asked for goes before what is found
        (HERE | {"JAXKD_COORDINATOR": "[fd00::2]:8476"}, "", Place("explicit", "[fd00::2]:8476", 4, 3)),
        (HERE | {"JAXKD_NUM_PROCESSES": "1", "JAXKD_PROCESS_ID": "0"}, "", Place("one")),
        (TASK, "", Place("slurm", "", 16, 9)),
        (TASK, "cuda,cpu", Place("slurm", "", 16, 9)),
        (TASK | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "", Place("one")),  # one task has all GPUs of its node
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}, "", Place("one")),
        ({}, "tpu,cpu", Place("gcetpu")),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", Place("one")),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", Place("gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", Place("one")),  # `JAX_PLATFORMS=cpu` on a host of a TPU
        ({"TPU_WORKER_HOSTNAMES": "a,b"} | HERE, "proxy,cpu", Place("pathways")),
        ({"SKYPILOT_NUM_NODES": "1"}, "", Place("one")),
    ],
)
def test_place(environ, platforms, found):
    assert place(environ, platforms) == found


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"JAXKD_PROCESS_ID": "0"}, "JAXKD_PROCESS_ID=0 but no JAXKD_COORDINATOR and no JAXKD_NUM_PROCESSES: set all"),
        (HERE | {"JAXKD_PROCESS_ID": "four"}, "JAXKD_PROCESS_ID=four must be whole numbers"),
        (HERE | {"JAXKD_PROCESS_ID": "4"}, "JAXKD_PROCESS_ID=4 is not one of JAXKD_NUM_PROCESSES=4 processes, which"),
        (HERE | {"JAXKD_COORDINATOR": "10.0.0.2"}, "JAXKD_COORDINATOR=10.0.0.2 must be HOST:PORT of process 0"),
        (
            {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"},
            "16 tasks on 2 nodes, but jaxkd was not started by srun",
        ),
        (TASK | {"SLURM_GPUS_PER_TASK": "1"}, "SLURM_GPUS_PER_TASK=1 hides the other GPUs .* without --gpus-per-task"),
        (TASK | {"CUDA_VISIBLE_DEVICES": "0"}, "this node has 8 tasks but each sees 1 of its GPUs: ask with --ntasks"),
        (
            TASK | {"SLURM_STEP_TASKS_PER_NODE": "8,1", "SLURM_LOCALID": "0"},
            "this node has 8 GPUs but 1 task, .* JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7 for one task on each node",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "mpirun started several processes, but not where they meet: set JAXKD_COORD"),
        (
            {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_PROCESS_ID": "1"},
            "JAX_COORDINATOR_ADDRESS=10.0.0.2:8476 and JAX_PROCESS_ID=1 would leave each process on its own: set JAXK",
        ),
        ({"SKYPILOT_NUM_NODES": "2"}, "SkyPilot started several processes, but not where they meet"),
    ],
)
def test_classic_mistakes(environ, sentence):
    with pytest.raises(ValueError, match=sentence):
        place(environ, "")


def test_one_process_of_a_slurm_job_may_evaluate_without_srun():
    """A batch script that trains with srun and then evaluates; started by srun, the tasks are counted all the same."""
    batch = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"}
    assert place(batch, "", alone=True) == Place("one")
    assert place(TASK, "", alone=True) == Place("slurm", "", 16, 9)


def test_tasks_of_a_slurm_job_without_gpus_are_not_held_to_them():
    bare = {name: value for name, value in TASK.items() if name != "CUDA_VISIBLE_DEVICES"}
    assert place(bare, "").size == 16
    assert place(TASK | {"CUDA_VISIBLE_DEVICES": "0"}, "cpu").size == 16
    assert place(TASK | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "JAX_LOCAL_DEVICE_IDS": "0,1"}, "").size == 16


@pytest.mark.parametrize("text", ["soon", "0", "-3"])
@pytest.mark.parametrize("name", ["JAXKD_JOIN_SECONDS", "JAXKD_HEARTBEAT_SECONDS"])
def test_patience_is_a_number(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: False)
    with pytest.raises(ValueError, match=f"{name}={text} must be a number of seconds"):
        cluster.join()


# --------------------------------------------------------------------------------------- roll call


@pytest.fixture
def address() -> str:
    return free_address()


def call(address, *indices, count=3, seconds=10.0, counts=None) -> list[str]:
    """What each process of a roll call is told; "" when all came."""
    told = [""] * len(indices)

    def one(slot, index):
        try:
            roll_call(Place("explicit", address, (counts or {}).get(index, count), index), seconds)
        except (OSError, ValueError) as error:
            told[slot] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(indices)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return told


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_come(address, order):
    assert call(address, *order) == ["", "", ""]


def test_whoever_is_missing_is_named_to_all(address):
    told = call(address, 0, 2, count=5, seconds=0.5)
    assert told[0] == told[1]
    assert told[0].startswith(f"Absent: of 5 processes, processes 1, 3, 4 did not come to {address} within 0.5 s")


def test_no_coordinator(address):
    [told] = call(address, 1, seconds=0.3)
    assert told.startswith(f"Absent: process 0 did not answer at JAXKD_COORDINATOR={address} within 0.3 s (Connection ")


def test_two_with_one_number(address):
    assert all("ValueError: two processes have JAXKD_PROCESS_ID=1: each" in told for told in call(address, 0, 1, 1))


def test_two_that_disagree_on_their_number(address):
    told = call(address, 0, 1, counts={1: 2})
    assert set(told) == {"ValueError: process 1 has JAXKD_NUM_PROCESSES=2, but process 0 has JAXKD_NUM_PROCESSES=3"}


def test_one_that_died_while_waiting_may_come_again_and_strangers_are_passed_over(address):
    waiting = threading.Thread(target=lambda: results.extend(call(address, 0, count=3)))
    results: list[str] = []
    waiting.start()
    time.sleep(0.2)
    host, port = address.split(":")
    for text in (b"GET / HTTP/1.0\r\n\r\n", json.dumps({"count": 3, "index": 1}).encode() + b"\n", b"[]\n"):
        with socket.create_connection((host, int(port))) as line:
            line.sendall(text)
            time.sleep(0.1)
    assert call(address, 1, 2) == ["", ""]
    waiting.join()
    assert results == [""]


def test_port_that_is_taken(address):
    with socket.create_server(("", int(address.split(":")[1]))):
        [told] = call(address, 0)
    assert "process 0 cannot listen at JAXKD_COORDINATOR=" + address in told
    assert "take another port, or end the job that has this one" in told


# ---------------------------------------------------------------------------------- real processes

PROGRAM = """
import os, sys
from jaxkd import main, processes
here = processes.join()
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
print(here.rank, jax.process_count(), multihost_utils.process_allgather(jnp.ones(())).sum(), os.environ["http_proxy"])
main.console()  # joins, too: a second time it does nothing
"""


def test_two_processes_join_past_a_dead_proxy_exchange_and_are_refused_together(address, tmp_path):
    """Both with the proxy variables of many clusters, which gRPC would wait for.

    Process 0 alone looks into the workdir, and refuses it: the other ends too, with its sentence and its code.
    """
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "notes.txt").write_text("mine")
    dead = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "x"}
    train = ["train", "--config", "configs/tiny.py", "--workdir", str(tmp_path / "w")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *train], cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=process_environment() | dead | {
                "JAX_PLATFORMS": "cpu", "JAXKD_COORDINATOR": address, "JAXKD_NUM_PROCESSES": "2",
                "JAXKD_PROCESS_ID": str(index),
            },
        )
        for index in range(2)
    ]  # fmt: skip
    for index, process in enumerate(started):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 1, errors
        assert output.splitlines()[-1] == f"{index} 2 2.0 http://127.0.0.1:9"  # gloo has a line of its own before
        assert f"jaxkd: process {index} of 2 (explicit)" in errors
        assert "detected proxy" not in errors
        who = "process 0 failed: " * index
        assert errors.splitlines()[-1].startswith(
            f"jaxkd: {who}error: {tmp_path / 'w'} is not empty and holds no jaxkd"
        )
        assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["notes.txt"]


def test_a_verb_that_waits_in_vain_asks_to_be_started_again(address, tmp_path):
    alone = process_environment() | {
        "JAXKD_COORDINATOR": address, "JAXKD_NUM_PROCESSES": "2", "JAXKD_PROCESS_ID": "0", "JAXKD_JOIN_SECONDS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "jaxkd", "train", "--config", "configs/tiny.py", "--workdir", str(tmp_path / "w")]
    done = subprocess.run(command, cwd=REPOSITORY, env=alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == cluster.ABSENT == os.EX_UNAVAILABLE
    assert done.stderr.startswith(f"jaxkd: error: of 2 processes, process 1 did not come to {address} within 1 s")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_what_jax_waits_for_too_long_is_given_up_in_one_sentence():
    """A wait inside JAX cannot be interrupted by an exception; the message and the code come all the same."""
    program = "import time\nfrom jaxkd import processes\nwith processes._patient('the hosts', 1): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert done.returncode == cluster.ABSENT
    assert done.stderr.startswith("jaxkd: error: the hosts did not all join within 1 s: look at the logs of the others")
