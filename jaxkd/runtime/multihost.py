"""What the processes of a job do as one: the word of process 0 goes for all, and the failure of one ends all.

Nothing here is a collective on devices: a host may prepare rows for hours while the others wait. It goes through the
key-value store of JAX's coordination service, whose heartbeats tell of a process that died without a word.
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

from jaxkd.runtime import cluster

T = TypeVar("T")

_FAILED, _HEARD = "jaxkd/failed", "jaxkd/heard"
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # where JAX tells all processes that one got SIGTERM
_LOOK = 1.0  # seconds between two looks at whether a process failed, or was told to stop
_AGAIN = 5.0  # seconds after which a thread that was told to stop is told again: Python can lose an exception
_HEAR = 10.0  # seconds that process 0, which holds the store, leaves the others to hear of a failure
_LOST = re.compile(
    "closed by peer|reset by peer|remote process exited|unhealthy|heartbeat", re.IGNORECASE
)  # Gloo, NCCL
_numbers = itertools.count()  # of what is told: the same in all processes, which ask in the same order
_ending = threading.Lock()  # held by whoever ends this process: it says one sentence


class _World(NamedTuple):
    client: Any  # of the coordination service
    rank: int
    size: int


def _world() -> _World:
    """Where this process stands, without a question to the devices: an error may come before there are any."""
    if "jax" not in sys.modules:
        return _World(None, 0, 1)
    # JAX has no public way to the store; Orbax goes this one too.
    from jax._src.distributed import global_state

    if global_state.client is None:
        return _World(None, 0, 1)
    return _World(global_state.client, global_state.process_id, global_state.num_processes or 1)


def join(saves: bool = False, alone: bool = False) -> None:
    """`processes.join`, and from then on the failure of any process ends this one, wherever it stands.

    Raises:
        ValueError, OSError: as `processes.join`.
    """
    cluster.join(saves, alone)
    if is_multihost() and not _watched.is_set():
        _watched.set()
        _compile_anew_on_cpus()
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(done,), daemon=True)
        watch.start()

        def leave() -> None:  # before JAX lets go of the client, which it does at exit too
            done.set()
            watch.join(10)

        atexit.register(leave)


_watched = threading.Event()


def _compile_anew_on_cpus() -> None:
    """Out of JAX's cache, a CPU's program no longer keeps its collectives in order, and two processes wait for ever."""
    import jax

    if jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


def is_multihost() -> bool:
    """Whether this job has more than one process."""
    return _world().size > 1


def is_main() -> bool:
    """Whether this process is the one that claims, writes and prints."""
    return _world().rank == 0


def say(text: str) -> None:
    """Print, in process 0 alone."""
    if is_main():
        print(text, flush=True)


# ------------------------------------------------------------------------------------------- as one


def broadcast(name: str, make: Callable[[], T], patience: float = math.inf) -> T:
    """What process 0 makes, for all. The others make nothing and wait.

    All processes must ask in the same order; a failure in `make` is that of process 0, which ends all.

    Args:
        name: of what is made, for whoever waits.
        make: gives JSON values: lists where there might be tuples, text for keys.
        patience: seconds to wait for it.

    Raises:
        Unavailable: it took longer.
    """
    client, rank, size = _world()
    if size == 1:
        return make()
    key = f"jaxkd/word/{next(_numbers)}/{name}"
    if rank == 0:
        client.key_value_set(key, json.dumps(make()))
    return json.loads(_wait(client, key, f"process 0: {name}", patience))


def all_gather(name: str, value: T, patience: float = math.inf) -> list[T]:
    """What each process says, by its number, in all of them.

    Args:
        name: of what is said, for whoever waits.
        value: this process's, of JSON values.
        patience: seconds to wait for the others.

    Raises:
        Unavailable: it took longer; the sentence names a process that has not come.
    """
    client, rank, size = _world()
    if size == 1:
        return [value]
    key = f"jaxkd/every/{next(_numbers)}/{name}"
    client.key_value_set(f"{key}/{rank}", json.dumps(value))
    if rank == 0:  # reads each and tells all, so that a thousand hosts ask for a thousand values and not a million
        said = [json.loads(_wait(client, f"{key}/{i}", f"process {i}: {name}", patience)) for i in range(size)]
        client.key_value_set(f"{key}/all", json.dumps(said))
    return json.loads(_wait(client, f"{key}/all", f"all processes: {name}", patience))


def barrier(name: str, patience: float = math.inf) -> None:
    """Go on when all processes have come here.

    Raises:
        Unavailable: as `all_gather`.
    """
    all_gather(name, None, patience)


def in_turn(name: str, make: Callable[[], T]) -> T:
    """Make something on disk: process 0 first, then the others, who find it where the disk is shared.

    Args:
        name: of what is made, for whoever waits.
        make: called once in each process.
    """
    found = [make()] if is_main() else []
    barrier(name)
    found = found or [make()]
    barrier(name)
    return found[0]


def alike(what: str, values: dict[str, str]) -> None:
    """See that all processes have the same.

    Args:
        what: they are, as a sentence begins.
        values: of this process, by name.

    Raises:
        ValueError: they are not those of process 0.
    """
    expected = broadcast(what, lambda: values)
    for name, value in values.items():
        if value != expected.get(name):
            raise ValueError(
                f"{what} differ between hosts: of '{name}' process 0 has {expected.get(name)}, and process "
                f"{_world().rank} has {value}"
            )


def _wait(client: Any, key: str, who: str, patience: float = math.inf) -> str:
    """A value that another process sets; says after half a minute for what it waits."""
    start, said = time.monotonic(), False
    while True:
        try:
            return client.blocking_key_value_get(key, 2000)  # short: between two, Python can be interrupted
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if (waited := time.monotonic() - start) > patience:
            raise cluster.Unavailable(f"gave up after {patience:g} s of waiting for {who}")
        if not said and waited > 30:
            said = True
            print(f"jaxkd: waiting for {who}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------- how it ends


class Stopped(KeyboardInterrupt):
    """A signal came where there is nothing to save."""

    def __init__(self, said: str, code: int):
        """With the sentence for the user, and the code to exit with."""
        super().__init__(said)
        self.code = code


@contextlib.contextmanager
def stoppable(said: str) -> Iterator[None]:
    """Work of any length without anything to save, which SIGTERM and Ctrl-C end within seconds, in all processes.

    JAX's handler takes SIGTERM, and the training loop asks for it between two steps. Here a thread does, and hands
    it on as Ctrl-C, which reaches the main thread in its waits too.

    Args:
        said: to the user when it comes to that.

    Raises:
        Stopped: one of the processes got a signal.
    """
    client, main, done, told = _world().client, threading.get_ident(), threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def look() -> None:
        wait = _LOOK
        while not done.wait(wait):
            with contextlib.suppress(RuntimeError):  # nobody was told
                client.key_value_try_get(_NOTICE)
                told.set()
                signal.pthread_kill(main, signal.SIGINT)
                wait = _AGAIN

    def ask(number: int, frame: Any) -> None:
        # Where Ctrl-C was to be ignored, too, as shells have it of what they start with &: the loop hears it as well.
        raise Stopped(said, cluster.STOPPED if told.is_set() else cluster.INTERRUPTED)

    before = signal.signal(signal.SIGINT, ask)
    looking = threading.Thread(target=look, daemon=True, name="jaxkd_notice")
    if client is not None:  # nobody has taken SIGTERM, which ends the process
        looking.start()
    try:
        yield
    finally:
        done.set()
        try:
            if looking.is_alive():
                looking.join()
        finally:
            signal.signal(signal.SIGINT, before)


def end(error: BaseException) -> int:
    """Say why the command ends, in one line where a user can mend it.

    Of several processes the first to fail tells the others, and all end: this does not return then, nor for `Stopped`.

    Returns:
        the exit code.
    """
    code, text = _verdict(error)
    _, rank, size = _world()
    if size == 1:
        print(text, file=sys.stderr)
        if isinstance(error, Stopped):
            _leave(code)  # Python's own end was seen to take two minutes where a file of rows was cut short
        return code
    if _LOST.search(f"{error} {error.__cause__}"):  # an OSError of a checkpoint that waited for it, too
        code = cluster.UNFORESEEN
        reason = str(error).splitlines()[0][:300]
        text = (
            f"jaxkd: error: a process of this job is gone ({reason}); the same command goes on from the last checkpoint"
        )
    with _ending:
        short = text if "\n" not in text else traceback.format_exception_only(error)[0].split("\n")[0]
        told = _told(code, short.removeprefix("jaxkd: "))
        if told["process"] == rank:
            print(text, file=sys.stderr)
            _leave(code)
        _follow(told)


def leave(code: int, text: str) -> NoReturn:
    """End this process from any of its threads, and the others with it: for one whose main thread stands still.

    Whoever holds the store may stand still, too: what takes longer than some seconds to tell is not told.

    Args:
        code: to exit with, in the others too, unless another failed before.
        text: why, in a sentence for the others; what this process has to say it has said.
    """

    def tell() -> None:
        with _ending:
            told = _told(code, text)
            if told["process"] == _world().rank:
                _leave(code)
            _follow(told)

    if is_multihost():
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        teller.join(_HEAR + 5.0)
    os._exit(code)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Where there are several processes, end all of them at an error, before anything is closed.

    What would be closed waits for processes that wait for this one. In one process nothing changes.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if is_multihost():
            end(error)
        raise


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code, and what is printed."""
    if isinstance(error, Stopped):
        return error.code, f"jaxkd: {error}"
    if isinstance(error, KeyboardInterrupt):
        return cluster.INTERRUPTED, "jaxkd: interrupted"
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):  # now and at every start
        error = ValueError(
            f"a device has too little memory: {str(error).splitlines()[0][:200]}. More optim.micro_batches, "
            "run.remat=layer or more devices take less of each; `jaxkd plan` says what a step takes"
        )
    known = isinstance(error, ValueError | OSError | FloatingPointError)
    if not known or os.environ.get("JAXKD_TRACEBACK"):
        return 1 if known else cluster.UNFORESEEN, "".join(traceback.format_exception(error)).rstrip()
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    code = cluster.ABSENT if isinstance(error, cluster.Unavailable) else 1
    return code, f"jaxkd: error: {' '.join(text.split())}"


def _told(code: int, text: str) -> dict[str, Any]:
    """What all end with: this process's code and sentence, or those of one that was first."""
    client, rank, _ = _world()
    told = {"process": rank, "code": code, "text": text}
    with contextlib.suppress(RuntimeError):  # another was first, or the store is gone with process 0
        client.key_value_set(_FAILED, json.dumps(told))
    with contextlib.suppress(RuntimeError):
        told = json.loads(client.key_value_try_get(_FAILED))
    return told


def _watch(done: threading.Event) -> None:
    """Look whether a process has failed; the main thread may be inside a collective that never ends."""
    client = _world().client
    while not done.wait(_LOOK):
        try:
            told = json.loads(client.key_value_try_get(_FAILED))
        except RuntimeError:  # no: or the store is gone, on which JAX ends the process
            continue
        with _ending:
            _follow(told)


def _follow(told: dict[str, Any]) -> NoReturn:
    """End because another process has failed."""
    how = "" if told["code"] in (cluster.STOPPED, cluster.INTERRUPTED) else "failed: "
    print(f"jaxkd: process {told['process']} {how}{told['text']}", file=sys.stderr)
    _leave(told["code"])


def _leave(code: int) -> NoReturn:
    """Exit at once. Process 0 goes last: with it goes the store, and JAX would abort who has not heard."""
    client, rank, size = _world()
    with contextlib.suppress(RuntimeError):
        if client is not None:
            client.key_value_set(f"{_HEARD}/{rank}", "yes")
        until = time.monotonic() + _HEAR
        while rank == 0 < size - 1 and time.monotonic() < until and len(client.key_value_dir_get(_HEARD)) < size:
            time.sleep(0.1)
        time.sleep(0.3 if rank == 0 else 0.0)  # the others have heard, and are about to leave
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what Python would close now waits for processes that are gone
