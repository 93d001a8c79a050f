"""The launchers: the commands they print, and one imitated job for each of them."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from harness import program

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
TRANSCRIPT = Path(__file__).with_name("transcript.txt")
CLEAN = {"PATH": os.environ["PATH"], "HOME": "/", "TMPDIR": "TMP"}
pytestmark = pytest.mark.skipif(os.name != "posix", reason="bash scripts")


def bash(command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=CLEAN | environment, capture_output=True, text=True, timeout=60
    )


def test_shell_scripts_are_clean():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # .venv need not be activated
    if (shellcheck := shutil.which("shellcheck", path=path)) is None:
        pytest.skip("shellcheck is not installed: bash launch/setup.sh test brings it")
    done = subprocess.run([shellcheck, "-x", "-P", LAUNCH, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(subprocess.run(["bash", "-n", script]).returncode == 0 for script in SCRIPTS)


def blocks() -> dict[str, str]:
    """Command -> what it prints, from the transcript."""
    text = TRANSCRIPT.read_text(encoding="utf-8")
    return dict(re.findall(r"^\$ (.*)\n((?:(?!\$ bash ).*\n)*)", text, re.M))


@pytest.mark.parametrize("command", blocks())
def test_transcript(command):
    """What --dry-run prints, and the messages about mistakes, are those of tests/launch/transcript.txt.

    When they change on purpose, put the new text there; a `gcloud` line can be checked by gcloud itself with
    `gcloud meta lint-gcloud-commands --command-string`.
    """
    done = bash(command)
    code = f"(exit {done.returncode})\n" if done.returncode else ""
    printed = (done.stderr + done.stdout).replace(str(ROOT), "ROOT").replace("'ROOT/launch/..'", "ROOT/launch/..")
    assert printed + code == blocks()[command].rstrip("\n") + "\n"


NAMES = {  # chips, hosts, JAX devices, from Google's pages on each generation
    "v4-8": (4, 1, 4), "v4-16": (8, 2, 8), "v4-512": (256, 64, 256), "v5litepod-1": (1, 1, 1),
    "v5litepod-8": (8, 1, 8), "v5litepod-16": (16, 4, 16), "v5e-256": (256, 64, 256), "v5p-8": (4, 1, 4),
    "v5p-128": (64, 16, 64), "v5p:4x4x12": (192, 48, 192), "v6e-8": (8, 1, 8), "V6E-16": (16, 4, 16),
    "v6e:16x16": (256, 64, 256), "tpu7x-8": (4, 1, 8), "tpu7x-4x4x4": (64, 16, 128), "v7x-128": (64, 16, 128),
}  # fmt: skip


def test_slices_are_those_of_the_planner():
    from jaxkd.planning.topology import topology

    show = "".join(f"(accelerator {n}; echo {n} $generation:$grid $chips $hosts $devices)\n" for n in NAMES)
    done = bash(f"set -eu; cd launch; . ./commands.sh; . ./accelerators.sh; {show}")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, grid, *numbers = line.split()
        assert tuple(map(int, numbers)) == NAMES[name]
        t = topology(name)
        assert (t.name, t.chips, t.hosts, t.devices) == (grid, *NAMES[name])


def test_the_jobset_is_valid_and_restarts_by_exit_code():
    """The job by Kubernetes' own schema; the rules in the order in which Kubernetes and JobSet evaluate them."""
    validate = pytest.importorskip("kubernetes_validate", reason="bash launch/setup.sh test brings it")
    command = next(command for command in blocks() if command.startswith("bash launch/gke.sh render"))
    jobset = yaml.safe_load("".join(blocks()[command].partition("# A JobSet")[1:]))
    spec = jobset["spec"]
    template = spec["replicatedJobs"][0]["template"]
    validate.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **template}, "1.33", strict=True
    )

    def action(code: int, disrupted: bool = False) -> str:
        for number, rule in enumerate(template["spec"]["podFailurePolicy"]["rules"]):
            if code in rule.get("onExitCodes", {}).get("values", ()) or (disrupted and "onPodConditions" in rule):
                message = f"container failed with exit code {code} matching FailJob rule at index {number}"
                for candidate in spec["failurePolicy"]["rules"]:
                    patterns = candidate.get("onJobFailureMessagePatterns", [""])
                    if any(re.search(pattern, message) for pattern in patterns):
                        return candidate["action"]
        return "RestartJobSet"  # the default, within maxRestarts

    assert [action(code) for code in (1, 2)] == ["FailJobSet"] * 2
    assert [action(75), action(137, True), action(1, True)] == ["RestartJobSetAndIgnoreMaxRestarts"] * 3
    assert [action(code) for code in (69, 70, 134, 137)] == ["RestartJobSet"] * 4


def test_skypilot_and_the_container_call_the_launchers():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [69, 70, 75]
    assert all(subprocess.run(["bash", "-n", "-c", task[part]]).returncode == 0 for part in ("setup", "run"))
    command = task["run"].replace("launch/host.sh", "launch/host.sh --dry-run")
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5"}
    variables = {name: str(value) for name, value in task["envs"].items()} | nodes | {"JAXKD_CHIP": ""}
    assert bash(command, **variables).returncode == 2
    variables |= {"JAXKD_RUN": "train --config 'a b.py'"}
    train = [".venv/bin/jaxkd", "train", "--config", "a b.py"]
    assert shlex.split(bash(command, **variables).stdout) == ["env", *train]  # on TPUs JAX detects the hosts
    settings = ["JAXKD_COORDINATOR=10.0.0.4:8476", "JAXKD_NUM_PROCESSES=2", "JAXKD_PROCESS_ID=1"]
    done = bash(command, **variables, SKYPILOT_NUM_GPUS_PER_NODE="8")
    assert shlex.split(done.stdout) == ["env", *settings, *train]
    text = (LAUNCH / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"launch/setup\.sh (.*)", text):
        assert set(names.split()) <= set(extras)
    for sources in re.findall(r"^COPY (.*)", text, re.M):
        assert all((ROOT / source).exists() for source in sources.split()[:-1]), sources


RUN = """\
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["PLACE"])
if (folder / "ready").exists():
    raise SystemExit(int((folder / "ready").read_text() or 0))  # started again: nothing is left to do
def save(*_):
    time.sleep(0.3)  # a save takes time, and must not be killed
    (folder / "saved").write_text(" ".join(sys.argv[1:]))
    raise SystemExit(75)
signal.signal(signal.SIGTERM, save)
(folder / "flags").write_text(os.environ.get("LIBTPU_INIT_ARGS", ""))
(folder / "ready").touch()
time.sleep(60)
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    """The launchers beside a jaxkd that saves on SIGTERM, and SLURM's two commands."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "run.py").write_text(RUN)
    # A shebang can name no interpreter whose path has a space.
    interpreted = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / "run.py"))} "$@"\n'
    program(tmp_path / ".venv/bin/jaxkd", interpreted)
    program(tmp_path / "srun", '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    program(tmp_path / "scontrol", '#!/bin/sh\necho "scontrol $*"\n')
    return tmp_path


def until(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.read_text() or path.name == "ready")):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)
    return path.read_text()


def environment(copy: Path, **more: str) -> dict[str, str]:
    return CLEAN | {"PLACE": str(copy), "PATH": f"{copy}:{os.environ['PATH']}"} | more


def test_host_hands_sigterm_on_and_leaves_the_code_of_a_detached_run(copy):
    command = ["bash", "launch/host.sh", "--chip", "v5e", "--", "train", "--x", "a b"]
    with subprocess.Popen(command, cwd=copy, env=environment(copy, LIBTPU_INIT_ARGS="--mine=1")) as process:
        until(copy / "ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75
    assert (copy / "saved").read_text() == "train --x a b"
    assert (copy / "flags").read_text().endswith("--xla_tpu_data_parallel_opt_different_sized_ops=true --mine=1")
    for name in ("ready", "saved", "flags"):
        (copy / name).unlink()
    # From the directory that contains the repository, as over ssh.
    start = ["bash", f"{copy.name}/launch/host.sh", "--background", ".launch", "--chip", "v6e", "--", "train"]
    run = lambda: subprocess.run(start, cwd=copy.parent, env=environment(copy), capture_output=True, text=True)
    assert run().returncode == 0
    until(copy / "ready")
    assert "scoped_vmem_limit_kib=98304" in until(copy / "flags")
    assert run().returncode == 1  # a run is going on
    os.kill(int((copy / ".launch/run.pid").read_text()), signal.SIGTERM)
    assert until(copy / ".launch/run.code") == "75\n"
    assert (copy / "saved").read_text() == "train"
    (copy / ".launch/run.pid").write_text(str(os.getpid()))  # visible as one that nobody has collected
    assert run().returncode == 0
    assert until(copy / ".launch/run.code") == "0\n"


@pytest.mark.parametrize(("restarts", "last"), [("0", ["scontrol requeue 77"]), ("50", [])])
def test_a_slurm_job_saves_on_sigterm_and_requeues(copy, restarts, last):
    slurm = environment(copy, SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(copy), SLURM_RESTART_COUNT=restarts)
    command = ["bash", "launch/slurm.sbatch", "train"]
    with subprocess.Popen(command, cwd=copy, env=slurm, stdout=subprocess.PIPE, text=True) as process:
        until(copy / "ready")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert (copy / "saved").read_text() == "train"
    assert process.returncode == (0 if last else 75)
    assert output.splitlines()[-1:] == last


GCLOUD = """#!/bin/sh
# Answers a verb with the next line of a file of its name, "!TEXT" as a failure; runs ssh commands on all hosts.
for word; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
verb="$(echo "$*" | grep -o -m 1 -E 'describe|queued-resources create|queued-resources delete' | tail -n 1)"
[ -z "$verb" ] || echo "${verb##* }" >>"$PLACE/calls"
line="$(head -n 1 "$PLACE/${verb##* }.txt" 2>/dev/null)"
[ -z "$verb" ] || sed -i 1d "$PLACE/${verb##* }.txt"
case "$line" in "!"*) echo "ERROR: (gcloud.compute) ${line#!}" >&2 && exit 1 ;; *) echo "$line" ;; esac
[ -n "$command" ] || exit 0
case "$command" in *launch/setup.sh*) echo setup >>"$PLACE/calls" ;; esac
for host in "$PLACE"/hosts/*; do
    case "$command" in
        *launch/setup.sh*) mkdir -p "$host/jaxkd" && cp -R "$PLACE/launch" "$PLACE/.venv" "$host/jaxkd" ;;
        *) (cd "$host" && PLACE="$host" bash -c "$command") ;;
    esac
done
"""


def test_babysit_brings_a_run_to_its_end(copy):
    """Two hosts, of which one has lost a run that goes on on the other; then a preemption; then an error."""
    first, second = copy / "hosts/a", copy / "hosts/b"
    for host in (first, second):
        host.mkdir(parents=True)
    (second / "ready").touch()  # its run ends at once, as that of the first when it is started again
    program(copy / "gcloud", GCLOUD)
    program(copy / "git", "#!/bin/sh\n")
    program(copy / "sleep", f"#!/bin/sh\nexec {shutil.which('sleep')} 0.3\n")
    for name in ("launch", ".venv"):
        shutil.copytree(copy / name, first / "jaxkd" / name)
    start = ["bash", "jaxkd/launch/host.sh", "--background", ".launch", "--", "train"]
    subprocess.run(start, cwd=first, env=environment(copy, PLACE=str(first)), check=True, capture_output=True)
    until(first / "ready")
    gone = "!NOT_FOUND: Resource 'q' was not found"
    answers = {
        "describe": ["!Unable to find the server", "ACTIVE", "SUSPENDED", gone, gone, "PROVISIONING", "ACTIVE"],
        "create": ["!UNAVAILABLE: later", ""],
        "delete": ["", "!FAILED_PRECONDITION: in use", ""],
    }
    for verb, lines in answers.items():
        (copy / f"{verb}.txt").write_text("".join(f"{line}\n" for line in lines))
    command = "bash launch/tpu_vm.sh babysit --name q --zone z --accelerator v5p-16 -- train"
    done = bash(command, **environment(copy, TMPDIR=str(copy)))
    assert done.returncode == 0, done.stderr
    calls = (copy / "calls").read_text().split()
    # A failed call is no answer; the run is attached to, ended with SIGTERM, and started again on new slices.
    assert calls == [
        *["describe"] * 3, "delete", "describe", "create", "describe", "create", *["describe"] * 2, "setup",
        *["delete"] * 2,
    ]  # fmt: skip
    assert "attached to it" in done.stderr
    assert (first / "saved").exists()
    assert [(host / "jaxkd/.launch/run.code").read_text() for host in (first, second)] == ["0\n", "0\n"]
    (second / "ready").write_text("2")
    (copy / "describe.txt").write_text("ACTIVE\n")
    (copy / "calls").write_text("")
    for host in (first, second):
        shutil.rmtree(host / "jaxkd")
    done = bash(command, **environment(copy, TMPDIR=str(copy)))
    assert done.returncode == 2, done.stderr  # an error that no restart corrects keeps the slices
    assert (copy / "calls").read_text().split() == ["describe", "setup"]


TPU = """
import jax, numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(get_topology_desc(topology_name="TOPOLOGY", platform="tpu").devices), ("d",))
a = jax.ShapeDtypeStruct((1024, 1024), "float32", sharding=NamedSharding(mesh, P("d")))
jax.jit(lambda x: (x @ x).sum()).lower(a).compile()
"""
GPU = "import jax; assert jax.config.jax_optimization_level == 'O1'; print(jax.devices())"
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def run_with_flags(chip: str, code: str) -> None:
    """Run Python code with the settings of host.sh; XLA and libtpu abort on a flag that they do not know."""
    printed = bash(f"bash launch/host.sh --chip {chip} --dry-run -- train").stdout
    settings = dict(word.split("=", 1) for word in shlex.split(printed)[1:-2])
    no_tpu = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    variables = {**os.environ, **settings, **no_tpu, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]


def test_every_chip_has_flags_and_those_for_gpus_are_known_to_xla():
    assert {path.stem for path in (LAUNCH / "flags").iterdir()} == {*TOPOLOGIES, "gpu"}
    run_with_flags("gpu", GPU)


@pytest.mark.tpu
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_flags_for_tpus_are_known_to_libtpu(chip):
    run_with_flags(chip, TPU.replace("TOPOLOGY", TOPOLOGIES[chip]))
