"""Packs documents' tokens into rows of one length, best fit.

A longer document is cut into pieces that overlap by one token, so that each token but the first is a target once.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]
"""Arrays by name; `aux` is a dict of further ones."""


class Tokens(NamedTuple):
    """A document's tokens, with its start and end token."""

    ids: np.ndarray  # int32 [n]
    sizes: np.ndarray  # int64 [n], bytes of text that each token stands for
    weights: np.ndarray | None = None  # float32 [n], in the loss, of each token as a target; None is 1 for all
    context: np.ndarray | None = None  # int32 [m], what the teacher reads before the first of them with a weight

    def cut(self, span: slice) -> "Tokens":
        weights = None if self.weights is None else self.weights[span]
        return self._replace(ids=self.ids[span], sizes=self.sizes[span], weights=weights)


def pieces(ids: np.ndarray, length: int) -> list[slice]:
    """Slices of 2 to `length` of a document's tokens [n], each overlapping the one before by one; [] where n < 2."""
    return [slice(start, min(start + length, len(ids))) for start in range(0, len(ids) - 1, length - 1)]


class _OpenRow:
    def __init__(self, length: int) -> None:
        self.row: Row = {name: np.zeros(length, np.int32) for name in ("tokens", "segments", "positions")}
        self.row |= {"weights": np.zeros(length, np.float32), "bytes": np.zeros((), np.int64)}
        self.used = self.pieces = 0

    def add(self, ids: np.ndarray, sizes: np.ndarray, weights: np.ndarray | None) -> None:
        span = slice(self.used, self.used + len(ids))
        targets = np.ones(len(ids) - 1, np.float32) if weights is None else weights[1:]
        self.used += len(ids)
        self.pieces += 1
        self.row["tokens"][span] = ids
        self.row["segments"][span] = self.pieces
        self.row["positions"][span] = np.arange(len(ids))
        # A piece's first token is not a target in this row, and its last one has none.
        self.row["weights"][span.start : span.stop - 1] = targets
        self.row["bytes"] += sizes[1:][targets != 0].sum()


def pack(documents: Iterable[Tokens], length: int, open_rows: int = 64) -> Iterator[Row]:
    """Pack documents into rows by best fit among `open_rows` rows; beyond that number the fullest is yielded.

    A row has `tokens`, `segments` (1, 2, ... per piece; 0 is padding) and `positions` (from 0 in each segment), int32
    [length]; `weights`, float32 [length], of the target after each token; and `bytes`, int64 []: text bytes of the
    targets that have a weight.
    """
    waiting: list[_OpenRow] = []
    for document in documents:
        for piece in pieces(document.ids, length):
            if document.weights is not None and not document.weights[piece][1:].any():
                continue  # nothing to learn in it
            size = piece.stop - piece.start
            fitting = [row for row in waiting if row.used + size <= length]
            target = max(fitting, key=lambda row: row.used) if fitting else _OpenRow(length)
            if not fitting:
                waiting.append(target)
            target.add(*document.cut(piece)[:3])
            if target.used > length - 2:  # no piece is that short
                waiting.remove(target)
                yield target.row
            elif len(waiting) > open_rows:
                fullest = max(waiting, key=lambda row: row.used)
                waiting.remove(fullest)
                yield fullest.row
    for unfinished in waiting:
        yield unfinished.row


def one_each(documents: Iterable[Tokens], length: int, context: int = 0) -> Iterator[Row]:
    """Rows as `pack` gives them, of one document's first `length` tokens each.

    With `context` C, `aux` has the teacher's prompt: `context` int32 [C], and `context_length`. Documents without a
    weight in the row are dropped. Raises ValueError: a document without a prompt, or with one longer than C.
    """
    for document in documents:
        head = document.cut(slice(0, length))
        if len(head.ids) < 2 or (head.weights is not None and not head.weights[1:].any()):
            continue
        opened = _OpenRow(length)
        opened.add(*head[:3])
        if context:
            prompt = document.context
            if prompt is None:
                raise ValueError("data.context is for conversations, and a record is plain text: set it to 0")
            if len(prompt) > context:
                raise ValueError(f"data.context={context} is too small: a teacher's prompt has {len(prompt)} tokens")
            padded = np.pad(prompt, (0, context - len(prompt)))
            opened.row["aux"] = {"context": padded, "context_length": np.asarray(len(prompt), np.int32)}
        yield opened.row
