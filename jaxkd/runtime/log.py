"""What a training run writes: JSON lines, TensorBoard, a progress bar."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jaxkd.runtime import files, multihost, progress

_QUEUE = 64  # rows that may wait for the disk before the training loop blocks
_FLUSH = 30.0  # seconds between two flushes of TensorBoard's events


def _drop_after(path: Path, step: int) -> None:
    """Drop the rows after `step`, which the resumed run writes again."""
    if path.exists():
        files.write_jsonl(path, [row for row in files.read_jsonl(path) if row["step"] <= step])


_Row = tuple[Path, str, dict[str, Any], float]  # file, prefix of the names in TensorBoard, row, time


class _Writer:
    """One thread that writes all rows in order: JSON lines, and one TensorBoard event per row with its finite numbers.

    Queued rows are written together, with one fsync per file. The first error stops all writing; every later call
    raises it, `close` only if no other call did.
    """

    def __init__(self, board: Path, step: int):
        """TensorBoard discards events of other files in `board` from `step` on."""
        board.mkdir(parents=True, exist_ok=True)
        self._board, self._flushed = board, 0.0
        self._events = EventsWriter(str(board / "events"))
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=step, wall_time=time.time(), session_log=start))
        self._queue, self._lock = list[_Row](), threading.Lock()
        self._error: BaseException | None = None
        self._raised = False
        self._thread = ThreadPoolExecutor(1, "jaxkd_log")

    def _check(self) -> None:
        if self._error is not None:
            self._raised = True
            raise self._error

    def put(self, rows: list[_Row]) -> None:
        """Queue rows, which the caller must not change afterwards; waits for the disk while the queue is full."""
        if len(self._queue) + len(rows) > _QUEUE:
            self.settle()
        self._check()
        if rows:
            with self._lock:
                self._queue += rows
            self._thread.submit(self._write)

    def settle(self, board: bool = False) -> None:
        """Return when all rows are on disk, and with `board` TensorBoard's events too."""
        self._thread.submit(self._write, 0.0 if board else _FLUSH).result()
        self._check()

    def close(self) -> None:
        self._thread.shutdown()
        if self._error is None:
            with files.errors_name(self._board):
                self._events.close()
        elif not self._raised:
            self._check()

    def _write(self, flush: float = _FLUSH) -> None:
        """Write the queue; flush TensorBoard's events unless that was done within the last `flush` seconds."""
        with self._lock:
            rows, self._queue = self._queue, []
        if self._error is not None:
            return
        try:
            for path in dict.fromkeys(path for path, *_ in rows):
                files.append_jsonl(path, [row for of, _, row, _ in rows if of == path])
            with files.errors_name(self._board):
                for _, prefix, row, when in rows:
                    numbers = {name: x for name, x in row.items() if name != "step" and isinstance(x, int | float)}
                    finite = {f"{prefix}/{name}": x for name, x in numbers.items() if math.isfinite(x)}
                    summary = Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in finite.items()])
                    self._events.write_event(Event(step=row["step"], wall_time=when, summary=summary))
                if time.monotonic() - self._flushed >= flush:
                    self._events.flush()
                    self._flushed = time.monotonic()
        except BaseException as error:  # raised in the thread that calls `put`, `settle` or `close`
            with contextlib.suppress(OSError):
                self._events.close()
            self._error = error


class TrainLog:
    """JSON lines, TensorBoard and the progress bar of a training run; only process 0 writes.

    A thread (`_Writer`) writes the files. A step's row reaches the disk some milliseconds after `step`; `evaluation`
    and `mixture` return when their rows are on disk, and `flush`, called before each checkpoint, when all are. So a
    kill loses only the last rows, all later than the newest checkpoint; a resumed run drops what is left of them and
    writes them again, bit for bit. Errors of the thread, such as a full disk, are raised by the next call.
    """

    def __init__(self, workdir: Path, steps: int, step: int, interval: int):
        """Open the files for a run of `steps`, and drop rows that an earlier process wrote after `step`.

        `interval` is the first step of the mixture interval that contains `step` or ends with it.
        """
        self._metrics, self._evals, self._mixture, self._samples, self._diagnostics = (
            workdir / f"{name}.jsonl" for name in ("metrics", "evals", "mixture", "samples", "diagnostics")
        )
        of_evaluations = (self._evals, self._samples, self._diagnostics)
        writes = multihost.is_main()
        self._writer: _Writer | None = None
        if writes:
            for path, last in (
                (self._metrics, step),
                *((path, step) for path in of_evaluations),
                (self._mixture, interval),
            ):
                _drop_after(path, last)
            self._writer = _Writer(workdir / "tensorboard", step + 1)
        # Created last, so that errors above are not printed on the bar's line.
        self._bar = progress.bar(title="train", total=steps, unit="steps", initial=step, shown=writes, at_once=True)
        self._shares: dict[str, float] = {}

    def _put(self, path: Path, prefixes: Iterable[str], rows: Iterable[dict[str, Any]], settle: bool = True) -> None:
        if self._writer is not None:
            self._writer.put([(path, prefix, row, time.time()) for prefix, row in zip(prefixes, rows)])
            if settle:
                self._writer.settle()

    def step(self, row: dict[str, Any], write: bool) -> None:
        """Show a step's row on the bar, and write it to the files if `write`."""
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        self._bar.set_postfix_str(f"loss {loss}, {row['tokens_per_s']:,.0f} tokens/s", refresh=False)
        self._bar.update(1)
        self._put(self._metrics, ["train"], [row] if write else [], settle=False)

    def compiling(self) -> None:
        """Announce the first step, which includes the compilation."""
        self._bar.clear()
        if self._writer is not None:
            print("train: compiling the step", file=sys.stderr, flush=True)
        self._bar.refresh()

    def restart_evaluation(self, step: int) -> None:
        """Drop the rows of an evaluation that was interrupted at `step`."""
        if self._writer is not None:
            self._writer.settle()
            for path in (self._evals, self._samples, self._diagnostics):
                _drop_after(path, step - 1)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.settle(board=True)

    def evaluation(self, rows: list[dict[str, Any]]) -> None:
        """Write an evaluation's rows, one per domain, and wait until they are on disk."""
        self._put(self._evals, [f"eval/{row['domain']}" for row in rows], rows)

    def samples(self, rows: list[dict[str, Any]], diagnostics: dict[str, Any]) -> None:
        """Write an evaluation's samples and the figures of the student's own text; they are on disk before its rows."""
        self._put(self._samples, [f"sample/{row['author']}" for row in rows], rows, settle=False)
        self._put(self._diagnostics, ["own_text"], [diagnostics], settle=False)

    def mixture(self, row: dict[str, Any]) -> None:
        """Write the mixture of an interval before its first step, and wait until it is on disk."""
        self._put(self._mixture, ["mixture"], [row])
        shares = {name.removeprefix("share/"): x for name, x in row.items() if name.startswith("share/")}
        if shares != self._shares and isinstance(self._bar, progress.Lines):
            text = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            print(f"train: shares from step {row['step']}: {text}", file=sys.stderr, flush=True)
        self._shares = shares

    def say(self, text: str) -> None:
        self._bar.clear()
        multihost.print_main(text)
        self._bar.refresh()

    def close(self) -> None:
        """Write the queue and end the writer's thread; raises its error if no call has yet."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
