"""The heartbeat thread, and the watchdog thread that ends a process whose main thread hangs."""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from jaxkd.runtime import files, multihost
from jaxkd.runtime.cluster import EXIT_INTERNAL
from jaxkd.runtime.goodput import STEPS

# Phases that may take `_LONG_FACTOR` times what a step may; others, such as building rows, have no limit.
LONG_PHASES = ("load", "check", "compile", "evaluation", "checkpoint", "mixture")
_LONG_FACTOR, _MEDIAN_FACTOR = 6.0, 10.0
_BEAT = 5.0  # seconds between two writes of heartbeat.json
HEARTBEAT_TTL_S = 60.0  # age at which a heartbeat no longer counts as a live run; network file systems show it late
_WRITE_TIMEOUT = 10.0  # seconds for the file system to take the stack traces


def timeout(phase: str, stall_s: float, median: float | None) -> float | None:
    """Seconds that may pass without progress; None for no limit.

    `stall_s` is the least limit for a step, 0 for no limits; `median` is of the steps' seconds, None before the second.
    """
    if not stall_s or phase not in (STEPS, *LONG_PHASES):
        return None
    if phase == STEPS and median is not None:
        return max(stall_s, _MEDIAN_FACTOR * median)
    return _LONG_FACTOR * stall_s


def live_heartbeat(workdir: Path) -> dict[str, Any] | None:
    """The heartbeat of a run that is still going, judged by heartbeat.json alone; else None."""
    try:
        beat = files.read_json(workdir / "heartbeat.json")
        over = beat["phase"] == "end" or time.time() - beat["time"] > HEARTBEAT_TTL_S
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if over else beat


class Watchdog:
    """Process 0 writes WORKDIR/heartbeat.json; on a stall a process writes all stacks to `stalled-PROCESS.txt` there
    and ends all processes with exit code 70.

    Only time in which this process could run counts: after Ctrl-Z or a suspend it is not late.
    """

    def __init__(self, workdir: Path, stall_s: float, process: int = 0):
        self._workdir, self._stall_s, self._process = workdir, stall_s, process
        self._phase, self._step, self._since = "start", 0, time.time()
        self._waited = 0.0
        self._durations: deque[float] = deque(maxlen=64)
        self._done = threading.Event()
        self._progress_lock, self._beat_lock = threading.Lock(), threading.Lock()
        # Two threads: a write to storage that hangs must not stop the watchdog.
        loops = [self._watch] if stall_s else []
        loops += [self._beat] if process == 0 else []
        self._threads = [threading.Thread(target=loop, daemon=True, name="jaxkd" + loop.__name__) for loop in loops]
        for thread in self._threads:
            thread.start()

    def phase(self, name: str, step: int) -> None:
        with self._progress_lock:
            self._phase, self._step, self._since, self._waited = name, step, time.time(), 0.0

    def alive(self) -> None:
        with self._progress_lock:
            self._since, self._waited = time.time(), 0.0

    def stepped(self, step: int, seconds: float) -> None:
        with self._progress_lock:
            self._step = step
            self._durations.append(seconds)
        self.alive()

    def close(self) -> None:
        """Stop; the last heartbeat has the phase `end`."""
        self.phase("end", self._step)
        self._done.set()
        for thread in self._threads:
            thread.join(_WRITE_TIMEOUT)

    def _watch(self) -> None:
        tick = min(1.0, self._stall_s / 10)
        before = time.monotonic()
        while not self._done.wait(tick):
            now = time.monotonic()
            with self._progress_lock:
                # This thread waking late means that the whole process was not running.
                self._waited += min(now - before, 2 * tick)
                before = now
                median = statistics.median(self._durations) if len(self._durations) > 1 else None
                limit = timeout(self._phase, self._stall_s, median)
                waited = self._waited
            if limit is not None and waited > limit:
                self._end(limit)

    def _end(self, limit: float) -> None:
        what = f"step {self._step + 1}" if self._phase == STEPS else f"the phase '{self._phase}'"
        path = self._workdir / f"stalled-{self._process}.txt"
        why = f"error: {what} has made no progress for {round(limit, 1):g} s (run.stall_s={self._stall_s:g})"
        message = (
            f"jaxkd: {why}, so process {self._process} exits with code {EXIT_INTERNAL}; the same command continues "
            f"from the last checkpoint. The stacks of all threads are below and in {path}:"
        )
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2)

        def write() -> None:
            with contextlib.suppress(OSError), path.open("w", encoding="utf-8") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file)
            if self._process == 0:
                self._write_beat()  # the last one may be from an earlier phase

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(_WRITE_TIMEOUT)
        # No exception reaches the main thread, and the other processes would wait until their own limit.
        multihost.abort(EXIT_INTERNAL, f"{why}; the stacks of its threads are in {path}")

    def _beat(self) -> None:
        self._write_beat()
        while not self._done.wait(_BEAT):
            self._write_beat()
        self._write_beat()

    def _write_beat(self) -> None:
        path = self._workdir / "heartbeat.json"
        with self._beat_lock, contextlib.suppress(OSError):  # writers that need the disk report that it is full
            now = {"time": time.time(), "phase": self._phase, "step": self._step, "since": self._since}
            files.write_json(path, now | {"pid": os.getpid()})
