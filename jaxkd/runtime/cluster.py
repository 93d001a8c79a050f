"""How the processes of a job find each other: `jax.distributed`, started in every run and for one process too."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Exit codes, as sysexits.h names them, on which launchers start the same command again; 0, 1 and 2 they leave alone.
ABSENT = 69
"""EX_UNAVAILABLE: other processes of the job did not come, or storage did not answer."""
UNFORESEEN = 70
"""EX_SOFTWARE: an error that has no sentence of its own, such as a host that was lost in the middle of a step."""
STOPPED = 75
"""EX_TEMPFAIL: stopped by a signal, with everything saved."""
INTERRUPTED = 130
"""Ctrl-C, as shells count it, on which launchers start nothing again."""

COORDINATOR, COUNT, INDEX = VARIABLES = ("JAXKD_COORDINATOR", "JAXKD_NUM_PROCESSES", "JAXKD_PROCESS_ID")
PATIENCE = "JAXKD_JOIN_SECONDS"
HEARTBEAT = "JAXKD_HEARTBEAT_SECONDS"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# What starts processes without telling JAX where they meet: the variable that counts them.
_OTHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "SKYPILOT_NUM_NODES": "SkyPilot"}
_HOW = f"set {', '.join(VARIABLES[:2])} and {VARIABLES[2]} in each of them"
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")  # of which JAX reads the first, and not here


class Unavailable(OSError):
    """What the job needs is not there just now; the same command may find it."""


class Absent(Unavailable):
    """Processes of the job did not come in time."""


class Place(NamedTuple):
    """Where this process stands in its job, as far as it is known before JAX looks."""

    found: str  # "one", "explicit", "slurm", "gketpu" or "gcetpu" (of which JAX finds the rest), "pathways"
    coordinator: str = ""
    size: int = 1
    rank: int = 0


# ------------------------------------------------------------------------------------------- where


def place(environ: Mapping[str, str], platforms: str, alone: bool = False) -> Place:
    """What the environment says of this process's job.

    Args:
        environ: the process's environment.
        platforms: JAX's own setting after its import, e.g. "tpu,cpu" on a machine with a TPU; "" when unset.
        alone: whether one process will do, so that a batch script may start it without srun.

    Raises:
        ValueError: when the environment contradicts itself, or the job was started in a way that cannot work.
    """
    if "proxy" in platforms.split(","):
        return Place("pathways")  # its one controller joins the hosts; `jax.distributed` has no part in it
    if any(environ.get(name) for name in VARIABLES):
        return _explicit(environ)
    if environ.get("SLURM_JOB_ID"):
        started = all(environ.get(name) for name in _SLURM)
        return Place("one") if alone and not started else _slurm(environ, platforms)
    if "tpu" in platforms.split(","):
        if environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES"):
            return Place("gketpu")
        # Set by JAX where there is no TPU, and by those who have one that no metadata server knows.
        return Place("one") if environ.get("TPU_SKIP_MDS_QUERY") else Place("gcetpu")
    if (given := [name for name in _JAX if environ.get(name)]) and environ.get(_JAX[1]) != "1":
        raise ValueError(
            f"{' and '.join(f'{name}={environ[name]}' for name in given)} would leave each process on its own: {_HOW}"
        )
    for name, who in _OTHERS.items():
        if environ.get(name, "1") not in ("", "0", "1"):
            raise ValueError(
                f"{name}={environ[name]} says that {who} started several processes, but not where they meet: {_HOW}"
            )
    return Place("one")


def _explicit(environ: Mapping[str, str]) -> Place:
    if missing := [name for name in VARIABLES if not environ.get(name)]:
        given = [f"{name}={environ[name]}" for name in VARIABLES if environ.get(name)]
        raise ValueError(f"{' and '.join(given)} but no {' and no '.join(missing)}: set all three, or none")
    try:
        count, index = int(environ[COUNT]), int(environ[INDEX])
    except ValueError:
        raise ValueError(
            f"{COUNT}={environ[COUNT]} and {INDEX}={environ[INDEX]} must be whole numbers, such as 4 and 0"
        ) from None
    if not 0 <= index < count:
        raise ValueError(
            f"{INDEX}={index} is not one of {COUNT}={count} processes, which are counted from 0 to {count - 1}"
        )
    address = environ[COORDINATOR]
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\[\]/]+):\d{1,5}", address):
        raise ValueError(f"{COORDINATOR}={address} must be HOST:PORT of process 0, such as 10.0.0.2:8476")
    return Place("explicit", address, count, index) if count > 1 else Place("one")


def _slurm(environ: Mapping[str, str], platforms: str) -> Place:
    if not all(environ.get(name) for name in _SLURM):
        tasks = _number(environ, "SLURM_NTASKS", "SLURM_NPROCS")
        nodes = _number(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
        if max(tasks, nodes) > 1:
            raise ValueError(
                f"this SLURM job has {tasks} tasks on {nodes} nodes, but jaxkd was not started by srun and would run "
                "once, on its own: write `srun jaxkd train ...` into the sbatch script"
            )
        return Place("one")
    count, index = _number(environ, "SLURM_NTASKS"), int(environ["SLURM_PROCID"])
    if count > 1 and platforms != "cpu" and not environ.get("JAX_LOCAL_DEVICE_IDS"):
        _one_gpu_a_task(environ)
    return Place("slurm", "", count, index) if count > 1 else Place("one")


def _one_gpu_a_task(environ: Mapping[str, str]) -> None:
    """JAX gives a SLURM task the GPU of its number on the node: each must see all of them, and each needs a task."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else _number(environ, "SLURM_GPUS_ON_NODE", default=0)
    local = int(environ["SLURM_LOCALID"])
    every = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(size) for size, times in every for _ in range(int(times or 1))]
    node = _number(environ, "SLURM_NODEID", default=0)
    here = tasks[node] if node < len(tasks) else local + 1
    ask = "ask with --ntasks-per-node=N --gres=gpu:N, without --gpus-per-task and --gpu-bind"
    if bound := [n for n in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND") if environ.get(n) not in (None, "none")]:
        raise ValueError(
            f"{bound[0]}={environ[bound[0]]} hides the other GPUs of the node from each task, which must see all: {ask}"
        )
    if gpus and gpus < max(here, local + 1):
        raise ValueError(f"this node has {max(here, local + 1)} tasks but each sees {gpus} of its GPUs: {ask}")
    if gpus > here:
        raise ValueError(
            f"this node has {gpus} GPUs but {here} task{'s' * (here > 1)}, and a task uses one GPU: {ask} "
            f"(or set JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))} for one task on each node)"
        )


def _say(text: str) -> None:
    print(f"jaxkd: {text}", file=sys.stderr, flush=True)


def _number(environ: Mapping[str, str], *names: str, default: int = 1) -> int:
    value = next((environ[name] for name in names if environ.get(name)), "")
    return int(value) if value.isdigit() else default


# -------------------------------------------------------------------------------------------- join


def join(saves: bool = False, alone: bool = False) -> Place:
    """Start `jax.distributed`: before anything else is asked of JAX, once.

    Its coordination service is what notices SIGTERM, so it is started for one process too, and a run that saves may
    install no Python handler for SIGTERM afterwards: it would replace the one that is.

    Args:
        saves: whether the process asks for SIGTERM between its steps, and saves; it ends any other one at once.
        alone: as for `place`.

    Raises:
        ValueError: when the environment cannot be right.
        Absent: when the others did not come within `JAXKD_JOIN_SECONDS` (300).
        OSError: when process 0 cannot listen.
    """
    import jax

    here = place(os.environ, jax.config.values["jax_platforms"] or "", alone)
    if jax.distributed.is_initialized() or here.found == "pathways":
        return here
    seconds = _seconds(os.environ, PATIENCE, 300)
    silence = _seconds(os.environ, HEARTBEAT, 100)  # by which a process that was killed is known
    start = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=silence)
    with _without_proxies():
        if here.found == "one":
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            start(f"localhost:{port}", 1, 0, cluster_detection_method="deactivate")
        elif here.found == "explicit":
            roll_call(here, seconds)
            with _patient("the processes, all of which had answered,", 120):
                start(*here[1:], cluster_detection_method="deactivate", initialization_timeout=180)
        else:
            # Beyond its own limit JAX ends the process with a page of C++: ours comes first.
            with _patient({"slurm": "the tasks of this SLURM job"}.get(here.found, "the hosts of this TPU"), seconds):
                _detected(start, here.found, seconds + 60)
    if not saves:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if here.size > 1:
        _say(f"process {here.rank} of {here.size} ({here.found})")
    return here


def _detected(start, method: str, seconds: int) -> None:
    try:
        start(cluster_detection_method=method, initialization_timeout=seconds)
    except ImportError as error:
        raise ValueError(f"to find the other hosts of a TPU, JAX needs {error.name}: install jaxkd[tpu]") from None
    except OSError as error:
        raise ValueError(
            "this machine has a TPU, but its metadata server does not say which other hosts belong to it "
            f"({type(error).__name__}): {_HOW}, or set TPU_SKIP_MDS_QUERY=1 if there are none"
        ) from None


def _seconds(environ: Mapping[str, str], name: str, usual: int) -> int:
    text = environ.get(name) or str(usual)
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name}={text} must be a number of seconds, such as {usual}")
    return int(text)


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """gRPC reads the proxy variables when it connects, to localhost too, and would ask the proxy until it aborts."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if "_proxy" in name.lower()}
    try:
        yield
    finally:
        os.environ.update(taken)


@contextlib.contextmanager
def _patient(who: str, seconds: int) -> Iterator[None]:
    """Say every half minute that we still wait, and in the end give up, in one sentence and with code `ABSENT`."""
    done, start = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(min(30.0, max(start + seconds - time.monotonic(), 0.1))):
            waited = round(time.monotonic() - start)
            if waited < seconds:
                _say(f"waiting for {who} to join, for {waited} s so far")
                continue
            _say(
                f"error: {who} did not all join within {seconds} s: look at the logs of the others; a firewall between "
                f"them or a host that is still starting are the usual reasons ({PATIENCE} is the limit)"
            )
            os._exit(ABSENT)  # the wait is inside JAX, where no exception reaches

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


# --------------------------------------------------------------------------------------- roll call


def roll_call(here: Place, seconds: float) -> None:
    """Meet at the coordinator's address before JAX does, to say who is missing; JAX itself only aborts.

    Every process sends its number and how many processes it knows of, as one line of JSON, and waits for the
    answer of process 0, which is the same for all. Afterwards the port is free again.

    Raises:
        ValueError: two processes have one number, or they disagree on how many there are.
        Absent: some did not come; process 0 knows which.
        OSError: process 0 cannot listen at the port.
    """
    verdict = (_call if here.rank == 0 else _answer)(here, seconds)
    if "absent" in verdict:
        raise Absent(verdict["absent"])
    if "wrong" in verdict:
        raise ValueError(verdict["wrong"])


def _call(here: Place, seconds: float) -> dict[str, str]:
    """Process 0: wait for all the others, and tell them all the same."""
    verdict: dict[str, str] = {}
    came: dict[int, socket.socket] = {}
    lines: list[socket.socket] = []
    deadline = time.monotonic() + seconds
    with _listen(here) as server, contextlib.ExitStack() as closing:
        while len(came) < here.size - 1 and not verdict:
            missing = [i for i in range(1, here.size) if i not in came]
            names = f"process{'es' * (len(missing) > 1)} {_few(missing)}"
            if (left := deadline - time.monotonic()) <= 0:
                verdict["absent"] = (
                    f"of {here.size} processes, {names} did not come to {here.coordinator} within {seconds:g} s: look "
                    f"at the logs there, and at {COORDINATOR} and {COUNT} ({PATIENCE} is the limit)"
                )
                break
            server.settimeout(min(left, 30.0))
            try:
                line = closing.enter_context(server.accept()[0])
            except TimeoutError:
                if time.monotonic() < deadline:
                    _say(f"waiting for {names} of {here.size} at {here.coordinator}")
                continue
            if (said := _heard(line)) is None:
                continue  # something else that tried the port
            count, index = said
            if count != here.size:
                verdict["wrong"] = f"process {index} has {COUNT}={count}, but process 0 has {COUNT}={here.size}"
            elif index == 0 or (index in came and _open(came[index])):
                verdict["wrong"] = f"two processes have {INDEX}={index}: each needs its own, from 0 to {count - 1}"
            came[index] = line
            lines.append(line)
        for line in lines:
            with contextlib.suppress(OSError):
                line.sendall((json.dumps(verdict) + "\n").encode())
    return verdict


def _listen(here: Place) -> socket.socket:
    port, both = int(here.coordinator.rsplit(":", 1)[1]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"process 0 cannot listen at {COORDINATOR}={here.coordinator} ({getattr(error, 'strerror', error)}): take "
            "another port, or end the job that has this one"
        ) from None


def _heard(line: socket.socket) -> tuple[int, int] | None:
    try:
        line.settimeout(2)
        said = json.loads(line.makefile().readline(200))
        return int(said["count"]), int(said["index"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open(line: socket.socket) -> bool:
    """Whether the other end is still there; one that died may come again."""
    try:
        line.setblocking(False)
        return bool(line.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _answer(here: Place, seconds: float) -> dict[str, str]:
    """Every other process: say who it is until process 0 has told its verdict."""
    host, port = here.coordinator.rsplit(":", 1)
    start, said, reason = time.monotonic(), 0, ""
    while (left := start + seconds - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5.0)) as line:
                line.sendall((json.dumps({"count": here.size, "index": here.rank}) + "\n").encode())
                line.settimeout(left + 15)  # process 0 may have begun to wait a little later
                verdict = json.loads(line.makefile().readline())
                return {str(k): str(v) for k, v in verdict.items()}
        except (OSError, ValueError, AttributeError, OverflowError) as error:  # not there yet, or something else is
            reason = (isinstance(error, OSError) and error.strerror) or "no answer"
        if (waited := int(time.monotonic() - start)) // 30 > said:
            said = waited // 30
            _say(f"waiting for process 0 at {here.coordinator}, for {waited} s so far ({reason})")
        time.sleep(min(1.0, max(left, 0.0)))
    return {
        "absent": f"process 0 did not answer at {COORDINATOR}={here.coordinator} within {seconds:g} s ({reason}): is "
        f"it running, at that address, with no firewall between? ({PATIENCE} is the limit)"
    }


def _few(numbers: list[int]) -> str:
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return ", ".join(map(str, numbers[:8])) + more
