"""Packed rows of one domain and split, read back in any order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath


class Rows:
    """A prepared domain's rows in one split.

    A row stores tokens, segments, positions and weights; targets only where they are not the next tokens of the
    segment; and further arrays by name (`Batch.aux`).
    """

    def __init__(self, path: epath.PathLike, split: str) -> None:
        """Open `prepare`'s directory and read the first and last row, so that damage shows before training."""
        self.path, self.split = epath.Path(path), split
        if not (self.path / "dataset_info.json").is_file():
            raise FileNotFoundError(f"{self.path} holds no prepared rows: prepare the domain first")
        try:
            builder = tfds.builder_from_directory(self.path)
        except Exception as error:  # TFDS raises many types: broken JSON, missing features, another format
            raise self._damaged(error) from None
        if split not in builder.info.splits:
            raise ValueError(f"{self.path} has no split {split!r}, it has {sorted(builder.info.splits)}")
        self._size = int(builder.info.splits[split].num_examples)
        try:
            self._data: Any = builder.as_data_source(split=split)
            stored = len(self._data)
            ends = self._data.__getitems__([0, self._size - 1])
        except Exception as error:
            raise self._damaged(error) from None
        if stored != self._size:
            raise self._damaged(f"it has {stored} of {self._size} rows")
        self.length = int(ends[0]["tokens"].shape[0])
        # Shape and dtype of each of a row's further arrays.
        self.aux = {name: (np.shape(value), np.asarray(value).dtype) for name, value in ends[0].get("aux", {}).items()}

    def _damaged(self, why: object) -> ValueError:
        reason = (str(why).strip() or type(why).__name__).splitlines()[0]
        return ValueError(
            f"the rows in {self.path} ({self.split}) are damaged: {reason}. Delete that directory and prepare it again"
        )

    def __len__(self) -> int:
        return self._size

    def read(self, indices: Sequence[int | np.integer] | np.ndarray) -> dict[str, Any]:
        """Rows by index [n], in any order, repeats allowed.

        Gives tokens, targets, segments, positions int32 [n, length]; weights float32 [n, length]; bytes int64 [n], of
        the text of a row's weighted targets; aux, a dict of arrays [n, ...]. Where targets are not stored,
        `targets[t] = tokens[t + 1]` within a segment and 0 at its end.
        """
        indices = [int(index) for index in indices]
        if indices and (min(indices) < 0 or max(indices) >= self._size):
            raise IndexError(f"row index {min(indices)} or {max(indices)} is not in the {self._size} of {self.path}")
        try:
            return self._stacked(self._data.__getitems__(indices) if indices else [])
        except Exception as error:
            raise self._damaged(error) from None

    def _stacked(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        def stack(name: str, dtype: type) -> np.ndarray:
            return np.array([row[name] for row in rows], dtype).reshape(len(rows), self.length)

        stored = {name: stack(name, np.int32) for name in ("tokens", "segments", "positions")}
        if rows and "targets" in rows[0]:
            targets = stack("targets", np.int32)
        else:
            segment, following = stored["segments"][:, :-1], stored["segments"][:, 1:]
            targets = np.zeros_like(stored["tokens"])
            targets[:, :-1] = np.where((segment == following) & (segment > 0), stored["tokens"][:, 1:], 0)
        return {
            **stored,
            "targets": targets,
            "weights": stack("weights", np.float32),
            "bytes": np.array([row["bytes"] for row in rows], np.int64),
            "aux": {
                name: np.array([row["aux"][name] for row in rows], dtype).reshape(len(rows), *shape)
                for name, (shape, dtype) in self.aux.items()
            },
        }


class MemoryRows(Rows):
    """Rows in memory, at least one, as `pack` yields them; `name` is for messages."""

    def __init__(self, rows: Sequence[dict[str, np.ndarray]], name: str) -> None:
        self.path, self.split, self._size = epath.Path(name), "valid", len(rows)
        self.length, self.aux = len(rows[0]["tokens"]), {}
        self._rows, self._data = rows, self

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self._rows[index] for index in indices]
