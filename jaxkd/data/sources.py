"""Sources of text, each named by one string.

    builtin:NAME          a text domain that needs no download
    tfds:NAME[:SPLIT]     any TFDS dataset in ArrayRecord form, by name or by directory
    PATH                  a file of data or text, a folder of data files, or a glob

Any of them may end with `::FIELD`, the field that holds the text. Opening a source reads no text.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from jaxkd.data import paths, records
from jaxkd.data.builtin import BUILTIN
from jaxkd.data.conversations import holds_chat
from jaxkd.data.records import BadRecord, Document

Documents = Callable[[], Iterator[Document | BadRecord]]


@dataclass(frozen=True)
class Source:
    """Text that can be read, once or more."""

    spec: str
    stamp: str  # sha256 of names, sizes, times and versions: while it is the same, so is the text
    documents: Documents
    validation: Documents | None = None  # text of its own to validate on
    notes: tuple[str, ...] = ()  # on files that are not read, and on splits


def open_source(spec: str, field: str = "text", validation: str = "") -> Source:
    """Open a source; its text is read when `documents` is called.

    `field` holds the text where `spec` names none; dots go into nested records. `validation` is another source to
    validate on; "" takes the split that a folder's file names tell, or none.
    """
    spec, _, own_field = spec.partition("::")
    open_kind = {"builtin": _open_builtin, "tfds": _open_tfds}.get(spec.partition(":")[0], _open_files)
    source = open_kind(spec, own_field or field)
    if not validation:
        return source
    held_out = open_source(validation, own_field or field)
    notes = (*source.notes, *(f"{validation}: {note}" for note in held_out.notes))
    stamp = _hash(source.stamp, held_out.stamp)
    return Source(spec, stamp, source.documents, held_out.documents, notes)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _open_builtin(spec: str, field: str) -> Source:
    name = spec.removeprefix("builtin:")
    if name not in BUILTIN:
        raise ValueError(f"{spec!r} is not a built-in text domain: there are {', '.join(sorted(BUILTIN))}")
    domain = BUILTIN[name]
    return Source(spec, _hash("builtin", name, domain.version()), domain.documents)


def _open_files(spec: str, field: str) -> Source:
    train, validation, notes = paths.find(spec)
    stats = [(str(path.absolute()), path.stat()) for path in (*train, *validation)]
    facts = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]

    def reading(paths: list[Path]) -> Documents:
        return lambda: itertools.chain.from_iterable(records.read(path, field) for path in paths)

    stamp = _hash("files", field, len(train), facts)
    return Source(spec, stamp, reading(train), reading(validation) if validation else None, notes)


_TFDS_SPEC = re.compile(r"tfds:(?P<name>.+?(:\d+\.\d+\.\d+)?)(:(?P<split>[A-Za-z_]\w*(\[.*\])?))?")


def _tfds_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "dataset_info.json").is_file():
            raise FileNotFoundError(f"{directory} has no dataset_info.json: give TFDS's .../name/config/1.0.0")
        return tfds.builder_from_directory(directory)
    # Nothing is downloaded from here: most TFDS builders need TensorFlow for that.
    remedy = (
        f"prepare it with tfds.builder({name!r}, file_format='array_record').download_and_prepare(), "
        "or give the local directory of a prepared dataset, tfds:/path/to/name/1.0.0"
    )
    if "/" in name and directory.is_absolute():
        raise FileNotFoundError(f"the TFDS directory {directory} does not exist")
    try:
        builder = tfds.builder(name, file_format="array_record")
        prepared = builder.is_prepared()
    except Exception as error:  # an unknown name and a builder that wants TensorFlow: one answer to both
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"TFDS cannot load the dataset {name!r} ({reason}): {remedy}") from None
    if not prepared:
        raise FileNotFoundError(f"the TFDS dataset {name!r} is not prepared on this machine: {remedy}")
    return builder


def _open_tfds(spec: str, field: str) -> Source:
    match = _TFDS_SPEC.fullmatch(spec)
    if not match:
        raise ValueError(f"{spec!r} does not name a TFDS dataset: write tfds:NAME or tfds:NAME:SPLIT")
    split = match["split"] or "train"
    builder = _tfds_builder(match["name"])
    info = builder.info
    try:
        rows, size = info.splits[split].num_examples, info.splits[split].num_bytes
    except Exception:  # a wrong name and a wrong slice raise different things
        raise ValueError(f"{spec}: no split {split!r}, the splits are {records.names(info.splits)}") from None
    if not {field, field.split(".")[0]} & set(info.features) and not holds_chat(info.features):
        raise ValueError(f"{spec}: no feature {field!r}, but {records.names(info.features)}: {records.NAME_ONE}")
    try:
        data = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(f"{spec}: not ArrayRecord; prepare it again with file_format='array_record'") from None

    def documents() -> Iterator[Document | BadRecord]:
        examples = ((f"{spec}, example {number}", data[number]) for number in range(len(data)))
        return records.documents(examples, field)

    stats = [(path.name, path.stat()) for path in sorted(epath.Path(builder.data_path).iterdir())]
    facts = [(name, stat.length, stat.mtime) for name, stat in stats]
    stamp = _hash("tfds", info.full_name, str(builder.data_path), split, field, rows, size, facts)
    return Source(spec, stamp, documents)
