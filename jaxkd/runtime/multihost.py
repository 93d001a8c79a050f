"""Broadcast from process 0, barriers, abort on any failure, by the key-value store of JAX's coordination service: with
device collectives no host could wait for hours. The service's heartbeats detect processes that died.
"""

import atexit
import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

from jaxkd.runtime import cluster, extras

T = TypeVar("T")

_FAILURE_KEY, _ACK_KEY = "jaxkd/failed", "jaxkd/heard"
_PREEMPTION_KEY = "RECEIVED_PREEMPTION_NOTICE"  # JAX sets it for all processes when one receives SIGTERM
_POLL = 1.0  # seconds between two polls for a failure or a preemption notice
_RESEND = 5.0  # seconds after which SIGINT is sent again: Python can lose an exception
_ACK_TIMEOUT = 10.0  # seconds that process 0, which hosts the store, waits for the others to read a failure
# Messages of Gloo and NCCL when a peer is gone.
_PEER_LOST = re.compile("closed by peer|reset by peer|remote process exited|unhealthy|heartbeat", re.IGNORECASE)
_call_ids = itertools.count()  # of the calls below; equal on all processes, because they make the same calls in order
_exit_lock = threading.Lock()  # one thread prints the reason and exits
_watching = threading.Event()


class _World(NamedTuple):
    client: Any  # of the coordination service
    rank: int
    size: int


def _world() -> _World:
    """Rank and size without initialising JAX's backends: errors may occur before there are any."""
    if "jax" not in sys.modules:
        return _World(None, 0, 1)
    # JAX has no public API for the store; Orbax uses this one too.
    from jax._src.distributed import global_state

    if global_state.client is None:
        return _World(None, 0, 1)
    return _World(global_state.client, global_state.process_id, global_state.num_processes or 1)


def join(handles_sigterm: bool = False, single_ok: bool = False) -> None:
    """`cluster.join`, and a thread that ends this process when any other fails."""
    cluster.join(handles_sigterm, single_ok)
    if is_multihost() and not _watching.is_set():
        import jax

        _watching.set()
        # A CPU program from JAX's cache loses the order of its collectives, and two processes deadlock.
        if jax.default_backend() == "cpu":
            jax.config.update("jax_enable_compilation_cache", False)
        done, client = threading.Event(), _world().client

        def watch() -> None:  # the main thread may be blocked in a collective
            while not done.wait(_POLL):
                with contextlib.suppress(
                    RuntimeError
                ):  # none so far; or the store is gone, on which JAX ends the process
                    failure = json.loads(client.key_value_try_get(_FAILURE_KEY))
                    with _exit_lock:
                        _exit_because_of(failure)

        def stop() -> None:  # registered after JAX's own exit handler, which closes the client: runs before it
            done.set()
            thread.join(10)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        atexit.register(stop)


def is_multihost() -> bool:
    """Whether this job has more than one process."""
    return _world().size > 1


def is_main() -> bool:
    """Whether this is process 0, which alone locks, writes and prints."""
    return _world().rank == 0


def print_main(text: str) -> None:
    """Print on process 0 only."""
    if is_main():
        print(text, flush=True)


def broadcast(name: str, make: Callable[[], T], patience: float = math.inf) -> T:
    """Run `make` on process 0 and return its JSON values (lists, not tuples; text as keys) on all processes.

    All processes must call it in the same order; an error in `make` ends all of them. `name` is shown while the others
    wait; Unavailable after `patience` seconds.
    """
    client, rank, size = _world()
    if size == 1:
        return make()
    key = f"jaxkd/broadcast/{next(_call_ids)}/{name}"
    if rank == 0:
        client.key_value_set(key, json.dumps(make()))
    return json.loads(_wait(client, key, f"process 0: {name}", patience))


def all_gather(name: str, value: T, patience: float = math.inf) -> list[T]:
    """The JSON `value` of every process, by rank, on all; Unavailable names one that is missing after `patience` s."""
    client, rank, size = _world()
    if size == 1:
        return [value]
    key = f"jaxkd/all_gather/{next(_call_ids)}/{name}"
    client.key_value_set(f"{key}/{rank}", json.dumps(value))
    if rank == 0:  # collects for all: 1,000 hosts make 1,000 requests and not 1,000,000
        values = [json.loads(_wait(client, f"{key}/{i}", f"process {i}: {name}", patience)) for i in range(size)]
        client.key_value_set(f"{key}/all", json.dumps(values))
    return json.loads(_wait(client, f"{key}/all", f"all processes: {name}", patience))


def barrier(name: str, patience: float = math.inf) -> None:
    """Wait for all processes; raises as `all_gather`."""
    all_gather(name, None, patience)


def main_first(name: str, make: Callable[[], T]) -> T:
    """Call `make` on process 0, then on the others, which find its files where the disk is shared."""
    result = [make()] if is_main() else []
    barrier(name)
    result = result or [make()]
    barrier(name)
    return result[0]


def assert_equal(what: str, values: dict[str, str]) -> None:
    """ValueError where `values` differ between processes; `what` (a plural) begins the message."""
    expected = broadcast(what, lambda: values)
    for name, value in values.items():
        if value != expected.get(name):
            raise ValueError(
                f"{what} differ between hosts: '{name}' is {expected.get(name)} on process 0 and {value} on process "
                f"{_world().rank}"
            )


def _wait(client: Any, key: str, who: str, patience: float = math.inf) -> str:
    """A value that another process sets; after 30 seconds prints what it waits for."""
    start, reported = time.monotonic(), False
    while True:
        try:
            return client.blocking_key_value_get(key, 2000)  # ms; Python handles signals only between two calls
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if (waited := time.monotonic() - start) > patience:
            raise cluster.Unavailable(f"gave up after {patience:g} s of waiting for {who}")
        if not reported and waited > 30:
            reported = True
            print(f"jaxkd: waiting for {who}", file=sys.stderr, flush=True)


class Stopped(KeyboardInterrupt):
    """A signal arrived where there is nothing to save; `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C raise Stopped in work that has nothing to save, within seconds and on all processes.

    JAX's handler receives SIGTERM, and the training loop polls it between steps. Here a thread polls it and sends
    SIGINT to the main thread, which also interrupts blocking calls.
    """
    client, main, done, preempted = _world().client, threading.get_ident(), threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def poll() -> None:
        wait = _POLL
        while not done.wait(wait):
            with contextlib.suppress(RuntimeError):  # the key is not set
                client.key_value_try_get(_PREEMPTION_KEY)
                preempted.set()
                signal.pthread_kill(main, signal.SIGINT)
                wait = _RESEND

    def handle(number: int, frame: Any) -> None:
        raise Stopped(message, cluster.EXIT_STOPPED if preempted.is_set() else cluster.EXIT_INTERRUPTED)

    # Also where SIGINT was ignored, as it is for a shell's background jobs.
    before = signal.signal(signal.SIGINT, handle)
    poller = threading.Thread(target=poll, daemon=True, name="jaxkd_notice")
    if client is not None:  # without one SIGTERM has its default action, which ends the process
        poller.start()
    try:
        yield
    finally:
        done.set()
        try:
            if poller.is_alive():
                poller.join()
        finally:
            signal.signal(signal.SIGINT, before)


def fail(error: BaseException) -> int:
    """Print why the command ends: one line for errors that a user can correct, else the traceback; the exit code.

    On several processes the first to fail publishes its reason and all exit: this does not return, nor for `Stopped`.
    """
    code, text = _describe(error)
    if not is_multihost():
        print(text, file=sys.stderr)
        if isinstance(error, Stopped):
            _exit(code)  # the interpreter's own shutdown took two minutes where writing rows was interrupted
        return code
    if _PEER_LOST.search(f"{error} {error.__cause__}"):  # also an OSError of a checkpoint that waited for the peer
        code = cluster.EXIT_INTERNAL
        reason = str(error).splitlines()[0][:300]
        text = f"jaxkd: error: lost a process of this job ({reason}); the same command resumes from the last checkpoint"
    short = text if "\n" not in text else traceback.format_exception_only(error)[0].split("\n")[0]
    _publish_and_exit(code, short.removeprefix("jaxkd: "), text)


def abort(code: int, text: str) -> NoReturn:
    """Exit from any thread with `code`, and end the other processes too, which print `text`; for a main thread that
    hangs. Publishing is limited to seconds, because process 0, which hosts the store, may hang as well.
    """
    if is_multihost():
        publisher = threading.Thread(target=_publish_and_exit, args=(code, text), daemon=True)
        publisher.start()
        publisher.join(_ACK_TIMEOUT + 5.0)
    os._exit(code)


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """On several processes, end all of them at an error before any `finally` or `with` block outside runs.

    Closing resources could block on processes that in turn wait for this one. No effect on a single process.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if is_multihost():
            fail(error)
        raise


def _describe(error: BaseException) -> tuple[int, str]:
    if isinstance(error, Stopped):
        return error.code, f"jaxkd: {error}"
    if isinstance(error, KeyboardInterrupt):
        return cluster.EXIT_INTERRUPTED, "jaxkd: interrupted"
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):  # a restart does not help
        error = ValueError(
            f"a device is out of memory: {str(error).splitlines()[0][:200]}. More optim.micro_batches, "
            "run.remat=layer or more devices reduce what each needs; `jaxkd plan` reports what a step needs"
        )
    if isinstance(error, ModuleNotFoundError):
        error = extras.explain(error)
    expected = isinstance(error, ValueError | OSError | FloatingPointError | extras.MissingExtra)
    if not expected or os.environ.get("JAXKD_TRACEBACK"):
        return 1 if expected else cluster.EXIT_INTERNAL, "".join(traceback.format_exception(error)).rstrip()
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    code = cluster.EXIT_UNAVAILABLE if isinstance(error, cluster.Unavailable) else 1
    return code, f"jaxkd: error: {' '.join(text.split())}"


def _publish_and_exit(code: int, text: str, own_text: str = "") -> NoReturn:
    """Publish this process's failure unless another was first, print `own_text` or the other's, and exit."""
    client, rank, _ = _world()
    failure = {"process": rank, "code": code, "text": text}
    with _exit_lock:
        with contextlib.suppress(RuntimeError):  # another process was first, or the store is gone with process 0
            client.key_value_set(_FAILURE_KEY, json.dumps(failure))
        with contextlib.suppress(RuntimeError):
            failure = json.loads(client.key_value_try_get(_FAILURE_KEY))
        if failure["process"] != rank:
            _exit_because_of(failure)
        if own_text:
            print(own_text, file=sys.stderr)
        _exit(code)


def _exit_because_of(failure: dict[str, Any]) -> NoReturn:
    verb = "" if failure["code"] in (cluster.EXIT_STOPPED, cluster.EXIT_INTERRUPTED) else "failed: "
    print(f"jaxkd: process {failure['process']} {verb}{failure['text']}", file=sys.stderr)
    _exit(failure["code"])


def _exit(code: int) -> NoReturn:
    """Exit at once. Process 0 hosts the store, without which JAX aborts the others: it waits for their acks."""
    client, rank, size = _world()
    with contextlib.suppress(RuntimeError):
        if client is not None:
            client.key_value_set(f"{_ACK_KEY}/{rank}", "yes")
        deadline = time.monotonic() + _ACK_TIMEOUT
        while rank == 0 < size - 1 and time.monotonic() < deadline and len(client.key_value_dir_get(_ACK_KEY)) < size:
            time.sleep(0.1)
        time.sleep(0.3 if rank == 0 else 0.0)  # the others exit right after their ack
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python's own shutdown would wait for processes that are gone
