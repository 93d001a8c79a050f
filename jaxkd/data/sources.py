"""Sources of text, each named by one string.

    builtin:NAME          a text domain that needs no download
    tfds:NAME[:SPLIT]     any TFDS dataset in ArrayRecord form, by name or by directory
    PATH                  a .jsonl, .parquet or text file, a folder of them, or a glob

Opening a source reads no text: its fingerprint comes from versions, names, sizes and times, so that an
unchanged domain is recognised at once.
"""

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxkd.data.builtin import BUILTIN, Document

_PROSE = {".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".toml", ".yaml", ".yml"}
_PROGRAMS = {
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".java",
    ".js",
    ".ts",
    ".go",
    ".rs",
    ".rb",
    ".sh",
    ".sql",
}
TEXT_SUFFIXES = frozenset(_PROSE | _PROGRAMS)
SUFFIXES = TEXT_SUFFIXES | {".jsonl", ".parquet"}


@dataclass(frozen=True)
class Source:
    """Text that can be read, once or more."""

    spec: str
    fingerprint: str  # sha256; another text has another one
    documents: Callable[[], Iterator[Document]]


def open_source(spec: str, text_key: str = "text") -> Source:
    """Open a source; its text is read when `documents` is called.

    Args:
        spec: `builtin:NAME`, `tfds:NAME[:SPLIT]`, or a file, folder or glob.
        text_key: the field that holds the text, in JSONL, Parquet and TFDS.

    Raises:
        FileNotFoundError: no such path, package or dataset.
        ValueError: an unknown name, or an unsupported file type.
    """
    if spec.startswith("builtin:"):
        return _open_builtin(spec)
    if spec.startswith("tfds:"):
        return _open_tfds(spec, text_key)
    return _open_files(spec, text_key)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _open_builtin(spec: str) -> Source:
    name = spec.removeprefix("builtin:")
    if name not in BUILTIN:
        raise ValueError(f"{spec!r} is not a built-in text domain: there are {', '.join(sorted(BUILTIN))}")
    domain = BUILTIN[name]
    return Source(spec, _hash("builtin", name, domain.version()), domain.documents)


# Files


def _find_files(spec: str) -> list[tuple[str, Path]]:
    """(relative name, path) of the files of a path or glob, sorted."""
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} is of an unsupported kind: {_supported()}")
        return [(path.name, path)]
    if path.is_dir():
        root, found = path, [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    elif glob.has_magic(spec):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(match) for match in glob.glob(str(path), recursive=True)]
    else:
        raise FileNotFoundError(f"{spec} does not exist: give a file, a folder, a glob, builtin:NAME or tfds:NAME")
    files = sorted(
        (str(file.relative_to(root)), file)
        for file in found
        if file.is_file() and file.suffix.lower() in SUFFIXES and not _hidden(file.relative_to(root))
    )
    if not files:
        raise FileNotFoundError(f"{spec} has no text to read: {_supported()}")
    return files


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _supported() -> str:
    return "files can be .jsonl, .parquet or text (" + " ".join(sorted(TEXT_SUFFIXES)) + ")"


def _open_files(spec: str, text_key: str) -> Source:
    files = _find_files(spec)
    facts = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]

    def documents() -> Iterator[Document]:
        for name, path in files:
            if path.suffix.lower() == ".jsonl":
                yield from _read_jsonl(name, path, text_key)
            elif path.suffix.lower() == ".parquet":
                yield from _read_parquet(name, path, text_key)
            else:
                yield Document(name, _read_text(path))

    return Source(spec, _hash("files", text_key, facts), documents)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None


def _text_of(record: Any, text_key: str, where: str) -> str:
    """The text field of a record."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with a field {text_key!r}, found {type(record).__name__}")
    if text_key not in record:
        raise ValueError(
            f"{where}: no field {text_key!r}, the fields are {_names(record)}: set text_key to one of them"
        )
    text = record[text_key]
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {text_key!r} is {type(text).__name__}, not text")
    return text


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(map(str, names))) or "none"


def _read_jsonl(name: str, path: Path, text_key: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from None
            yield Document(f"{name}:{number}", _text_of(record, text_key, where))


def _read_parquet(name: str, path: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None
    with file:
        if text_key not in file.schema_arrow.names:
            raise ValueError(
                f"{path}: no column {text_key!r}, the columns are {_names(file.schema_arrow.names)}: "
                "set text_key to one of them"
            )
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield Document(f"{name}:{number}", _text_of({text_key: text}, text_key, f"{path}, row {number}"))


# TFDS

_TFDS_SPEC = re.compile(r"tfds:(?P<name>.+?(:\d+\.\d+\.\d+)?)(:(?P<split>[A-Za-z_]\w*(\[.*\])?))?")


def _tfds_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "dataset_info.json").is_file():
            raise FileNotFoundError(
                f"{directory} is not a prepared TFDS dataset, it has no dataset_info.json: "
                "give the directory of one version, such as .../name/config/1.0.0"
            )
        return tfds.builder_from_directory(directory)
    # Nothing is downloaded from here: most TFDS builders need TensorFlow for that.
    how = (
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
        raise FileNotFoundError(f"TFDS cannot load the dataset {name!r} ({reason}): {how}") from None
    if not prepared:
        raise FileNotFoundError(f"the TFDS dataset {name!r} is not prepared on this machine: {how}")
    return builder


def _open_tfds(spec: str, text_key: str) -> Source:
    match = _TFDS_SPEC.fullmatch(spec)
    if not match:
        raise ValueError(f"{spec!r} does not name a TFDS dataset: write tfds:NAME or tfds:NAME:SPLIT")
    split = match["split"] or "train"
    builder = _tfds_builder(match["name"])
    info = builder.info
    try:
        rows, size = info.splits[split].num_examples, info.splits[split].num_bytes
    except Exception:  # a wrong name and a wrong slice raise different things
        raise ValueError(f"{spec}: no split {split!r}, the splits are {_names(info.splits)}") from None
    if text_key not in info.features:
        raise ValueError(
            f"{spec}: no feature {text_key!r}, the features are {_names(info.features)}: set text_key to one of them"
        )
    try:
        data = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(
            f"{spec} is not stored as ArrayRecord: prepare it again with file_format='array_record'"
        ) from None

    def documents() -> Iterator[Document]:
        for number in range(len(data)):
            yield Document(f"{split}:{number}", _text_of(data[number], text_key, f"{spec}, example {number}"))

    return Source(spec, _hash("tfds", info.full_name, split, text_key, rows, size), documents)
