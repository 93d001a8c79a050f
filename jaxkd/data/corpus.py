"""The distinct documents of a source, spooled to disk, and their split into training and validation."""

import array
import hashlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxkd.data.records import BadRecord, Document
from jaxkd.data.sources import Source
from jaxkd.runtime.progress import bar as progress_bar

_SAMPLE = 100  # records after which a source of bad ones alone is given up


class Reading(NamedTuple):
    """Result of reading a source, stored so that an unchanged source is not read again."""

    digest: str  # sha256 of all that rows depend on: the distinct texts, their groups and split, in any order
    records: int
    duplicates: int  # documents left out because another one has the same text
    bad: int  # records left out because they hold no text
    first_bad: str  # location and fault of the first; "" for none
    chats: int = 0  # documents that are conversations

    def require_good(self, name: str, share: float) -> None:
        """Raises ValueError when more than a share of a domain's records are bad."""
        if self.bad > share * self.records:
            counts = f"{self.bad:,} of the {self.records:,} records are bad, above data.bad_records={share}"
            raise ValueError(f"domain {name!r}: {counts}; the first is {self.first_bad}")


class Corpus(NamedTuple):
    """Distinct documents, spooled to a temporary file and indexed by small arrays [documents]."""

    file: BinaryIO
    start: np.ndarray  # int64, in the file
    size: np.ndarray  # int64, bytes
    order: np.ndarray  # uint64, a keyed hash of the text
    group: np.ndarray  # uint64, a keyed hash of the group's name, or of the text
    held_out: np.ndarray  # bool: of the source's own validation text
    chat: np.ndarray  # bool: a conversation
    reading: Reading

    def documents(self, chosen: np.ndarray) -> Iterator[Document]:
        for i in chosen:
            self.file.seek(self.start[i])
            yield Document(None, self.file.read(self.size[i]).decode(), bool(self.chat[i]))


def _keyed(text: bytes, seed: int) -> int:
    keyed = hashlib.blake2b(text, digest_size=8, key=f"jaxkd {seed}".encode())
    return int.from_bytes(keyed.digest(), "little")


def _identity(document: Document, text: bytes, held_out: bool) -> int:
    group = b"-" if document.group is None else b"+" + document.group.encode("utf-8", "replace")
    hashed = hashlib.blake2b(b"%d%d " % (held_out, len(group)) + group, digest_size=16)
    hashed.update(text)
    return int.from_bytes(hashed.digest(), "little")


def collect(source: Source, file: BinaryIO, seed: int, name: str, bad_records: float, progress: bool) -> Corpus:
    """Read all documents once, drop duplicates and empty ones, and write the others to `file`.

    Two documents are duplicates when they agree in all but case and white space. One in the validation text is kept
    before one in the training text. Otherwise the first is kept, but among documents without a group, whose order
    depends on the names of files, the one with the smallest hash.
    """
    index: dict[bytes, int] = {}
    identity: list[int] = []
    start, size, order, group, chat = (array.array(kind) for kind in "qqQQb")
    duplicates = records = bad = held_out = end = 0
    first_bad = ""
    sides = [(True, source.validation), (False, source.documents)]
    stream = ((side, document) for side, documents in sides if documents for document in documents())
    for side, document in progress_bar(stream, f"{name}: reading", unit="documents", shown=progress, leave=False):
        records += 1
        if isinstance(document, BadRecord):
            bad, first_bad = bad + 1, first_bad or f"{document.where}: {document.why}"
            if not bad_records or bad == records == _SAMPLE:
                break
            continue
        folded = " ".join(document.text.split()).casefold().encode("utf-8", "replace")
        if not folded:
            continue
        # Lone surrogates, which JSON can spell, have no UTF-8 form.
        text = document.text.encode("utf-8", "replace")
        digest, new = hashlib.sha256(folded).digest()[:16], _identity(document, text, side)
        number = index.setdefault(digest, len(index))
        if number < len(identity):
            duplicates += 1
            if document.group is not None or (number < held_out) != side or new >= identity[number]:
                continue
            identity[number], start[number], size[number], chat[number] = new, end, len(text), document.chat
        else:
            held_out += side
            identity.append(new)
            start.append(end)
            size.append(len(text))
            chat.append(document.chat)
            order.append(_keyed(digest, seed))
            own = b"text " + digest if document.group is None else document.group.encode("utf-8", "replace")
            group.append(_keyed(own, seed))
        end += file.write(text)
    file.flush()
    total = f"{len(identity)} {sum(identity)}"  # a sum, which no order of reading changes
    reading = Reading(hashlib.sha256(total.encode()).hexdigest(), records, duplicates, bad, first_bad, sum(chat))
    reading.require_good(name, bad_records)
    held = np.arange(len(identity)) < held_out
    starts, sizes, orders, groups = (np.array(values) for values in (start, size, order, group))
    return Corpus(file, starts, sizes, orders, groups, held, np.array(chat, bool), reading)


def divide(corpus: Corpus, share: float, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation documents, in order of use; a group's documents stay together.

    Where the source has a validation text of its own, that is the validation. Otherwise groups go to validation in the
    order of their hash while they fit into the share of the text; if none fits, the smallest does. So one huge group
    cannot take the training text, and neither split is empty. Raises ValueError where `what` has too little text.
    """
    ordered = np.argsort(corpus.order, kind="stable")
    valid = corpus.held_out
    if not valid.any():
        groups, member = np.unique(corpus.group, return_inverse=True)  # sorted by hash
        if len(groups) < 2:
            counts = f"{len(corpus.order)} distinct documents in {len(groups)} groups, and 2 are needed"
            raise ValueError(f"{what} has {counts}: split it into more files or records, or name a validation text")
        size = np.bincount(member, weights=corpus.size).astype(np.int64)
        room, chosen = int(share * size.sum()), np.zeros(len(groups), bool)
        for number in range(len(groups)):
            chosen[number] = size[number] <= room
            room -= int(size[number] * chosen[number])
        chosen[np.argmin(size)] |= not chosen.any()
        valid = chosen[member]
    elif valid.all():
        raise ValueError(f"{what} has no training documents that are not in its validation text as well")
    return ordered[~valid[ordered]], ordered[valid[ordered]]
