"""Process discovery: what the environment says, the roll call, and two real processes that join."""

import fnmatch
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from harness import REPOSITORY, free_address, process_environment, start

from jaxkd.runtime import cluster
from jaxkd.runtime.cluster import ProcessInfo, detect, roll_call

EXPLICIT = {"JAXKD_COORDINATOR": "10.0.0.2:8476", "JAXKD_NUM_PROCESSES": "4", "JAXKD_PROCESS_ID": "3"}
TASK = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[01-02]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"}
ONE, RANK_9 = ProcessInfo("one"), ProcessInfo("slurm", "", 16, 9)


@pytest.mark.parametrize(
    ("environ", "platforms", "expected"),
    [
        ({}, "", ONE),
        (EXPLICIT, "", ProcessInfo("explicit", "10.0.0.2:8476", 4, 3)),
        (EXPLICIT | TASK, "", ProcessInfo("explicit", "10.0.0.2:8476", 4, 3)),  # explicit variables win
        (EXPLICIT | {"JAXKD_COORDINATOR": "[fd00::2]:8476"}, "", ProcessInfo("explicit", "[fd00::2]:8476", 4, 3)),
        (EXPLICIT | {"JAXKD_NUM_PROCESSES": "1", "JAXKD_PROCESS_ID": "0"}, "", ONE),
        (TASK, "", RANK_9),
        (TASK, "cuda,cpu", RANK_9),
        (TASK | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "", ONE),  # one task uses all GPUs of its node
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}, "", ONE),
        (TASK | {"CUDA_VISIBLE_DEVICES": "0"}, "cpu", RANK_9),  # without GPUs there is nothing to check
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "JAX_LOCAL_DEVICE_IDS": "0,1"}, "", RANK_9),
        ({}, "tpu,cpu", ProcessInfo("gcetpu")),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", ONE),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", ProcessInfo("gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", ONE),  # `JAX_PLATFORMS=cpu` on a host of a TPU
        ({"TPU_WORKER_HOSTNAMES": "a,b"} | EXPLICIT, "proxy,cpu", ProcessInfo("pathways")),
        ({"SKYPILOT_NUM_NODES": "1"}, "", ONE),
    ],
)
def test_detect(environ, platforms, expected):
    assert detect(environ, platforms) == expected


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"JAXKD_PROCESS_ID": "0"}, "no JAXKD_COORDINATOR and no JAXKD_NUM_PROCESSES"),
        (EXPLICIT | {"JAXKD_PROCESS_ID": "four"}, "JAXKD_PROCESS_ID=four"),
        (EXPLICIT | {"JAXKD_PROCESS_ID": "4"}, "JAXKD_PROCESS_ID=4"),
        (EXPLICIT | {"JAXKD_COORDINATOR": "10.0.0.2"}, "JAXKD_COORDINATOR=10.0.0.2"),
        (BATCH, "srun"),
        (TASK | {"SLURM_GPUS_PER_TASK": "1"}, "SLURM_GPUS_PER_TASK=1"),
        (TASK | {"CUDA_VISIBLE_DEVICES": "0"}, "8 tasks but each sees 1"),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "8,1", "SLURM_LOCALID": "0"}, "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.2:8476"),
        ({"SKYPILOT_NUM_NODES": "2"}, "SKYPILOT_NUM_NODES=2"),
    ],
)
def test_contradictory_environments(environ, named):
    with pytest.raises(ValueError, match=named):
        detect(environ, "")


def test_a_slurm_batch_script_may_run_a_single_process_verb_without_srun():
    assert [detect(environ, "", single_ok=True) for environ in (BATCH, TASK)] == [ONE, RANK_9]


@pytest.mark.parametrize("text", ["soon", "0", "-3"])
@pytest.mark.parametrize("name", ["JAXKD_JOIN_SECONDS", "JAXKD_HEARTBEAT_SECONDS"])
def test_timeouts_are_numbers(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: False)
    with pytest.raises(ValueError, match=f"{name}={text}"):
        cluster.join()


@pytest.mark.parametrize(
    ("modules", "devices", "variables", "expected"),
    [
        ({"libtpu"}, [], {}, "cpu"),
        ({"libtpu"}, [], {"JAX_PLATFORMS": "proxy"}, "proxy"),
        ({"libtpu"}, ["/dev/accel0"], {}, None),
        ({"libtpu"}, [], {"TPU_WORKER_HOSTNAMES": "a,b"}, None),
        ({"libtpu", "jax_plugins"}, [], {}, None),  # GPUs
        (set(), [], {}, None),
    ],
)
def test_libtpu_is_not_loaded_on_a_machine_without_a_tpu(modules, devices, variables, expected, monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in modules or None)
    monkeypatch.setattr("glob.glob", lambda pattern: [d for d in devices if fnmatch.fnmatch(d, pattern)])
    cluster.avoid_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected


@pytest.fixture
def address() -> str:
    return free_address()


def call(address, *indices, count=3, seconds=10.0, counts=None) -> list[Exception | None]:
    """The error of each process in a roll call; None where all joined."""
    errors: list[Exception | None] = [None] * len(indices)

    def one(slot, index):
        try:
            roll_call(ProcessInfo("explicit", address, (counts or {}).get(index, count), index), seconds)
        except (OSError, ValueError) as error:
            errors[slot] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(indices)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_processes_join(address, order):
    assert call(address, *order) == [None, None, None]


def test_missing_processes_and_a_port_in_use_are_named(address):
    other = free_address()
    first, second = call(address, 0, 2, count=5, seconds=0.5)
    assert isinstance(first, cluster.Unavailable)
    assert str(first) == str(second)
    assert "1, 3, 4" in str(first)
    [error] = call(other, 1, seconds=0.3)
    assert isinstance(error, cluster.Unavailable)
    assert f"JAXKD_COORDINATOR={other}" in str(error)
    with socket.create_server(("", int(other.split(":")[1]))):
        [error] = call(other, 0)
    assert isinstance(error, OSError)
    assert f"JAXKD_COORDINATOR={other}" in str(error)


@pytest.mark.parametrize(
    ("indices", "counts", "named"), [((0, 1, 1), {}, "JAXKD_PROCESS_ID=1"), ((0, 1), {1: 2}, "JAXKD_NUM_PROCESSES=2")]
)
def test_contradictions_between_processes_are_refused_on_all(address, indices, counts, named):
    for error in call(address, *indices, counts=counts):
        assert isinstance(error, ValueError)
        assert named in str(error)


def test_a_process_that_died_may_connect_again_and_unrelated_clients_are_ignored(address):
    results: list = []
    coordinator = threading.Thread(target=lambda: results.extend(call(address, 0, count=3)))
    coordinator.start()
    time.sleep(0.2)
    host, port = address.split(":")
    for text in (b"GET / HTTP/1.0\r\n\r\n", json.dumps({"count": 3, "index": 1}).encode() + b"\n", b"[]\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(text)
            time.sleep(0.1)
    assert call(address, 1, 2) == [None, None]
    coordinator.join()
    assert results == [None]


PROGRAM = """
import os, sys
from jaxkd.cli import main
from jaxkd.runtime import cluster
info = cluster.join()
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
print(info.rank, jax.process_count(), multihost_utils.process_allgather(jnp.ones(())).sum(), os.environ["http_proxy"])
main.console()  # calls join again, which does nothing
"""


def test_two_processes_join_despite_proxy_variables_and_end_together(tmp_path):
    """gRPC would wait for the proxy. Process 0 alone refuses the workdir; both exit with its message and code."""
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "notes.txt").write_text("mine")
    dead = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "x"}
    train = ["train", "--config", "configs/tiny.py", "--workdir", str(tmp_path / "w")]
    for index, process in enumerate(start("-c", PROGRAM, *train, count=2, **dead)):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 1, errors
        assert output.splitlines()[-1] == f"{index} 2 2.0 http://127.0.0.1:9"  # Gloo prints a line before it
        assert f"jaxkd: process {index} of 2 (explicit)" in errors
        assert "detected proxy" not in errors
        last = errors.splitlines()[-1]
        assert last.startswith("jaxkd: " + "process 0 failed: " * index + "error: ")
        assert str(tmp_path / "w") in last
        assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["notes.txt"]


def test_a_verb_exits_with_69_when_the_others_do_not_join(address, tmp_path):
    alone = process_environment() | {
        "JAXKD_COORDINATOR": address, "JAXKD_NUM_PROCESSES": "2", "JAXKD_PROCESS_ID": "0", "JAXKD_JOIN_SECONDS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "jaxkd", "train", "--config", "configs/tiny.py", "--workdir", str(tmp_path / "w")]
    done = subprocess.run(command, cwd=REPOSITORY, env=alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == cluster.EXIT_UNAVAILABLE == os.EX_UNAVAILABLE
    assert address in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_wait_inside_jax_ends_with_one_sentence():
    """No exception can be raised in it."""
    program = (
        "import time\nfrom jaxkd.runtime.cluster import _exit_after\nwith _exit_after('the hosts', 1): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert done.returncode == cluster.EXIT_UNAVAILABLE
    assert done.stderr.startswith("jaxkd: error: the hosts")
    assert "JAXKD_JOIN_SECONDS" in done.stderr
