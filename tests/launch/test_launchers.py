"""The launchers: what they would run, which slices they know, how a babysitter decides, and where SIGTERM goes."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    from jaxkd.chips import topology

    for name, found in slices.items():
        t = topology(name)
        assert (t.name, t.chips, t.hosts, t.devices) == (
            f"{found['generation']}:{found['grid']}", int(found["chips"]), int(found["hosts"]), int(found["devices"])
        )  # fmt: skip


# --------------------------------------------------------------------------------------- babysitter

GCLOUD = """#!/bin/sh
echo "$@" | sed 's/ --zone=z//; s/compute tpus queued-resources //' >> "$PLACE/calls"
answer() { # the next line of a file; !WORDS is a failure
    line="$(head -n 1 "$PLACE/$1")"
    sed -i 1d "$PLACE/$1"
    case "$line" in
        NONE) line="!NOT_FOUND: Resource 'q' was not found" ;;
    esac
    case "$line" in
        "!"*) echo "ERROR: (gcloud.compute) ${line#!}" >&2 && exit 1 ;;
    esac
}
case "$*" in
    *describe*) answer states && echo "$line" ;;
    *"echo code"*) answer codes && echo "$line" | tr ' ' '\\n' | sed '/./s/^/code /' ;;
    *"queued-resources create"*) answer create ;;
    *"queued-resources delete"*) answer delete ;;
    *launch/host.sh*) answer run ;;
esac
"""
# Sixty naps are too many for these tests: a babysitter that comes to no end is ended.
SLEEP = """#!/bin/sh
echo "sleep $1" >> "$PLACE/calls"
[ "$(grep -c sleep "$PLACE/calls")" -lt 60 ] || kill $PPID
"""
KINDS = {
    "launch/setup.sh": "setup", "launch/host.sh": "run", "echo code": "codes",
    "kill -TERM": "term", "kill -KILL": "kill",
}  # fmt: skip


@pytest.fixture
def cloud(tmp_path):
    """babysit(states, codes, *options, create=, delete=, run=), with two hosts: gcloud says these, a line a call.

    Gives the result and what was done, looks at the state left out; with naps=True each nap, too.
    """
    programs = {"gcloud": GCLOUD, "sleep": SLEEP, "git": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def babysit(states: list[str], codes: list[str], *options: str, naps: bool = False, **failures: list[str]):
        said = {"states": states, "codes": codes, "calls": [], "create": [], "delete": [], "run": []} | failures
        for name, answers in said.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in answers))
        done = bash(
            f"bash launch/tpu_vm.sh babysit --name q --zone z --accelerator v5p-16 {' '.join(options)} -- train --x",
            PATH=f"{tmp_path}:{os.environ['PATH']}", PLACE=str(tmp_path), TMPDIR=str(tmp_path),
        )  # fmt: skip
        verbs = [
            next((kind for mark, kind in KINDS.items() if mark in line), line.split()[0])
            for line in (tmp_path / "calls").read_text().splitlines()
        ]
        return done, [verb for verb in verbs if verb not in ("describe", "alpha") and (naps or verb != "sleep")]

    return babysit


START = ["codes", "setup", "run"]  # a look whether a run is going on comes before


def test_babysit_brings_a_run_to_its_end(cloud):
    done, verbs = cloud(
        ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
        ["lost lost", "running running", "running 0", "0 0"],
    )
    assert done.returncode == 0, done.stderr
    assert verbs == ["create", *START, "codes", "codes", "codes", "delete"]


def test_babysit_starts_again_what_was_stopped_or_killed(cloud):
    ends = ["75 75", "134 lost", "70 69", "0 0"]
    looks = [look for before, end in zip(["lost lost", *ends], ends) for look in (before, end)]
    done, verbs = cloud(["ACTIVE"] * 4, looks, "--retries 2", "--keep")
    assert done.returncode == 0, done.stderr
    assert verbs == [*START, "codes"] * 4
    assert "retry 0 of 2" in done.stderr  # after code 75, which costs none


def test_babysit_asks_anew_for_what_was_preempted(cloud):
    done, verbs = cloud(
        ["ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "ACTIVE"],
        ["lost lost", "running running", "!no such host", "lost lost", "0 0"],
    )
    assert done.returncode == 0, done.stderr
    assert verbs == [*START, "codes", "codes", "delete", "create", *START, "codes", "delete"]


@pytest.mark.parametrize(("codes", "code"), [("1 70", 1), ("134 2", 2), ("130 130", 130)])
def test_babysit_stops_at_an_error_and_keeps_the_slices_to_look_at(cloud, codes, code):
    done, verbs = cloud(["ACTIVE"], ["lost lost", codes])
    assert (done.returncode, verbs) == (code, [*START, "codes"])
    assert f"ended with code {code}, which another start would not mend" in done.stderr


def test_babysit_gives_up(cloud):
    done, verbs = cloud(["ACTIVE"] * 3, ["137 137"] * 5, "--retries 1")
    assert done.returncode == 1
    assert verbs == [*START, "codes"] * 2
    assert "gave up after 1 retries; the last ended with 137" in done.stderr


def test_babysit_attaches_to_a_run_that_is_going_on(cloud):
    """One host that says so is enough: code must not be put under a run."""
    done, verbs = cloud(["ACTIVE", "ACTIVE"], ["running", "running running", "0 0"])
    assert done.returncode == 0, done.stderr
    assert verbs == ["codes", "codes", "codes", "delete"]
    assert "a run is going on: attached to it" in done.stderr


def test_babysit_outlives_a_network_that_is_down(cloud):
    """A look that failed says nothing of the slices: they are neither asked for anew, nor set up again."""
    down = ["!Unable to find the server"] * 3
    done, verbs = cloud(
        [*down, "ACTIVE", *down, "ACTIVE"],
        ["lost lost", "running running", "!unreachable", "0 0"],
        "--poll 7",
        naps=True,
    )
    assert done.returncode == 0, done.stderr
    pause = ["sleep", "codes"]
    assert verbs == ["sleep"] * 3 + START + pause * 2 + ["sleep"] * 3 + pause + ["delete"]
    sentence = "gcloud did not say how q is, asked again in 7 s: ERROR: (gcloud.compute) Unable to find the server"
    assert done.stderr.count(sentence) == 6


def test_babysit_sets_up_nothing_while_a_host_does_not_answer(cloud):
    done, verbs = cloud(["ACTIVE"] * 2, ["lost", "lost lost", "0 0"], naps=True)
    assert done.returncode == 0, done.stderr
    assert verbs == ["codes", "sleep", *START, "sleep", "codes", "delete"]
    assert "of 2 hosts, 1 answered" in done.stderr


def test_a_run_is_done_when_all_hosts_say_so(cloud):
    done, verbs = cloud(["ACTIVE"] * 2, ["lost lost", "0", "0 1"])
    assert (done.returncode, verbs) == (1, [*START, "codes", "codes"])


def test_every_failed_start_is_followed_by_a_nap(cloud):
    done, verbs = cloud(["ACTIVE"] * 3, ["lost lost"] * 3, "--retries 2", naps=True, run=["!connection lost"] * 3)
    assert done.returncode == 1
    assert verbs == [*START, "sleep", *START, "sleep", *START]
    assert "gave up after 2 retries; the last ended with 255" in done.stderr


def test_babysit_tries_again_to_create_and_to_delete(cloud):
    done, verbs = cloud(
        ["NONE", "NONE", "FAILED", "FAILED", "NONE", "ACTIVE"], ["lost lost", "0 0"], naps=True,
        create=["!UNAVAILABLE: later", "!ALREADY_EXISTS: Resource 'q' already exists"],
        delete=["!FAILED_PRECONDITION: in use", "", "!UNAVAILABLE: later", "NONE"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before = [word for verb in ("create", "create", "delete", "delete", "create") for word in (verb, "sleep")]
    assert verbs == [*before, *START, "sleep", "codes", "delete", "sleep", "delete"]
    assert "(gcloud.compute) ALREADY_EXISTS: Resource 'q' already exists" in done.stderr
    assert "create failed, looked at again in 60 s" in done.stderr


@pytest.mark.parametrize(("verb", "states"), [("create", ["NONE"]), ("delete", ["FAILED"]), ("describe", None)])
@pytest.mark.parametrize("words", ["PERMISSION_DENIED: tpu.nodes", "INVALID_ARGUMENT: no such type"])
def test_babysit_ends_at_what_no_repetition_mends(cloud, verb, states, words):
    refused = [f"!{words}"]
    done, verbs = cloud(states or refused, [], naps=True, **({verb: refused} if states else {}))
    assert (done.returncode, verbs) == (1, [verb] if states else [])
    assert f"gcloud cannot {verb} q, however often it is asked" in done.stderr
    assert done.stderr.endswith(f"ERROR: (gcloud.compute) {words}\n")


def test_a_run_that_some_hosts_lost_is_ended_and_started_again(cloud):
    """A VM that was made anew has no .launch, and the others wait for it in a collective."""
    torn = ["running lost"] * 3
    done, verbs = cloud(
        ["ACTIVE"] * 2, ["lost lost", "running running", *torn, "running lost", "75 lost", "75 lost", "0 0"]
    )
    assert done.returncode == 0, done.stderr
    assert verbs == [*START, *["codes"] * 4, "term", "codes", "codes", *START, "codes", "delete"]


def test_a_host_that_lost_the_run_is_looked_at_three_times(cloud):
    done, verbs = cloud(["ACTIVE"], ["lost lost", *["running lost"] * 2, "running 0", *["running lost"] * 2, "0 0"])
    assert done.returncode == 0, done.stderr
    assert verbs == [*START, *["codes"] * 6, "delete"]


HOSTS = """#!/bin/sh
set -e
for word; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
case "$*" in *describe*) echo ACTIVE ;; esac
[ -n "$command" ] || exit 0
for host in "$PLACE"/hosts/*; do
    case "$command" in
        *launch/setup.sh*) mkdir -p "$host/jaxkd" && cp -R "$PLACE/launch" "$PLACE/.venv" "$host/jaxkd" ;;
        *) (cd "$host" && PLACE="$host" bash -c "$command") ;;
    esac
done
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_babysit_asks_of_hosts(copy, stubborn):
    """Its commands, run from the home of hosts with a real detached run: one has it, the other was made anew."""
    first, second = copy / "hosts/a", copy / "hosts/b"
    for host in (first, second):
        host.mkdir(parents=True)
    (second / "ready").touch()  # its run will end at once, as that of the first will when it is started again
    if stubborn:
        (first / "stubborn").touch()
    nap = 0.1 if stubborn else 0.5  # the grace is ten naps: enough to save, or soon over
    sleep = f"#!/bin/sh\nexec {shutil.which('sleep')} {nap}\n"
    programs = {"gcloud": HOSTS, "sleep": sleep, "git": "#!/bin/sh\n"}
    for name, text in programs.items():
        (copy / name).write_text(text)
        (copy / name).chmod(0o755)
    (first / "jaxkd").mkdir()
    for name in ("launch", ".venv"):
        shutil.copytree(copy / name, first / "jaxkd" / name)
    start = ["bash", "jaxkd/launch/host.sh", "--background", ".launch", "--", "train"]
    subprocess.run(start, cwd=first, env=environment(copy, PLACE=str(first)), check=True, capture_output=True)
    until(first / "ready")
    command = "bash launch/tpu_vm.sh babysit --name q --zone z --accelerator v5p-16 -- train"
    done = bash(command, **environment(copy, TMPDIR=str(copy)))
    assert done.returncode == 0, done.stderr
    assert "some hosts run and wait for others that have lost the run" in done.stderr
    assert ("it did not end within 600 s: killed" in done.stderr) == stubborn
    assert ((first / "saved").exists(), (first / "let be").exists()) == (not stubborn, False)
    assert [(host / "jaxkd/.launch/run.code").read_text() for host in (first, second)] == ["0\n", "0\n"]


# ------------------------------------------------------------------------------------------- SIGTERM

RUN = """\
import os, pathlib, signal, sys, time
place = pathlib.Path(os.environ["PLACE"])
if (place / "ready").exists():
    raise SystemExit(0)  # started again: nothing is left to do
def save(*_):
    time.sleep(0.3)  # a save takes its time, and must be let
    (place / "saved").write_text(" ".join(sys.argv[1:]))
    raise SystemExit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if (place / "stubborn").exists() else save)
(place / "flags").write_text(os.environ.get("LIBTPU_INIT_ARGS", ""))
(place / "ready").touch()
time.sleep(20)
(place / "let be").touch()
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the launchers beside a jaxkd that saves when it is told to stop, and SLURM's two commands."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    # A shebang can name no interpreter whose path has a space.
    interpreted = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / "run.py"))} "$@"\n'
    programs = {
        "run.py": RUN,
        ".venv/bin/jaxkd": interpreted,
        "srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
        "scontrol": '#!/bin/sh\necho "scontrol $*"\n',
    }
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def until(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not (path.exists() and (path.read_text() or path.name == "ready")):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)
    return path.read_text()


def environment(copy: Path, **more: str) -> dict[str, str]:
    return CLEAN | {"PLACE": str(copy), "PATH": f"{copy}:{os.environ['PATH']}"} | more


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
