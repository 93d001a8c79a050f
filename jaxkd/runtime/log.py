"""What a run writes while it runs: JSON lines, TensorBoard, a progress bar."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from jaxkd.runtime import multihost

_WAITING = 64  # lines that may wait for the disk before the loop waits for it, too
_FLUSH = 30.0  # seconds that TensorBoard's events may wait for the disk
_REDRAW = 0.5  # seconds between two drawings of the bar


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add JSON lines and force them to disk, all with one sync; an end that was cut short before goes first."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with _named(path), path.open("a+b") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":  # of a disk that was full: what is written behind it would be lost with it
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error of a write, which does not know of what, say it: which disk is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line that a kill cut short is passed over."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if line.endswith("\n") and line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise ValueError(f"line {number} of {path} is no JSON: delete that line or restore the file") from None
    return rows


def truncate(path: Path, step: int) -> None:
    """Drop the lines of later steps, which the run is about to write again."""
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


class _Board:
    """TensorBoard's file of events: one for each line, with all of its numbers."""

    def __init__(self, directory: Path, step: int):
        """A new file, in whose favour TensorBoard forgets the events of other files from `step` on."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._flushed = directory, 0.0
        self._events = EventsWriter(str(directory / "events"))
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=step, wall_time=time.time(), session_log=start))

    def add(self, prefix: str, row: dict[str, Any], when: float) -> None:
        """The finite numbers of a line, as `prefix/name`."""
        numbers = {name: x for name, x in row.items() if name != "step" and isinstance(x, int | float)}
        values = [Summary.Value(tag=f"{prefix}/{n}", simple_value=x) for n, x in numbers.items() if math.isfinite(x)]
        self._events.write_event(Event(step=row["step"], wall_time=when, summary=Summary(value=values)))

    def flush(self, wait: float = 0.0) -> None:
        """To disk, unless that was done within the last `wait` seconds."""
        if time.monotonic() - self._flushed >= wait:
            with _named(self._directory):
                self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush, and let go of the file."""
        with _named(self._directory):
            self._events.close()


class _Line(NamedTuple):
    path: Path
    prefix: str  # of its names in TensorBoard
    row: dict[str, Any]
    when: float


class _Writer:
    """One thread that writes all lines, in their order, so that whoever has one need not wait for a disk.

    What waits is written together: one sync a file, then TensorBoard's events. Nothing is left out: where too much
    waits, `put` waits. The first error ends the thread, and is raised by every call but `close`, which raises it where
    no other has.
    """

    def __init__(self, board: _Board):
        """Nothing waits."""
        self._board, self._lines = board, list[_Line]()
        self._busy = self._asked = self._closing = self._told = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True, name="jaxkd_log")
        self._thread.start()

    def _check(self) -> None:
        if self._error is not None:
            self._told = True
            raise self._error

    def put(self, lines: list[_Line]) -> None:
        """Hand over lines, which are not to be changed any more; none at all asks for errors alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(self._lines) < _WAITING)
            self._check()
            self._lines += lines
            self._changed.notify_all()

    def settle(self, board: bool = False) -> None:
        """Come back when all lines are on disk, and TensorBoard's events where `board` says so."""
        with self._changed:
            self._asked |= board
            self._changed.notify_all()
            at_rest = lambda: not (self._lines or self._busy or self._asked)
            self._changed.wait_for(lambda: self._error is not None or at_rest())
            self._check()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if not self._told:
            self._check()

    def _run(self) -> None:
        error: BaseException | None = None
        while error is None:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._asked or self._closing)
                lines, asked, closing = self._lines, self._asked, self._closing
                self._lines, self._busy = [], True
                self._changed.notify_all()
            try:
                self._write(lines, asked)
                if closing:
                    self._board.close()
                    return
            except BaseException as raised:  # for the thread that hands over lines
                error = raised
                with contextlib.suppress(OSError):
                    self._board.close()
            with self._changed:
                self._error, self._busy, self._asked = error, False, self._asked and not asked
                self._changed.notify_all()

    def _write(self, lines: list[_Line], asked: bool) -> None:
        files: dict[Path, list[dict[str, Any]]] = {}
        for line in lines:
            files.setdefault(line.path, []).append(line.row)
        for path, rows in files.items():
            append(path, rows)
        for line in lines:
            self._board.add(line.prefix, line.row, line.when)
        self._board.flush(0.0 if asked else _FLUSH)


class TrainLog:
    """The three outputs of a training run, side by side. Of several processes the first writes.

    Files are written by a thread (`_Writer`): the loop hands over its lines and goes on. A step's line is on disk some
    milliseconds later. What decides anything is there before it is looked for: evaluations and mixtures when their call
    returns, and all steps up to a checkpoint's before it is begun, after `flush`. A kill may therefore lose the last
    steps' lines, and never one in the middle; those are of steps after the newest checkpoint, from which the next
    process goes on: it drops what there is of them and makes them again, bit for bit.

    An error of the thread, such as a full disk, is raised by the next call.
    """

    def __init__(self, workdir: Path, steps: int, step: int, interval: int):
        """Go on after `step`: later lines of an earlier process are dropped.

        Args:
            workdir: gets `metrics.jsonl`, `evals.jsonl`, `mixture.jsonl` and `tensorboard/`.
            steps: of the whole run.
            step: where this process starts.
            interval: the first step of the interval that `step` is in, or that ends with it.
        """
        self._metrics, self._evals, self._mixture = (
            workdir / f"{name}.jsonl" for name in ("metrics", "evals", "mixture")
        )
        writes = multihost.is_main()
        self._writer: _Writer | None = None
        if writes:
            for path, last in ((self._metrics, step), (self._evals, step), (self._mixture, interval)):
                truncate(path, last)
            self._writer = _Writer(_Board(workdir / "tensorboard", step + 1))
        # The last, so that what goes wrong above is not said on the bar's line.
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=_REDRAW,
            disable=not writes,
        )

    def _put(self, path: Path, prefixes: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
        if self._writer is not None:
            self._writer.put([_Line(path, prefix, row, time.time()) for prefix, row in zip(prefixes, rows)])

    def _settle(self, board: bool = False) -> None:
        if self._writer is not None:
            self._writer.settle(board)

    def step(self, row: dict[str, Any], write: bool) -> None:
        """One step's numbers: always to the bar, and to the files when `write`.

        Raises:
            OSError: a line before this one could not be written.
        """
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        self._bar.set_postfix_str(f"loss {loss}, {row['tokens_per_s']:,.0f} tokens/s", refresh=False)
        self._bar.update(1)
        self._put(self._metrics, ["train"], [row] if write else [])

    def restart_evaluation(self, step: int) -> None:
        """Forget an evaluation that a kill cut short."""
        if self._writer is not None:
            self._settle()
            truncate(self._evals, step - 1)

    def flush(self) -> None:
        """Wait until all that was logged is on disk.

        Raises:
            OSError: it could not be written.
        """
        self._settle(board=True)

    def evaluation(self, rows: list[dict[str, Any]]) -> None:
        """One evaluation's rows, a domain each, to the files; they are on disk afterwards."""
        self._put(self._evals, [f"eval/{row['domain']}" for row in rows], rows)
        self._settle()

    def mixture(self, row: dict[str, Any]) -> None:
        """What an interval is drawn from, to the files, before its first step; it is on disk afterwards."""
        self._put(self._mixture, ["mixture"], [row])
        self._settle()

    def say(self, text: str) -> None:
        """Print without breaking the bar."""
        self._bar.clear()
        multihost.say(text)
        self._bar.refresh()

    def close(self) -> None:
        """Write what waits, and end the thread that does.

        Raises:
            OSError: it could not be written, and nobody has been told.
        """
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
