"""Process discovery and `jax.distributed.initialize`, which every run calls, also for a single process."""

import contextlib
import functools
import glob
import importlib.util
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

# Exit codes, as in sysexits.h. Launchers start the same command again on the first three, and never on 0, 1, 2, 130.
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE: other processes did not join, or storage did not answer
EXIT_INTERNAL = 70  # EX_SOFTWARE: an unexpected error, such as a host lost in the middle of a step
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving everything
EXIT_INTERRUPTED = 130  # Ctrl-C as shells report it

COORDINATOR, COUNT, INDEX = VARIABLES = ("JAXKD_COORDINATOR", "JAXKD_NUM_PROCESSES", "JAXKD_PROCESS_ID")
JOIN_SECONDS = "JAXKD_JOIN_SECONDS"
HEARTBEAT_SECONDS = "JAXKD_HEARTBEAT_SECONDS"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# Process counts set by launchers that do not tell JAX the coordinator's address.
_OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "SKYPILOT_NUM_NODES": "SkyPilot"}
_SET_VARIABLES = f"set {', '.join(VARIABLES[:2])} and {VARIABLES[2]} in each process"
_TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_ACCELERATOR_TYPE")
_JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Unavailable(OSError):
    """Other processes or storage do not answer now; the same command may succeed later (exit code 69)."""


class ProcessInfo(NamedTuple):
    """This process's rank in its job, as far as it is known before JAX detects a TPU's hosts."""

    source: str  # "one", "explicit", "slurm", "gketpu" or "gcetpu" (JAX detects the rest), "pathways"
    coordinator: str = ""
    size: int = 1
    rank: int = 0


def detect(environ: Mapping[str, str], platforms: str, single_ok: bool = False) -> ProcessInfo:
    """Read this process's rank from the environment; ValueError for contradictory variables, or no coordinator.

    `platforms` is JAX's `jax_platforms` after its import, e.g. "tpu,cpu" on a machine with a TPU, "" if unset.
    `single_ok` accepts a SLURM batch script that runs the command once without srun.
    """
    if "proxy" in platforms.split(","):
        return ProcessInfo("pathways")  # its single controller does not use `jax.distributed`
    if any(environ.get(name) for name in VARIABLES):
        return _explicit(environ)
    if environ.get("SLURM_JOB_ID"):
        by_srun = all(environ.get(name) for name in _SLURM)
        return ProcessInfo("one") if single_ok and not by_srun else _slurm(environ, platforms)
    if "tpu" in platforms.split(","):
        if environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES"):
            return ProcessInfo("gketpu")
        # JAX sets it on machines without a TPU, users on machines with a TPU but no metadata server.
        return ProcessInfo("one") if environ.get("TPU_SKIP_MDS_QUERY") else ProcessInfo("gcetpu")
    if (given := [name for name in _JAX_VARIABLES if environ.get(name)]) and environ.get(_JAX_VARIABLES[1]) != "1":
        values = " and ".join(f"{name}={environ[name]}" for name in given)
        raise ValueError(f"{values} would run each process as a job of its own: {_SET_VARIABLES}")
    for name, launcher in _OTHER_LAUNCHERS.items():
        if environ.get(name, "1") not in ("", "0", "1"):
            raise ValueError(f"{name}={environ[name]}: {launcher} gives no coordinator address: {_SET_VARIABLES}")
    return ProcessInfo("one")


def avoid_absent_tpu() -> None:
    """Before `import jax`: JAX_PLATFORMS=cpu where libtpu is installed without a TPU or GPU and would print errors."""
    tpu = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*") or any(map(os.environ.get, _TPU_VARIABLES))
    if not tpu and importlib.util.find_spec("libtpu") and not importlib.util.find_spec("jax_plugins"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _explicit(environ: Mapping[str, str]) -> ProcessInfo:
    if missing := [name for name in VARIABLES if not environ.get(name)]:
        given = [f"{name}={environ[name]}" for name in VARIABLES if environ.get(name)]
        raise ValueError(f"{' and '.join(given)} but no {' and no '.join(missing)}: set all three, or none")
    try:
        count, index = int(environ[COUNT]), int(environ[INDEX])
    except ValueError:
        raise ValueError(f"{COUNT}={environ[COUNT]} and {INDEX}={environ[INDEX]} must be whole numbers") from None
    if not 0 <= index < count:
        raise ValueError(f"{INDEX}={index} must be from 0 to {count - 1}, since {COUNT}={count}")
    address = environ[COORDINATOR]
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\[\]/]+):\d{1,5}", address):
        raise ValueError(f"{COORDINATOR}={address} must be HOST:PORT of process 0, such as 10.0.0.2:8476")
    return ProcessInfo("explicit", address, count, index) if count > 1 else ProcessInfo("one")


def _slurm(environ: Mapping[str, str], platforms: str) -> ProcessInfo:
    if not all(environ.get(name) for name in _SLURM):
        tasks = _number(environ, "SLURM_NTASKS", "SLURM_NPROCS")
        nodes = _number(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
        if max(tasks, nodes) > 1:
            raise ValueError(
                f"this SLURM job has {tasks} tasks on {nodes} nodes, but jaxkd was not started by srun and would run "
                "as one process: write `srun jaxkd train ...` into the sbatch script"
            )
        return ProcessInfo("one")
    count, index = _number(environ, "SLURM_NTASKS"), int(environ["SLURM_PROCID"])
    if count > 1 and platforms != "cpu" and not environ.get("JAX_LOCAL_DEVICE_IDS"):
        _check_gpus_per_task(environ)
    return ProcessInfo("slurm", "", count, index) if count > 1 else ProcessInfo("one")


def _check_gpus_per_task(environ: Mapping[str, str]) -> None:
    """JAX assigns GPU number SLURM_LOCALID to a task: every task must see all GPUs, one task per GPU."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else _number(environ, "SLURM_GPUS_ON_NODE", default=0)
    local = int(environ["SLURM_LOCALID"])
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks_per_node = [int(size) for size, times in groups for _ in range(int(times or 1))]
    node = _number(environ, "SLURM_NODEID", default=0)
    tasks = tasks_per_node[node] if node < len(tasks_per_node) else local + 1
    request = "request --ntasks-per-node=N --gres=gpu:N, without --gpus-per-task and --gpu-bind"
    if bound := [n for n in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND") if environ.get(n) not in (None, "none")]:
        raise ValueError(f"{bound[0]}={environ[bound[0]]} hides the node's other GPUs from each task: {request}")
    if gpus and gpus < max(tasks, local + 1):
        raise ValueError(f"this node has {max(tasks, local + 1)} tasks but each sees {gpus} of its GPUs: {request}")
    if gpus > tasks:
        raise ValueError(
            f"this node has {gpus} GPUs but {tasks} task{'s' * (tasks > 1)}, and a task uses one GPU: {request} "
            f"(or set JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))} for one task per node)"
        )


def _number(environ: Mapping[str, str], *names: str, default: int = 1) -> int:
    value = next((environ[name] for name in names if environ.get(name)), "")
    return int(value) if value.isdigit() else default


def _say(text: str) -> None:
    print(f"jaxkd: {text}", file=sys.stderr, flush=True)


def join(handles_sigterm: bool = False, single_ok: bool = False) -> ProcessInfo:
    """Call `jax.distributed.initialize` once, before any other use of JAX's devices.

    The coordination service is what receives SIGTERM, so it is started for a single process too; a Python handler
    installed later would replace it. With `handles_sigterm` the process polls for SIGTERM between steps and saves,
    otherwise SIGTERM ends it at once. `single_ok` and ValueError are as in `detect`; Unavailable where other processes
    do not join within `JAXKD_JOIN_SECONDS` (300), OSError where process 0 cannot listen at the coordinator's port.
    """
    import jax

    info = detect(os.environ, jax.config.values["jax_platforms"] or "", single_ok)
    if jax.distributed.is_initialized() or info.source == "pathways":
        return info
    seconds, heartbeat = _seconds(JOIN_SECONDS, 300), _seconds(HEARTBEAT_SECONDS, 100)
    initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=heartbeat)
    with _without_proxies():
        if info.source == "one":
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            initialize(f"localhost:{port}", 1, 0, cluster_detection_method="deactivate")
        elif info.source == "explicit":
            roll_call(info, seconds)
            with _exit_after("the processes, all of which answered the roll call,", 120):
                initialize(*info[1:], cluster_detection_method="deactivate", initialization_timeout=180)
        else:
            # At its own limit JAX aborts with a C++ stack trace: our limit comes first.
            others = "the tasks of this SLURM job" if info.source == "slurm" else "the hosts of this TPU"
            try:
                with _exit_after(others, seconds):
                    initialize(cluster_detection_method=info.source, initialization_timeout=seconds + 60)
            except ImportError as error:
                reason = f"to find the other hosts of a TPU, JAX needs {error.name}: install jaxkd[tpu]"
                raise ValueError(reason) from None
            except OSError as error:
                raise ValueError(
                    "this machine has a TPU, but its metadata server does not list the TPU's hosts "
                    f"({type(error).__name__}): {_SET_VARIABLES}, or set TPU_SKIP_MDS_QUERY=1 if there is one host"
                ) from None
    if not handles_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if info.size > 1:
        _say(f"process {info.rank} of {info.size} ({info.source})")
    return info


def _seconds(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name}={text} must be a number of seconds, such as {default}")
    return int(text)


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """gRPC applies the proxy variables even to localhost, and would retry through the proxy until it aborts."""
    proxies = {name: os.environ.pop(name) for name in list(os.environ) if "_proxy" in name.lower()}
    try:
        yield
    finally:
        os.environ.update(proxies)


@contextlib.contextmanager
def _exit_after(who: str, seconds: int) -> Iterator[None]:
    """Report every 30 s that `who` has not joined; after `seconds` exit with `EXIT_UNAVAILABLE`."""
    done, start = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(min(30.0, max(start + seconds - time.monotonic(), 0.1))):
            waited = round(time.monotonic() - start)
            if waited < seconds:
                _say(f"waiting for {who} to join, {waited} s so far")
                continue
            _say(
                f"error: {who} did not all join within {seconds} s ({JOIN_SECONDS}): look at the logs of the others; "
                "usual reasons are a firewall between them or a host that is still starting"
            )
            os._exit(EXIT_UNAVAILABLE)  # the main thread is blocked inside JAX, where no exception can be raised

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def roll_call(info: ProcessInfo, seconds: float) -> None:
    """Check that all processes are there before JAX connects them, because JAX only aborts when one is missing.

    Every process sends its index and its process count to the coordinator as one line of JSON; process 0 answers all
    with the same result: Unavailable where some did not connect, ValueError where two have the same index, or their
    counts differ. The port is free again afterwards.
    """
    result = (_serve_roll_call if info.rank == 0 else _answer_roll_call)(info, seconds)
    if "missing" in result:
        raise Unavailable(result["missing"])
    if "invalid" in result:
        raise ValueError(result["invalid"])


def _serve_roll_call(info: ProcessInfo, seconds: float) -> dict[str, str]:
    result: dict[str, str] = {}
    present: dict[int, socket.socket] = {}
    connections: list[socket.socket] = []
    deadline = time.monotonic() + seconds
    with _listen(info) as server, contextlib.ExitStack() as closing:
        while len(present) < info.size - 1 and not result:
            missing = [i for i in range(1, info.size) if i not in present]
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            names = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}{more}"
            if (left := deadline - time.monotonic()) <= 0:
                result["missing"] = (
                    f"of {info.size} processes, {names} did not connect to {info.coordinator} within {seconds:g} s "
                    f"({JOIN_SECONDS}): look at their logs, and at their {COORDINATOR} and {COUNT}"
                )
                break
            server.settimeout(min(left, 30.0))
            try:
                connection = closing.enter_context(server.accept()[0])
            except TimeoutError:
                if time.monotonic() < deadline:
                    _say(f"waiting for {names} of {info.size} at {info.coordinator}")
                continue
            if (request := _receive(connection)) is None:
                continue  # an unrelated client
            count, index = request
            if count != info.size:
                result["invalid"] = f"process {index} has {COUNT}={count}, but process 0 has {COUNT}={info.size}"
            elif index == 0 or (index in present and _is_open(present[index])):
                result["invalid"] = f"two processes have {INDEX}={index}: each needs its own, from 0 to {count - 1}"
            present[index] = connection
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall((json.dumps(result) + "\n").encode())
    return result


def _listen(info: ProcessInfo) -> socket.socket:
    port, both = int(info.coordinator.rsplit(":", 1)[1]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"process 0 cannot listen at {COORDINATOR}={info.coordinator} ({getattr(error, 'strerror', error)}): use "
            "another port, or end the job that uses this one"
        ) from None


def _receive(connection: socket.socket) -> tuple[int, int] | None:
    try:
        connection.settimeout(2)
        request = json.loads(connection.makefile().readline(200))
        return int(request["count"]), int(request["index"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_open(connection: socket.socket) -> bool:
    """Whether the peer is still connected: a process that died may connect again."""
    try:
        connection.setblocking(False)
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _answer_roll_call(info: ProcessInfo, seconds: float) -> dict[str, str]:
    host, port = info.coordinator.rsplit(":", 1)
    start, reports, reason = time.monotonic(), 0, ""
    while (left := start + seconds - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5.0)) as connection:
                connection.sendall((json.dumps({"count": info.size, "index": info.rank}) + "\n").encode())
                connection.settimeout(left + 15)  # process 0 may have started its own clock a little later
                result = json.loads(connection.makefile().readline())
                return {str(k): str(v) for k, v in result.items()}
        except (OSError, ValueError, AttributeError, OverflowError) as error:  # not listening yet, or another server
            reason = (isinstance(error, OSError) and error.strerror) or "no answer"
        if (waited := int(time.monotonic() - start)) // 30 > reports:
            reports = waited // 30
            _say(f"waiting for process 0 at {info.coordinator}, {waited} s so far ({reason})")
        time.sleep(min(1.0, max(left, 0.0)))
    return {
        "missing": f"process 0 did not answer at {COORDINATOR}={info.coordinator} within {seconds:g} s ({reason}, "
        f"{JOIN_SECONDS}): is it running at that address, with no firewall between?"
    }
