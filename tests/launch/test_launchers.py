"""The launchers: what they would run, which slices they know, and where SIGTERM goes."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LAUNCH, ROOT, bash, environment, until

SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
TRANSCRIPT = Path(__file__).with_name("transcript.txt")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="bash scripts")


# ---------------------------------------------------------------------------------- what is written


def test_shell_scripts_are_clean():
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # .venv need not be activated
    if (shellcheck := shutil.which("shellcheck", path=beside)) is None:
        pytest.skip("shellcheck is not installed: bash launch/setup.sh test brings it")
    done = subprocess.run([shellcheck, "-x", "-P", LAUNCH, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(subprocess.run(["bash", "-n", script]).returncode == 0 for script in SCRIPTS)


def blocks() -> dict[str, str]:
    text = TRANSCRIPT.read_text(encoding="utf-8")
    return dict(re.findall(r"^\$ (.*)\n((?:(?!\$ bash ).*\n)*)", text, re.M))


@pytest.mark.parametrize("command", blocks())
def test_transcript(command):
    """What --dry-run prints, and what is said of mistakes, is what tests/launch/transcript.txt shows.

    When it moves on purpose, put what is printed there; a `gcloud` line can be held against gcloud itself with
    `gcloud meta lint-gcloud-commands --command-string`.
    """
    done = bash(command)
    code = f"(exit {done.returncode})\n" if done.returncode else ""
    said = (done.stderr + done.stdout).replace(str(ROOT), "ROOT").replace("'ROOT/launch/..'", "ROOT/launch/..")
    assert said + code == blocks()[command].rstrip("\n") + "\n"


# ---------------------------------------------------------------------------------------- its maths

NAMES = {  # Google's pages on each generation: chips, hosts, JAX devices
    "v4-8": (4, 1, 4), "v4-16": (8, 2, 8), "v4-512": (256, 64, 256), "v5litepod-1": (1, 1, 1),
    "v5litepod-8": (8, 1, 8), "v5litepod-16": (16, 4, 16), "v5e-256": (256, 64, 256), "v5p-8": (4, 1, 4),
    "v5p-128": (64, 16, 64), "v5p:4x4x12": (192, 48, 192), "v6e-8": (8, 1, 8), "V6E-16": (16, 4, 16),
    "v6e:16x16": (256, 64, 256), "tpu7x-8": (4, 1, 8), "tpu7x-4x4x4": (64, 16, 128), "v7x-128": (64, 16, 128),
}  # fmt: skip


@pytest.fixture(scope="module")
def slices() -> dict[str, dict[str, str]]:
    """Every name, as the shell reads it."""
    words = "$generation $grid $chips $hosts $devices $chips_per_host"
    show = "".join(f"(accelerator {name}; echo {name} {words}; echo $sentence)\n" for name in NAMES)
    done = bash(f"set -eu; cd launch; . ./commands.sh; . ./accelerators.sh; {show}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    keys = ("generation", "grid", "chips", "hosts", "devices", "per_host")
    return {
        head.split()[0]: dict(zip(keys, head.split()[1:])) | {"sentence": said}
        for head, said in zip(lines[::2], lines[1::2], strict=True)
    }


def test_chips_hosts_and_devices(slices):
    assert {n: tuple(int(s[k]) for k in ("chips", "hosts", "devices")) for n, s in slices.items()} == NAMES
    assert all(int(s["per_host"]) * int(s["hosts"]) == int(s["chips"]) for s in slices.values())


def test_what_a_number_counts_is_said_where_it_is_not_chips(slices):
    said = {name for name, s in slices.items() if "counts TensorCores, 2 a chip, not chips" in s["sentence"]}
    assert said == {"v4-8", "v4-16", "v4-512", "v5p-8", "v5p-128", "tpu7x-8", "v7x-128"}


def test_the_planner_knows_the_same_slices(slices):
    from jaxkd.planning.topology import topology

    for name, found in slices.items():
        t = topology(name)
        assert (t.name, t.chips, t.hosts, t.devices) == (
            f"{found['generation']}:{found['grid']}", int(found["chips"]), int(found["hosts"]), int(found["devices"])
        )  # fmt: skip


# ------------------------------------------------------------------------------------------- SIGTERM


def test_sigterm_to_host_reaches_the_run(copy):
    command = ["bash", "launch/host.sh", "--chip", "v5e", "--", "train", "--x", "a b"]
    flags = environment(copy, LIBTPU_INIT_ARGS="--mine=1")
    with subprocess.Popen(command, cwd=copy, env=flags) as process:
        until(copy / "ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75
    assert (copy / "saved").read_text() == "train --x a b"
    assert (copy / "flags").read_text().endswith("--xla_tpu_data_parallel_opt_different_sized_ops=true --mine=1")


def test_a_detached_run_saves_at_sigterm_and_leaves_its_code(copy):
    # from the folder that the repository lies in, as over ssh
    start = ["bash", f"{copy.name}/launch/host.sh", "--background", ".launch", "--chip", "v6e", "--", "train"]
    done = subprocess.run(start, cwd=copy.parent, env=environment(copy), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    until(copy / "ready")
    assert "scoped_vmem_limit_kib=98304" in until(copy / "flags")
    again = subprocess.run(start, cwd=copy.parent, env=environment(copy), capture_output=True, text=True)
    assert again.returncode == 1
    assert "a run is going on here, process" in again.stderr
    os.kill(int((copy / ".launch/run.pid").read_text()), signal.SIGTERM)
    assert until(copy / ".launch/run.code") == "75\n"
    assert (copy / "saved").read_text() == "train"


@pytest.mark.parametrize(("restarts", "end"), [("0", "scontrol requeue 77"), ("50", None)])
def test_sigterm_to_a_batch_script_saves_and_queues_again(copy, restarts, end):
    slurm = environment(copy, SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(copy), SLURM_RESTART_COUNT=restarts)
    command = ["bash", "launch/slurm.sbatch", "train"]
    with subprocess.Popen(command, cwd=copy, env=slurm, stdout=subprocess.PIPE, text=True) as process:
        until(copy / "ready")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert (copy / "saved").read_text() == "train"
    assert process.returncode == (0 if end else 75)
    assert output.splitlines()[-1:] == ([end] if end else [])


def test_the_nodes_of_skypilot_become_processes():
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5"}
    done = bash("bash launch/host.sh --dry-run -- train", **sky, SKYPILOT_NUM_GPUS_PER_NODE="8")
    settings = ["JAXKD_COORDINATOR=10.0.0.4:8476", "JAXKD_NUM_PROCESSES=2", "JAXKD_PROCESS_ID=1"]
    assert shlex.split(done.stdout) == ["env", *settings, ".venv/bin/jaxkd", "train"]
    alone = bash("bash launch/host.sh --dry-run -- train", **sky)  # on TPUs JAX finds them
    assert shlex.split(alone.stdout) == ["env", ".venv/bin/jaxkd", "train"]


# --------------------------------------------------------------------------------------------- flags


def chip_flags(chip: str) -> dict[str, str]:
    """What host.sh sets for a chip."""
    done = bash(f"bash launch/host.sh --chip {chip} --dry-run -- train")
    return dict(word.split("=", 1) for word in shlex.split(done.stdout)[1:-2])


def started(program: str, settings: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )


def test_flags_for_gpus_are_flags_of_this_xla():
    """The CPU's XLA knows all of them, and ends a process at one that it does not know."""
    settings = chip_flags("gpu")
    assert settings["XLA_FLAGS"].count("--xla_gpu_") == 3
    program = "import jax; assert jax.config.jax_optimization_level == 'O1'; print(jax.devices())"
    done = started(program, settings | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-1000:]


TPU = """
import jax, numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(get_topology_desc(topology_name="TOPOLOGY", platform="tpu").devices), ("d",))
a = jax.ShapeDtypeStruct((1024, 1024), "float32", sharding=NamedSharding(mesh, P("d")))
jax.jit(lambda x: (x @ x).sum()).lower(a).compile()
"""
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def test_every_chip_has_flags():
    assert {path.stem for path in (LAUNCH / "flags").iterdir()} == {*TOPOLOGIES, "gpu"}


@pytest.mark.tpu
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_flags_for_tpus_are_flags_of_this_libtpu(chip):
    """libtpu ends a process at a flag that it does not know; the sharded product is compiled with them, too."""
    nowhere = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = started(TPU.replace("TOPOLOGY", TOPOLOGIES[chip]), chip_flags(chip) | nowhere | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-1000:]
