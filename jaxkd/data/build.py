"""From a source of text to packed rows on disk: one TFDS dataset per domain and fingerprint.

The fingerprint covers the text, the tokenizer and every choice made here, and it is part of the directory's
name. A domain that is there is therefore the right one and is not built again, and a changed one goes beside
the old. TFDS writes into a directory of another name and renames it when all is done, so nothing half-made is
ever in place.
"""

import contextlib
import errno
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
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from jaxkd.data.corpus import Corpus, collect, divide
from jaxkd.data.pack import Row, pack
from jaxkd.data.permute import hash_key
from jaxkd.data.sources import Source
from jaxkd.data.tokenize import Tokenizer
from jaxkd.runtime import locks

FORMAT = 2
"""Version of rows, splits and order: raise it when one changes, or old datasets pass for new."""

_VERSION = "1.0.0"  # of the TFDS dataset; the fingerprint says the rest
_BATCH_CHARACTERS = 1 << 18  # text tokenised at once: enough for the threads, little beyond a cap
_SPREAD = 16  # a limited number of rows comes from about so many documents or more


class Prepared(NamedTuple):
    """A domain's rows on disk."""

    name: str
    path: epath.Path
    fingerprint: str
    train_rows: int
    valid_rows: int
    documents: int  # distinct documents of the source
    duplicates: int  # documents left out because the same text came before
    tokens: int  # tokens in the rows, padding left out
    bytes: int  # text bytes of the rows' targets
    whole_rows: int  # that the whole training text would give: an estimate where `train_rows` is a limit that was met
    built: bool  # by this call; otherwise it was there


def _tokenised(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of documents, some documents at a time, so that a caller who has enough can stop."""
    held: list[str] = []
    characters = 0
    for text in texts:
        held.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield from tokenizer.documents(held)
            held, characters = [], 0
    if held:
        yield from tokenizer.documents(held)


def _spread(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], length: int, most: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A window of at most `most` pieces from each document, at random; the rest of the documents after that.

    Long documents would otherwise fill a small limit alone: 24 rows of source code are one file. Windows overlap by
    one token, as pieces do, so every token is still a target once.
    """
    step, rest = length - 1, []
    for number, (ids, sizes) in enumerate(documents):
        spare = max(-(-(len(ids) - 1) // step) - most, 0)  # pieces beyond the window
        start = int(hash_key((seed, number))[0]) % (spare + 1) * step
        stop = start + most * step + 1
        yield ids[start:stop], sizes[start:stop]
        rest += [(ids[cut], sizes[cut]) for cut in (slice(0, start + 1), slice(stop - 1, None))]
    yield from rest


def _pack_side(
    corpus: Corpus, chosen: np.ndarray, tokenizer: Tokenizer, length: int, cap: int, seed: int
) -> Iterator[Row]:
    """The rows of the chosen documents, at most `cap` unless that is 0."""
    documents = _tokenised(corpus.texts(chosen), tokenizer)
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
        **kwargs: Any,
    ) -> None:
        """Args: tokens in a row; split -> its rows; split -> their limit; what to store; TFDS's."""
        self._length, self._sides, self._caps, self._progress = length, sides, caps, progress
        self._facts = tfds.core.MetadataDict(facts)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        row = tfds.features.Tensor(shape=(self._length,), dtype=np.int32, encoding="bytes")
        number = tfds.features.Scalar(np.int64)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Packed rows of tokens for language-model distillation.",
            features=tfds.features.FeaturesDict({"tokens": row, "segments": row, "positions": row, "bytes": number}),
            metadata=self._facts,  # written last, so that counting while the rows pass is in time
            disable_shuffling=True,  # documents are in pseudo-random order already
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Row]]]:
        return {split: self._generate_examples(split) for split in self._sides}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Row]]:
        facts, count = self._facts, 0
        title = f"{facts['name']}: {split}"
        total = self._caps[split] or None
        for row in tqdm(self._sides[split](), title, total=total, disable=not self._progress, unit=" rows"):
            yield count, row
            count += 1
            facts["tokens"] += int((row["segments"] > 0).sum())
            facts["bytes"] += int(row["bytes"])
        if not count:
            raise ValueError(
                f"domain {facts['name']!r} ({facts['spec']}) gives no {split} rows: its documents are too short"
            )
        facts[f"{split}_rows"] = count


def _fingerprint(source: Source, tokenizer: Tokenizer, choices: dict[str, Any]) -> str:
    facts = {
        "format": FORMAT,
        "source": source.fingerprint,
        "tokenizer": [tokenizer.fingerprint, tokenizer.start, tokenizer.end],
        **choices,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check(name: str, length: int, caps: tuple[int, int], valid_share: float) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"domain name {name!r} must be made of letters, digits, '_', '.' and '-'")
    if length < 2:
        raise ValueError(f"a row needs at least 2 tokens to have a target, got length={length}")
    if min(caps) < 0:
        raise ValueError(f"train_rows and valid_rows must be 0 (no limit) or more, got {caps[0]} and {caps[1]}")
    if not 0 < valid_share < 1:
        raise ValueError(f"valid_share must be between 0 and 1, got {valid_share}")


def _whole_rows(facts: Mapping[str, Any]) -> int:
    """Rows of the whole training text, from its bytes and the rows'; 0 where an older jaxkd did not keep its bytes."""
    limit, made = facts["caps"]["train"], int(facts["train_rows"])
    if not limit or made < limit:
        return made
    size = int(facts.get("train_bytes", 0))
    return max(made, round(size * (made + facts["valid_rows"]) / facts["bytes"])) if size else 0


def _amend(path: epath.Path, **facts: int) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) | facts
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_text(json.dumps(known), encoding="utf-8")
    temporary.replace(path)


def _read_prepared(name: str, path: epath.Path, fingerprint: str, built: bool) -> Prepared:
    try:
        facts = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        numbers = {key: int(facts[key]) for key in Prepared._fields[3:9]} | {"whole_rows": _whole_rows(facts)}
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
    seed: int = 0,
    progress: bool = True,
) -> Prepared:
    """Make a domain's rows, or find them made. Another process that wants the same ones waits for them.

    Args:
        name: the domain's.
        source: its text.
        tokenizer: what makes tokens of it.
        length: tokens in a row.
        train_rows, valid_rows: at most so many rows, of documents taken at random; 0 is no limit.
        directory: where datasets go.
        valid_share: share of the text that goes to validation, in whole groups of documents.
        seed: of the documents' order and division.
        progress: show it on stderr.

    Returns:
        where the rows are and how many.

    Raises:
        ValueError: a bad argument, too little text, or a damaged dataset in the place.
        OSError: nothing can be written; a full disk leaves nothing half-made.
    """
    _check(name, length, (train_rows, valid_rows), valid_share)
    caps = {"train": train_rows, "valid": valid_rows}
    choices = {"length": length, "caps": caps, "valid_share": valid_share, "seed": seed}
    fingerprint = _fingerprint(source, tokenizer, choices)
    root = epath.Path(directory).expanduser()
    config = tfds.core.BuilderConfig(name=f"{name}-{fingerprint[:12]}")
    path = root / PackedRows.name / config.name / _VERSION
    alone = functools.partial(_alone, root / f".{config.name}.lock")
    if path.exists():
        found = _read_prepared(name, path, fingerprint, built=False)
        if not found.whole_rows:
            print(f"{name}: rows of an older jaxkd, reading the text once more for its whole size", file=sys.stderr)
            with alone(), _spool(path.parent) as file:
                corpus = collect(source, file, seed, name, progress)
                _amend(path / "metadata.json", train_bytes=corpus.size(divide(corpus, valid_share)[0]))
            found = _read_prepared(name, path, fingerprint, built=False)
        return found
    with _full_disk(name, root), alone(), _spool(path.parent) as file:
        if path.exists():  # by another process, while this one waited
            return _read_prepared(name, path, fingerprint, built=False)
        corpus = collect(source, file, seed, name, progress)
        corpus.require_two_groups(f"domain {name!r} ({source.spec})")
        facts = {"name": name, "spec": source.spec, "fingerprint": fingerprint, **choices}
        facts |= {"documents": len(corpus.order), "duplicates": corpus.duplicates, "tokens": 0, "bytes": 0}
        divided = dict(zip(caps, divide(corpus, valid_share)))
        facts["train_bytes"] = corpus.size(divided["train"])
        sides = {
            split: functools.partial(_pack_side, corpus, chosen, tokenizer, length, caps[split], seed)
            for split, chosen in divided.items()
        }
        with _quiet():
            builder = PackedRows(
                length=length,
                sides=sides,
                caps=caps,
                facts=facts,
                progress=progress,
                data_dir=str(root),
                config=config,
                file_format="array_record",
            )
            built = _write(builder, path)
    if progress and built:
        print(f"{name}: rows written to {path}", file=sys.stderr)
    return _read_prepared(name, path, fingerprint, built)


def _write(builder: PackedRows, path: epath.Path) -> bool:
    """Whether the rows that are now in place are those of this builder."""
    with tempfile.TemporaryDirectory() as downloads:  # TFDS wants one; there are none
        try:
            builder.download_and_prepare(download_dir=downloads)
        except Exception:
            if not path.exists():
                raise
            return False  # another host was faster, on a disk whose lock does not reach it: what is in place is whole
    return True


@contextlib.contextmanager
def _alone(lock: epath.Path) -> Iterator[None]:
    """Let other processes that want the same rows wait until they are there."""
    if "://" in str(lock):
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        locks.take(file, lock, wait=True)
        yield


@contextlib.contextmanager
def _spool(place: epath.Path) -> Iterator[BinaryIO]:
    """A nameless file where the rows will be, and nothing there of a build that was killed."""
    place.mkdir(parents=True, exist_ok=True)
    for left_over in place.glob("incomplete.*"):  # TFDS names its unfinished directories so
        left_over.rmtree(missing_ok=True)
    with tempfile.TemporaryFile(dir=None if "://" in str(place) else place) as file:
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


@contextlib.contextmanager
def _full_disk(name: str, root: epath.Path) -> Iterator[None]:
    """Say in one line that the disk is full, whichever library met it."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or "no space left on device" in str(error).lower():
            raise OSError(errno.ENOSPC, f"the disk is full while preparing domain {name!r}", str(root)) from None
        raise
