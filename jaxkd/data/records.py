"""Documents from files: JSON Lines, JSON, CSV, Parquet and plain text, each also compressed (.gz, .zst)."""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from jaxkd.data.conversations import conversation, holds_chat

DATA = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
"""Suffixes of data files: those that are read from a folder."""

_PROSE = (".md", ".rst", ".tex", ".html", ".xml", ".toml", ".yaml", ".yml")
_PROGRAMS = (".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql")
TEXT = (".txt", *_PROSE, *_PROGRAMS)
"""Suffixes of files that are one document each."""

COMPRESSED = (".gz", ".zst")
NAME_ONE = "name one (PATH::FIELD, or data.text_key)"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Document(NamedTuple):
    """A text. Documents of one group go to the same split; without a group a document is its own."""

    group: str | None
    text: str  # of a conversation its JSON, `conversations.Conversation.json`
    chat: bool = False  # a conversation


class BadRecord(NamedTuple):
    """A record that holds no text."""

    where: str
    why: str


Record = tuple[str, Any]
"""Location and value of a record: a mapping, or a ValueError that says why it cannot be read."""


def suffix(name: str) -> str:
    """A file's suffix in lower case, without that of its compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def read(path: Path, field: str) -> Iterator[Document | BadRecord]:
    """The documents of a file, with the text in `field` of a record; dots go into nested records."""
    kind = suffix(path.name)
    try:
        with _opened(path) as stream:
            if stream.peek(2).startswith(_UTF16):
                raise ValueError(f"{path} is UTF-16 text: convert it to UTF-8 first")
            if kind in TEXT:
                try:
                    yield Document(None, stream.read().decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    yield BadRecord(str(path), f"not UTF-8 text (byte {error.start})")
            else:
                reader = {".csv": _csv, ".parquet": _parquet, ".json": _json}.get(kind, _json_lines)
                yield from documents(reader(stream, path, field), field)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file's content, decompressed, as a buffered reader."""
    kind = path.suffix.lower()
    if kind != ".zst":
        with gzip.open(path) if kind == ".gz" else path.open("rb") as file:
            yield file
        return
    import pyarrow

    with io.BufferedReader(cast(io.RawIOBase, pyarrow.CompressedInputStream(str(path), "zstd"))) as file:
        try:
            yield file
        except OSError as error:  # pyarrow's for a damaged frame
            raise ValueError(f"{path} is damaged: {error}") from None


def documents(records: Iterable[Record], field: str) -> Iterator[Document | BadRecord]:
    """The text of each record, or else its conversation (`conversations.conversation`)."""
    for where, record in records:
        if isinstance(record, ValueError):
            yield BadRecord(where, str(record))
            continue
        try:
            yield Document(None, _text(record, field))
        except ValueError as error:
            try:
                talk = conversation(record, field)
            except ValueError as fault:
                yield BadRecord(where, str(fault))
                continue
            yield BadRecord(where, str(error)) if talk is None else Document(None, talk.json, chat=True)


def _text(record: Any, field: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"it is {_kind(record)} and not an object with a field {field!r}")
    value, path = record, [field] if field in record else field.split(".")
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"it has no field {field!r}, its fields are {_fields(record)}: {NAME_ONE}")
        value = value[key]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"its field {field!r} is not UTF-8") from None
    if not isinstance(value, str):
        raise ValueError(f"its field {field!r} is {_kind(value)} and not text")
    return value


def _kind(value: Any) -> str:
    words = {type(None): "null", bool: "a truth value", list: "a list", dict: "an object", str: "text"}
    return words.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def names(of: Iterable[Any]) -> str:
    """Names as a message lists them."""
    return ", ".join(repr(name) for name in sorted(map(str, of))) or "none"


def _fields(record: dict[str, Any]) -> str:
    fields = ([f"{key}.{k}" for k in value] if isinstance(value, dict) else [key] for key, value in record.items())
    return names(itertools.chain.from_iterable(fields))


def _parsed(data: bytes) -> Any:
    """A JSON value, or a ValueError that says why it is none."""
    try:
        return json.loads(data.decode("utf-8-sig"), parse_int=float)  # int refuses numbers of thousands of digits
    except UnicodeDecodeError:
        return ValueError("not UTF-8")
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return ValueError(f"not valid JSON ({error})")


def _json_lines(stream: Any, path: Path, field: str) -> Iterator[Record]:
    is_array = stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    return _json(stream, path, field) if is_array else _lines(stream, path)


def _lines(lines: Iterable[bytes], path: Path) -> Iterator[Record]:
    parts = (part for line in lines for part in line.rstrip(b"\r\n").split(b"\r"))  # JSON strings have no line ends
    yield from ((f"{path}, line {number}", _parsed(part)) for number, part in enumerate(parts, 1) if part.strip())


def _json(stream: Any, path: Path, field: str) -> Iterator[Record]:
    """Records of one array, one record, or JSON Lines, which many files named .json hold."""
    data = stream.read()
    value = _parsed(data)
    if isinstance(value, ValueError):
        yield from _lines(io.BytesIO(data), path)
    elif isinstance(value, list):
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(value, 1))
    else:
        yield str(path), value


def _csv(stream: Any, path: Path, field: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 come back in `documents`, which refuses them record by record.
    lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.DictReader(lines)
    try:
        columns = reader.fieldnames or ()
        if not holds_chat(columns):
            _require_column(path, field, field, columns)
        for record in reader:
            if field in record:
                value = record[field]
                record = {field: value and value.encode("utf-8", "surrogateescape")}
            yield f"{path}, line {reader.line_num}", record
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
    finally:
        lines.detach()  # it would close the stream


def _require_column(path: Path, field: str, column: str, columns: Iterable[str]) -> None:
    if column not in columns:
        raise ValueError(f"{path}: no column {field!r}, but {names(columns)}: {NAME_ONE}")


def _parquet(stream: Any, path: Path, field: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        compressed = path.suffix.lower() in COMPRESSED
        with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(stream.read()) if compressed else path) as file:
            columns = file.schema_arrow.names
            chat = holds_chat(columns)
            if not chat:
                _require_column(path, field, field if field in columns else field.split(".")[0], columns)
            batches = file.iter_batches(batch_size=1024, columns=None if chat else [field])
            rows = (record for batch in batches for record in batch.to_pylist())
            yield from ((f"{path}, row {number}", record) for number, record in enumerate(rows, 1))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None
