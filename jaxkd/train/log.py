"""What a run writes while it runs: JSON lines, TensorBoard, a progress bar."""

import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxkd import unison


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add JSON lines and force them to disk, so that a kill loses at most a line that was being written."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line that a kill cut short is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            rows.append(json.loads(line))
    return rows


def truncate(path: Path, step: int) -> None:
    """Drop the lines of later steps, which the run is about to write again."""
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


class TrainLog:
    """The three outputs of a training run, side by side. Of several processes the first writes."""

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
        self._writes = unison.first()
        for path, last in ((self._metrics, step), (self._evals, step), (self._mixture, interval)):
            self._truncate(path, last)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, write_to_disk=self._writes)
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            smoothing=0.1,
            disable=not self._writes,
        )

    def _append(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        if self._writes:
            append(path, rows)

    def _truncate(self, path: Path, step: int) -> None:
        if self._writes:
            truncate(path, step)

    def step(self, row: dict[str, Any], write: bool) -> None:
        """One step's numbers: always to the bar, and to the files when `write`."""
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        self._bar.set_postfix_str(f"loss {loss}, {row['tokens_per_s']:,.0f} tokens/s", refresh=False)
        self._bar.update(1)
        if write:
            self._append(self._metrics, [row])
            self._to_board("train", row, row["step"])

    def restart_evaluation(self, step: int) -> None:
        """Forget an evaluation that a kill cut short."""
        self._truncate(self._evals, step - 1)

    def flush(self) -> None:
        """Bring TensorBoard's events to disk, as the JSON lines already are."""
        self._board.flush()

    def evaluation(self, rows: list[dict[str, Any]]) -> None:
        """One evaluation's rows, a domain each, to the files."""
        self._append(self._evals, rows)
        for row in rows:
            self._to_board(f"eval/{row['domain']}", row, row["step"])

    def mixture(self, row: dict[str, Any]) -> None:
        """What an interval is drawn from, to the files, before its first step."""
        self._append(self._mixture, [row])
        self._to_board("mixture", row, row["step"])

    def _to_board(self, prefix: str, row: dict[str, Any], step: int) -> None:
        for name, number in row.items():
            if name != "step" and isinstance(number, int | float) and math.isfinite(number):
                self._board.add_scalar(f"{prefix}/{name}", number, step)

    def say(self, text: str) -> None:
        """Print without breaking the bar."""
        self._bar.clear()
        unison.say(text)
        self._bar.refresh()

    def close(self) -> None:
        """Flush everything."""
        self._bar.close()
        self._board.close()
