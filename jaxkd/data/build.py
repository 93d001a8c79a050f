"""Builds packed rows on disk from a source of text: one TFDS dataset per domain and fingerprint, written atomically.

The fingerprint covers text, tokenizer and settings and names the directory; file times only tell whether to read again.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from jaxkd.data import conversations
from jaxkd.data.corpus import Corpus, Reading, collect, divide
from jaxkd.data.pack import Row, Tokens, one_each, pack
from jaxkd.data.permute import hash_key
from jaxkd.data.records import BadRecord, Document
from jaxkd.data.rows import MemoryRows
from jaxkd.data.sources import Source
from jaxkd.data.tokenize import Tokenizer
from jaxkd.runtime import files, locks
from jaxkd.runtime.progress import bar as progress_bar

FORMAT = 3
"""Version of rows, splits and order: raise it when one of them changes, so that old datasets are not reused."""

_VERSION = "2.0.0"  # of the TFDS dataset; the fingerprint covers what changes
_BATCH_CHARACTERS = 1 << 18  # text tokenised at once: enough for all threads, little read beyond a row limit
_SPREAD = 16  # a limited number of rows comes from at least about so many documents


class Prepared(NamedTuple):
    """A domain's rows on disk."""

    name: str
    path: epath.Path
    fingerprint: str
    train_rows: int
    valid_rows: int
    documents: int  # distinct documents of the source
    duplicates: int  # documents left out because another one has the same text
    bad: int  # records left out because they hold no text
    tokens: int  # tokens in the rows, without padding
    bytes: int  # text bytes of the rows' targets
    whole_rows: int  # of the whole training text: an estimate where `train_rows` reached its limit
    built: bool  # by this call, not reused


def _tokenised(documents: Iterable[Document], tokenizer: Tokenizer, contexts: bool = False) -> Iterator[Tokens]:
    """Tokens of documents, some documents at a time, so that a caller with a row limit can stop early."""
    pending: list[Document] = []
    characters = 0
    for document in documents:
        pending.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from _encoded(pending, tokenizer, contexts)
            pending, characters = [], 0
    yield from _encoded(pending, tokenizer, contexts)


def _encoded(documents: list[Document], tokenizer: Tokenizer, contexts: bool) -> Iterator[Tokens]:
    for chat, alike in itertools.groupby(documents, lambda document: document.chat):
        texts = [document.text for document in alike]
        if chat:
            talks = [conversations.parse(text) for text in texts]
            yield from conversations.encode(tokenizer, talks, "data.tokenizer", contexts)
        else:
            yield from itertools.starmap(Tokens, tokenizer.documents(texts))


def _spread(documents: Iterable[Tokens], length: int, most: int, seed: int) -> Iterator[Tokens]:
    """A random window of at most `most` pieces from each document first, then the rest of the documents.

    Otherwise one long document would fill a small row limit. Windows overlap their neighbours by one token, as pieces
    do, so every token is still a target once.
    """
    step, rest = length - 1, []
    for number, document in enumerate(documents):
        spare = max(-(-(len(document.ids) - 1) // step) - most, 0)  # pieces beyond the window
        start = int(hash_key((seed, number))[0]) % (spare + 1) * step
        stop = start + most * step + 1
        yield document.cut(slice(start, stop))
        rest += [document.cut(span) for span in (slice(0, start + 1), slice(stop - 1, None))]
    yield from rest


def _pack_side(
    corpus: Corpus,
    chosen: np.ndarray,
    tokenizer: Tokenizer,
    length: int,
    cap: int,
    seed: int,
    packs: bool,
    context: int,
) -> Iterator[Row]:
    """The rows of the chosen documents, at most `cap` unless that is 0."""
    documents = _tokenised(corpus.documents(chosen), tokenizer, bool(context))
    if not packs:
        return itertools.islice(one_each(documents, length, context), cap or None)
    if not cap:
        return pack(documents, length)
    return itertools.islice(pack(_spread(documents, length, -(-cap // _SPREAD), seed), length), cap)


class PackedRows(tfds.core.GeneratorBasedBuilder):
    """Packed rows of one domain; `prepare` makes it."""

    VERSION = tfds.core.Version(_VERSION)

    def __init__(
        self,
        *,
        length: int,
        sides: Mapping[str, Callable[[], Iterator[Row]]],
        caps: Mapping[str, int],
        facts: dict[str, Any],
        progress: bool,
        extra: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """`sides` and `caps` map a split to its rows and their limit; `facts` are stored as metadata.

        `extra`: TFDS features of rows that have more than `pack` gives, "targets" (int32 [length]) and "aux" (a dict).
        """
        self._length, self._sides, self._caps, self._progress = length, sides, caps, progress
        self._extra = dict(extra or {})
        self._facts = tfds.core.MetadataDict(facts)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        row = lambda dtype: tfds.features.Tensor(shape=(self._length,), dtype=dtype, encoding="bytes")
        features = {name: row(np.int32) for name in ("tokens", "segments", "positions")}
        features |= {"weights": row(np.float32), "bytes": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Packed rows of tokens for language-model distillation.",
            features=tfds.features.FeaturesDict(features | self._extra),
            metadata=self._facts,  # written after the rows, which update its counts
            disable_shuffling=True,  # documents are in pseudo-random order already
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Row]]]:
        return {split: self._generate_examples(split) for split in self._sides}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Row]]:
        facts, count = self._facts, 0
        title, total = f"{facts['name']}: {split}", self._caps[split] or None
        for row in progress_bar(self._sides[split](), title, total, "rows", shown=self._progress):
            yield count, row
            count += 1
            facts["tokens"] += int((row["segments"] > 0).sum())
            facts["bytes"] += int(row["bytes"])
        if not count:
            raise ValueError(f"domain {facts['name']!r} ({facts['spec']}) gives no {split} rows: too short documents")
        facts[f"{split}_rows"] = count


def _fingerprint(reading: Reading, tokenizer: Tokenizer, choices: dict[str, Any]) -> str:
    ids = [tokenizer.fingerprint, tokenizer.start, tokenizer.end]
    facts = {"format": FORMAT, "text": reading.digest, "tokenizer": ids, **choices}
    if reading.chats:
        facts |= {"template": tokenizer.chat_template, "ends": tokenizer.generation.eos}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _recall(path: epath.Path) -> Reading | None:
    try:
        return Reading(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _record(path: epath.Path, reading: Reading) -> None:
    text = json.dumps(reading._asdict())
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(path):  # object stores replace a file in one request
        path.write_text(text, encoding="utf-8")
    else:
        files.write_text(Path(path), text)


def _check(name: str, length: int, valid_share: float, bad_records: float) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"domain name {name!r} must be made of letters, digits, '_', '.' and '-'")
    if length < 2:
        raise ValueError(f"a row needs at least 2 tokens to have a target, got data.length={length}")
    if not 0 < valid_share < 1:
        raise ValueError(f"data.valid_share must be between 0 and 1, got {valid_share}")
    if not 0 <= bad_records < 1:
        raise ValueError(f"data.bad_records must be at least 0 and below 1, got {bad_records}")


def _whole_rows(facts: Mapping[str, Any]) -> int:
    """Rows of the whole training text, estimated by bytes where the rows are limited."""
    limit, rows = facts["caps"]["train"], int(facts["train_rows"])
    if not limit or rows < limit:
        return rows
    return max(rows, round(int(facts["train_bytes"]) * (rows + facts["valid_rows"]) / facts["bytes"]))


def _read_prepared(name: str, path: epath.Path, fingerprint: str, reading: Reading, built: bool) -> Prepared:
    try:
        facts = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        numbers = {key: int(facts[key]) for key in ("train_rows", "valid_rows", "documents", "tokens", "bytes")}
        numbers |= {"whole_rows": _whole_rows(facts), "duplicates": reading.duplicates, "bad": reading.bad}
        same = facts["fingerprint"] == fingerprint and (path / "dataset_info.json").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(f"{path} is damaged (its metadata.json does not fit): delete that directory and try again")
    return Prepared(name, path, fingerprint, **numbers, built=built)


def prepare(
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    length: int,
    train_rows: int,
    valid_rows: int,
    directory: epath.PathLike,
    valid_share: float = 0.05,
    bad_records: float = 0.05,
    seed: int = 0,
    progress: bool = True,
    packs: bool = True,
    context: int = 0,
) -> Prepared:
    """Build a domain's rows, or reuse them. Concurrent calls for the same rows build them once.

    `train_rows` and `valid_rows` are limits, filled from random documents; 0 is no limit. The share `valid_share` of
    the text goes to validation, in whole groups of documents, unless the source has a validation text of its own. At
    most the share `bad_records` of the records may hold no text. Without `packs`, or with tokens of `context` for the
    teacher's own prompt, a row has one document (`pack.one_each`). A full disk leaves no partial dataset.
    """
    _check(name, length, valid_share, bad_records)
    caps = {"train": train_rows, "valid": valid_rows}
    choices: dict[str, Any] = {"length": length, "caps": caps, "valid_share": valid_share, "seed": seed}
    if not packs or context:
        choices |= {"packs": False, "context": context}
    root = epath.Path(directory).expanduser()
    stamp = hashlib.sha256(f"{FORMAT} {source.stamp}".encode()).hexdigest()
    recorded = root / PackedRows.name / ".texts" / f"{stamp[:32]}.json"

    def reused(reading: Reading | None) -> Prepared | None:
        if reading is None:
            return None
        reading.require_good(name, bad_records)
        fingerprint = _fingerprint(reading, tokenizer, choices)
        path = _path(root, name, fingerprint)
        return _read_prepared(name, path, fingerprint, reading, built=False) if path.exists() else None

    for note in source.notes if progress else ():
        print(f"{name}: {note}", file=sys.stderr)
    if prepared := reused(_recall(recorded)):
        return prepared
    with files.errors_name(root, f"preparing domain {name!r}"), _locked(root / f".{name}.lock"), _spool(root) as file:
        if prepared := reused(_recall(recorded)):  # by another process, while this one waited
            return prepared
        corpus = collect(source, file, seed, name, bad_records, progress)
        reading = corpus.reading
        if reading.bad and progress:
            skipped = f"{reading.bad:,} of {reading.records:,} records are bad and left out"
            print(f"{name}: {skipped}; the first is {reading.first_bad}", file=sys.stderr)
        fingerprint = _fingerprint(reading, tokenizer, choices)
        path = _path(root, name, fingerprint)
        built = not path.exists() and _build(name, source, corpus, tokenizer, path, choices, fingerprint, progress)
        _record(recorded, reading)
    if progress and built:
        print(f"{name}: rows written to {path}", file=sys.stderr)
    return _read_prepared(name, path, fingerprint, reading, built)


def read_whole(
    name: str, source: Source, tokenizer: Tokenizer, length: int, limit: int = 0, bad_records: float = 0.05
) -> MemoryRows:
    """A source's own validation text, or else its text, as rows in memory: the first `limit`, or all."""
    bad: list[BadRecord] = []
    good = 0

    def good_ones() -> Iterator[Document]:
        nonlocal good
        for document in (source.validation or source.documents)():
            if isinstance(document, BadRecord):
                bad.append(document)
            else:
                good += 1
                yield document

    rows = list(itertools.islice(pack(_tokenised(good_ones(), tokenizer), length), limit or None))
    first_bad = f"{bad[0].where}: {bad[0].why}" if bad else ""
    Reading("", len(bad) + good, 0, len(bad), first_bad).require_good(name, bad_records)
    if not rows:
        raise ValueError(f"domain {name!r}: {source.spec} has no text")
    return MemoryRows(rows, source.spec)


def _path(root: epath.Path, name: str, fingerprint: str) -> epath.Path:
    return root / PackedRows.name / f"{name}-{fingerprint[:12]}" / _VERSION


def _build(
    name: str,
    source: Source,
    corpus: Corpus,
    tokenizer: Tokenizer,
    path: epath.Path,
    choices: dict[str, Any],
    fingerprint: str,
    progress: bool,
) -> bool:
    """Pack and write the rows; False if another host finished the same ones first."""
    caps, length, seed = choices["caps"], choices["length"], choices["seed"]
    packs, context = choices.get("packs", True), choices.get("context", 0)
    extra = {}
    if context:
        of_context = tfds.features.Tensor(shape=(context,), dtype=np.int32, encoding="bytes")
        extra["aux"] = {"context": of_context, "context_length": tfds.features.Scalar(np.int32)}
    divided = dict(zip(caps, divide(corpus, choices["valid_share"], f"domain {name!r} ({source.spec})")))
    facts = {"name": name, "spec": source.spec, "fingerprint": fingerprint, **choices, "tokens": 0, "bytes": 0}
    facts |= {"documents": len(corpus.order), "train_bytes": int(corpus.size[divided["train"]].sum())}
    sides = {
        split: functools.partial(_pack_side, corpus, chosen, tokenizer, length, caps[split], seed, packs, context)
        for split, chosen in divided.items()
    }
    for unfinished in path.parent.glob("incomplete.*"):  # TFDS's name for what a killed build left
        unfinished.rmtree(missing_ok=True)
    with _quiet():
        config = tfds.core.BuilderConfig(name=path.parent.name)
        options = {"data_dir": str(path.parents[2]), "config": config, "file_format": "array_record"}
        builder = PackedRows(
            length=length, sides=sides, caps=caps, facts=facts, progress=progress, extra=extra, **options
        )
        with tempfile.TemporaryDirectory() as downloads:  # TFDS wants one; there are none
            try:
                builder.download_and_prepare(download_dir=downloads)
            except Exception:
                if not path.exists():
                    raise
                return False  # on a file system whose locks do not reach the other host
    return True


@contextlib.contextmanager
def _locked(lock: epath.Path) -> Iterator[None]:
    """Hold a file lock, so that other processes that build the same rows wait."""
    if "://" in str(lock):
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        locks.acquire(file, lock, wait=True)
        yield


@contextlib.contextmanager
def _spool(parent: epath.Path) -> Iterator[BinaryIO]:
    """A temporary file on the disk of the rows."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=None if "://" in str(parent) else parent) as file:
        yield cast(BinaryIO, file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS from printing, logging and drawing from the global random generator."""
    logger, state = logging.getLogger("absl"), random.getstate()
    level = logger.level
    tfds.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(state)
