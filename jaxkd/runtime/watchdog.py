"""Threads that look at a run from outside: one says that it lives, one ends it when nothing moves any more."""

import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from jaxkd.runtime import multihost
from jaxkd.runtime.cluster import UNFORESEEN

STEPS = "steps"
LONG = ("load", "check", "compile", "evaluation", "checkpoint", "mixture")
"""Phases that may take `_LONGER` times what a step may; all others, such as the building of rows, are not timed."""
_LONGER, _MEDIANS = 6.0, 10.0
_BEAT = 5.0  # seconds between two writes of heartbeat.json
SILENT = 60.0
"""Seconds after which a run without a heartbeat is over: network file systems show a file late."""
_GRACE = 10.0  # seconds that a file system gets to take the stacks


def limit(phase: str, patience: float, median: float | None) -> float | None:
    """Seconds that may pass without progress, None for any number.

    Args:
        phase: what the process is doing.
        patience: what a step may take, at least; 0 for no limit to anything.
        median: seconds of the steps so far; before the second one, nothing is known of them.
    """
    if not patience or phase not in (STEPS, *LONG):
        return None
    if phase == STEPS and median is not None:
        return max(patience, _MEDIANS * median)
    return _LONGER * patience


def beating(workdir: Path) -> dict[str, Any] | None:
    """The last heartbeat of a run that goes on, as far as a file can tell; None where there is none."""
    try:
        beat = json.loads((workdir / "heartbeat.json").read_text(encoding="utf-8"))
        over = beat["phase"] == "end" or time.time() - beat["time"] > SILENT
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if over else beat


class Watchdog:
    """`WORKDIR/heartbeat.json`, and exit code 70 with the stacks of all threads when nothing moves, in all processes.

    Only time in which the process could run is counted: one that was stopped (Ctrl-Z, a suspended laptop) is not late.
    """

    def __init__(self, workdir: Path, patience: float, process: int = 0):
        """Begin to watch.

        Args:
            workdir: gets heartbeat.json from process 0, and `stalled-PROCESS.txt` when it comes to that.
            patience: as `limit`.
            process: number of this one.
        """
        self._workdir, self._patience, self._process = workdir, patience, process
        self._phase, self._step, self._since = "start", 0, time.time()
        self._waited = 0.0
        self._durations: deque[float] = deque(maxlen=64)
        self._done = threading.Event()
        self._moving, self._beating = threading.Lock(), threading.Lock()
        # Apart from each other, since a write to storage that hangs must not keep the other from looking.
        threads = [self._watch] if patience else []
        threads += [self._beat] if process == 0 else []
        self._threads = [threading.Thread(target=run, daemon=True, name="jaxkd" + run.__name__) for run in threads]
        for thread in self._threads:
            thread.start()

    def phase(self, name: str, step: int) -> None:
        """Something else has begun."""
        with self._moving:
            self._phase, self._step, self._since, self._waited = name, step, time.time(), 0.0

    def alive(self) -> None:
        """There was progress within the phase."""
        with self._moving:
            self._since, self._waited = time.time(), 0.0

    def stepped(self, step: int, seconds: float) -> None:
        """A step is done."""
        with self._moving:
            self._step = step
            self._durations.append(seconds)
        self.alive()

    def close(self) -> None:
        """Stop watching; the last heartbeat has the phase `end`."""
        self.phase("end", self._step)
        self._done.set()
        for thread in self._threads:
            thread.join(_GRACE)

    def _watch(self) -> None:
        tick = min(1.0, self._patience / 10)
        before = time.monotonic()
        while not self._done.wait(tick):
            now = time.monotonic()
            with self._moving:
                # A thread that wakes late was not running, and neither was what it watches.
                self._waited += min(now - before, 2 * tick)
                before = now
                median = statistics.median(self._durations) if len(self._durations) > 1 else None
                most = limit(self._phase, self._patience, median)
                late = most if most is not None and self._waited > most else None
            if late is not None:
                self._end(late)

    def _end(self, most: float) -> None:
        what = f"step {self._step + 1}" if self._phase == STEPS else f"the phase '{self._phase}'"
        path = self._workdir / f"stalled-{self._process}.txt"
        why = f"error: {what} has made no progress for {round(most, 1):g} s (run.stall_s={self._patience:g})"
        said = (
            f"jaxkd: {why}, so process {self._process} ends with code {UNFORESEEN}; the same command goes on from the "
            f"last checkpoint. What each thread was doing is below and in {path}:"
        )
        print(said, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2)

        def write() -> None:
            with contextlib.suppress(OSError), path.open("w", encoding="utf-8") as file:
                print(said, file=file, flush=True)
                faulthandler.dump_traceback(file)
            if self._process == 0:
                self._write_beat()  # the last one may be of the phase before

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(_GRACE)
        # The main thread is where no exception reaches. The others would wait for it, as long as their own patience.
        multihost.leave(UNFORESEEN, f"{why}; what it was doing is in {path}")

    def _beat(self) -> None:
        while True:
            last = self._done.is_set()
            self._write_beat()
            if last:
                return
            self._done.wait(_BEAT)

    def _write_beat(self) -> None:
        path = self._workdir / "heartbeat.json"
        partial = path.with_suffix(".tmp")
        with self._beating, contextlib.suppress(OSError):  # a full disk is told of by what cannot do without it
            now = {"time": time.time(), "phase": self._phase, "step": self._step, "since": self._since}
            partial.write_text(json.dumps(now | {"pid": os.getpid()}) + "\n", encoding="utf-8")
            os.replace(partial, path)
