"""What a training run writes: JSON lines, TensorBoard, a progress bar."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

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


class _Board:
    """TensorBoard's event file: one event per row, with all of its numbers."""

    def __init__(self, directory: Path, step: int):
        """Open a new file; TensorBoard discards events of other files from `step` on."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._flushed = directory, 0.0
        self._events = EventsWriter(str(directory / "events"))
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=step, wall_time=time.time(), session_log=start))

    def add(self, prefix: str, row: dict[str, Any], when: float) -> None:
        """Add the finite numbers of a row as `prefix/name`."""
        numbers = {name: x for name, x in row.items() if name != "step" and isinstance(x, int | float)}
        values = [Summary.Value(tag=f"{prefix}/{n}", simple_value=x) for n, x in numbers.items() if math.isfinite(x)]
        self._events.write_event(Event(step=row["step"], wall_time=when, summary=Summary(value=values)))

    def flush(self, wait: float = 0.0) -> None:
        """Flush to disk, unless that was done within the last `wait` seconds."""
        if time.monotonic() - self._flushed >= wait:
            with files.errors_name(self._directory):
                self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        with files.errors_name(self._directory):
            self._events.close()


class _Row(NamedTuple):
    path: Path
    prefix: str  # of its names in TensorBoard
    row: dict[str, Any]
    when: float


class _Writer:
    """One thread that writes all rows in order, so that the training loop does not wait for the disk.

    Queued rows are written together: one fsync per file, then TensorBoard's events. `put` blocks while the queue is
    full. The first error ends the thread; every later call raises it, `close` only if no other call did.
    """

    def __init__(self, board: _Board):
        """Start the thread."""
        self._board, self._queue = board, list[_Row]()
        self._busy = self._flush_board = self._closing = self._raised = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True, name="jaxkd_log")
        self._thread.start()

    def _check(self) -> None:
        if self._error is not None:
            self._raised = True
            raise self._error

    def put(self, rows: list[_Row]) -> None:
        """Queue rows, which the caller must not change afterwards; an empty list only checks for errors."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(self._queue) < _QUEUE)
            self._check()
            self._queue += rows
            self._changed.notify_all()

    def settle(self, board: bool = False) -> None:
        """Return when all rows are on disk, and with `board` TensorBoard's events too."""
        with self._changed:
            self._flush_board |= board
            self._changed.notify_all()
            idle = lambda: not (self._queue or self._busy or self._flush_board)
            self._changed.wait_for(lambda: self._error is not None or idle())
            self._check()

    def close(self) -> None:
        """Write the queue and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if not self._raised:
            self._check()

    def _run(self) -> None:
        error: BaseException | None = None
        while error is None:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._flush_board or self._closing)
                rows, flush, closing = self._queue, self._flush_board, self._closing
                self._queue, self._busy = [], True
                self._changed.notify_all()
            try:
                self._write(rows, flush)
                if closing:
                    self._board.close()
                    return
            except BaseException as raised:  # re-raised in the thread that calls `put`, `settle` or `close`
                error = raised
                with contextlib.suppress(OSError):
                    self._board.close()
            with self._changed:
                self._error, self._busy, self._flush_board = error, False, self._flush_board and not flush
                self._changed.notify_all()

    def _write(self, rows: list[_Row], flush: bool) -> None:
        by_path: dict[Path, list[dict[str, Any]]] = {}
        for row in rows:
            by_path.setdefault(row.path, []).append(row.row)
        for path, together in by_path.items():
            files.append_jsonl(path, together)
        for row in rows:
            self._board.add(row.prefix, row.row, row.when)
        self._board.flush(0.0 if flush else _FLUSH)


class TrainLog:
    """JSON lines, TensorBoard and the progress bar of a training run; only process 0 writes.

    A thread (`_Writer`) writes the files. A step's row reaches the disk some milliseconds after `step`; `evaluation`
    and `mixture` return when their rows are on disk, and `flush`, called before each checkpoint, when all are. So a
    kill loses only the last rows, all later than the newest checkpoint; a resumed run drops what is left of them and
    writes them again, bit for bit. Errors of the thread, such as a full disk, are raised by the next call.
    """

    def __init__(self, workdir: Path, steps: int, step: int, interval: int):
        """Open the files, and drop rows that an earlier process wrote after `step`.

        Args:
            workdir: gets `metrics.jsonl`, `evals.jsonl`, `mixture.jsonl` and `tensorboard/`.
            steps: of the whole run.
            step: where this process starts.
            interval: first step of the mixture interval that contains `step` or ends with it.
        """
        self._metrics, self._evals, self._mixture = (
            workdir / f"{name}.jsonl" for name in ("metrics", "evals", "mixture")
        )
        writes = multihost.is_main()
        self._writer: _Writer | None = None
        if writes:
            for path, last in ((self._metrics, step), (self._evals, step), (self._mixture, interval)):
                _drop_after(path, last)
            self._writer = _Writer(_Board(workdir / "tensorboard", step + 1))
        # Created last, so that errors above are not printed on the bar's line.
        self._bar = progress.bar(title="train", total=steps, unit="steps", initial=step, shown=writes, at_once=True)
        self._shares: dict[str, float] = {}

    def _put(self, path: Path, prefixes: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
        if self._writer is not None:
            self._writer.put([_Row(path, prefix, row, time.time()) for prefix, row in zip(prefixes, rows)])

    def _settle(self, board: bool = False) -> None:
        if self._writer is not None:
            self._writer.settle(board)

    def step(self, row: dict[str, Any], write: bool) -> None:
        """Show a step's row on the bar, and write it to the files if `write`.

        Raises:
            OSError: an earlier row could not be written.
        """
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        self._bar.set_postfix_str(f"loss {loss}, {row['tokens_per_s']:,.0f} tokens/s", refresh=False)
        self._bar.update(1)
        self._put(self._metrics, ["train"], [row] if write else [])

    def compiling(self) -> None:
        """Announce the first step, which includes the compilation."""
        self._bar.clear()
        if self._writer is not None:
            print("train: compiling the step", file=sys.stderr, flush=True)
        self._bar.refresh()

    def restart_evaluation(self, step: int) -> None:
        """Drop the rows of an evaluation that was interrupted at `step`."""
        if self._writer is not None:
            self._settle()
            _drop_after(self._evals, step - 1)

    def flush(self) -> None:
        """Wait until all rows are on disk.

        Raises:
            OSError: a row could not be written.
        """
        self._settle(board=True)

    def evaluation(self, rows: list[dict[str, Any]]) -> None:
        """Write an evaluation's rows, one per domain, and wait until they are on disk."""
        self._put(self._evals, [f"eval/{row['domain']}" for row in rows], rows)
        self._settle()

    def mixture(self, row: dict[str, Any]) -> None:
        """Write the mixture of an interval before its first step, and wait until it is on disk."""
        self._put(self._mixture, ["mixture"], [row])
        self._settle()
        shares = {name.removeprefix("share/"): x for name, x in row.items() if name.startswith("share/")}
        if shares != self._shares and isinstance(self._bar, progress.Lines):
            text = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            print(f"train: shares from step {row['step']}: {text}", file=sys.stderr, flush=True)
        self._shares = shares

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.clear()
        multihost.print_main(text)
        self._bar.refresh()

    def close(self) -> None:
        """Write the queue and end the writer's thread.

        Raises:
            OSError: a row could not be written, and no call has raised it yet.
        """
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
