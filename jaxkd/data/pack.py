"""From documents' tokens to rows of one length, with nothing lost and no padding that could be avoided.

A document longer than a row is cut so that neighbouring pieces share one token: that token is the last of one
piece, where it is a target, and the first of the next, where it is only context. Every token but a document's
first is then a target exactly once, and so is every byte of text that it stands for.
"""

from collections.abc import Iterable, Iterator

import numpy as np

Row = dict[str, np.ndarray]


def pieces(ids: np.ndarray, length: int) -> list[slice]:
    """Cut a document into pieces of at most `length` tokens, each sharing one token with the piece before.

    Args:
        ids: a document's tokens [n], with its start and end tokens.
        length: tokens in a row, at least 2.

    Returns:
        slices of `ids`, each of 2 to `length` tokens; none for a document of fewer than 2 tokens.

    Raises:
        ValueError: `length` is below 2, so that no row could hold a target.
    """
    if length < 2:
        raise ValueError(f"a row needs at least 2 tokens to have a target, got length={length}")
    return [slice(start, min(start + length, len(ids))) for start in range(0, len(ids) - 1, length - 1)]


class _Open:
    """A row that is being filled."""

    def __init__(self, length: int) -> None:
        self.row: Row = {name: np.zeros(length, np.int32) for name in ("tokens", "segments", "positions")}
        self.row["bytes"] = np.zeros((), np.int64)
        self.used = 0
        self.pieces = 0

    def add(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        where = slice(self.used, self.used + len(ids))
        self.used += len(ids)
        self.pieces += 1
        self.row["tokens"][where] = ids
        self.row["segments"][where] = self.pieces
        self.row["positions"][where] = np.arange(len(ids))
        self.row["bytes"] += sizes[1:].sum()  # a piece's first token is not a target in this row


def pack(documents: Iterable[tuple[np.ndarray, np.ndarray]], length: int, open_rows: int = 64) -> Iterator[Row]:
    """Pack documents into rows by best fit among a bounded number of open rows.

    Args:
        documents: (token ids [n], bytes of text each token stands for [n]) per document.
        length: tokens in a row, at least 2.
        open_rows: rows kept open; beyond that the fullest is given out.

    Yields:
        `tokens`, `segments` (1, 2, ... per piece; 0 is padding), `positions` (from 0 in each segment), int32
        [length]; `bytes`, int64 []: text bytes of the targets that the row scores.

    Raises:
        ValueError: `length` is below 2 or `open_rows` below 1.
    """
    if open_rows < 1:
        raise ValueError(f"at least one row must be open to pack into, got open_rows={open_rows}")
    waiting: list[_Open] = []
    for ids, sizes in documents:
        for piece in pieces(ids, length):
            size = piece.stop - piece.start
            fitting = [row for row in waiting if row.used + size <= length]
            target = max(fitting, key=lambda row: row.used) if fitting else _Open(length)
            if not fitting:
                waiting.append(target)
            target.add(ids[piece], sizes[piece])
            if target.used > length - 2:  # no piece is that short
                waiting.remove(target)
                yield target.row
            elif len(waiting) > open_rows:
                fullest = max(waiting, key=lambda row: row.used)
                waiting.remove(fullest)
                yield fullest.row
    for rest in waiting:
        yield rest.row
