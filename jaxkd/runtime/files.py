"""Files that survive a crash: atomic replacement, JSON documents, JSON lines."""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PARTIAL = "incomplete."  # prefix of the name of a file that is being written; a kill may leave such a file behind


class Torn(ValueError):
    """A file is empty, cut short or not what its name says; the message names it."""


@contextlib.contextmanager
def errors_name(path: os.PathLike | str, doing: str = "") -> Iterator[None]:
    """Give an OSError without a file name this one, and any library's error on a full disk the same sentence."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "no space left on device" in str(error).lower():
            message = f"No space left on device{doing and ' while '}{doing}; free some and run the same command again"
            raise OSError(errno.ENOSPC, message, str(path)) from None
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`, on any error delete it."""
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}.{path.name}")
    try:
        with errors_name(path):
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)  # the rename itself
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Force a file's content, or a directory's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file: readers, and the next process after a crash, see the old text or the new one."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; Torn where it is empty, cut short or no JSON object."""
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except ValueError as error:
        reason = f"not JSON ({error})" if data.strip() else "empty"
        raise Torn(f"{path} is {reason}") from None
    if not isinstance(value, dict):
        raise Torn(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file of JSON lines."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines with one fsync; a torn last line is removed first."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with errors_name(path), path.open("a+b") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":  # left by a full disk or a kill
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path, key: str = "step") -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, [] if it is missing; a torn last line is skipped.

    Torn names another line that is not a JSON object with `key`.
    """
    if not path.exists():
        return []
    rows = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or key not in row:
                raise Torn(f"{path} line {number} is not a JSON object with '{key}': delete it or restore the file")
            rows.append(row)
    return rows
