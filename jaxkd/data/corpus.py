"""The distinct documents of a source, spooled to disk, and their split into training and validation."""

import array
import hashlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxkd.data.sources import Source
from jaxkd.runtime.progress import bar as progress_bar


class Corpus(NamedTuple):
    """Distinct documents, spooled to a temporary file and indexed by small arrays."""

    file: BinaryIO
    offsets: np.ndarray  # int64 [documents + 1]
    order: np.ndarray  # uint64 [documents], a keyed hash of the text
    group: np.ndarray  # uint64 [documents], a keyed hash of the group's name
    duplicates: int

    def require_two_groups(self, what: str) -> None:
        """Raises ValueError when there are fewer than two groups, one to train and one to validate on."""
        groups = len(np.unique(self.group))
        if groups < 2:
            raise ValueError(
                f"{what} has {len(self.order)} distinct documents in {groups} groups; 2 groups are needed, one to "
                "train and one to validate on: split the text into more documents (files, or lines of JSONL)"
            )

    def size(self, chosen: np.ndarray) -> int:
        """Bytes of the documents with these indices."""
        return int(np.diff(self.offsets)[chosen].sum())

    def texts(self, chosen: np.ndarray) -> Iterator[str]:
        """Documents by index, one after another."""
        for i in chosen:
            self.file.seek(self.offsets[i])
            yield self.file.read(self.offsets[i + 1] - self.offsets[i]).decode()


def _keyed(text: bytes, seed: int) -> int:
    keyed = hashlib.blake2b(text, digest_size=8, key=f"jaxkd {seed}".encode())
    return int.from_bytes(keyed.digest(), "little")


def collect(source: Source, file: BinaryIO, seed: int, name: str, progress: bool) -> Corpus:
    """Read all documents once, drop duplicates and empty ones, and write the others to `file`.

    Two documents are duplicates when they agree in all but case and white space.

    Args:
        source: of the text.
        file: receives the text.
        seed: of the documents' order and split.
        name: the domain's, for the progress bar.
        progress: show it on stderr.
    """
    seen: set[bytes] = set()
    offsets, order, group = array.array("q", [0]), array.array("Q"), array.array("Q")
    duplicates = 0
    title = f"{name}: reading"
    for document in progress_bar(source.documents(), title, unit="documents", shown=progress, leave=False):
        folded = " ".join(document.text.split()).casefold().encode("utf-8", "replace")
        digest = hashlib.sha256(folded).digest()[:16]
        if not folded:
            continue
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        # Lone surrogates, which JSON can spell, have no UTF-8 form.
        offsets.append(offsets[-1] + file.write(document.text.encode("utf-8", "replace")))
        order.append(_keyed(digest, seed))
        group.append(_keyed(document.group.encode("utf-8", "replace"), seed))
    file.flush()
    return Corpus(file, np.array(offsets, np.int64), np.array(order, np.uint64), np.array(group, np.uint64), duplicates)


def divide(corpus: Corpus, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation documents, in order of use; a group's documents stay together.

    Groups go to validation in the order of their hash while they fit into the share of the text; if none fits, the
    smallest does. So one huge group cannot take the training text, and neither split is empty.
    """
    groups, member = np.unique(corpus.group, return_inverse=True)  # sorted by hash
    size = np.bincount(member, weights=np.diff(corpus.offsets)).astype(np.int64)
    room, valid = int(share * size.sum()), np.zeros(len(groups), bool)
    for number in range(len(groups)):
        if size[number] <= room:
            valid[number] = True
            room -= int(size[number])
    if not valid.any():
        valid[np.argmin(size)] = True
    ordered = np.argsort(corpus.order, kind="stable")
    return ordered[~valid[member[ordered]]], ordered[valid[member[ordered]]]
