"""Which files a path, a folder or a glob stands for, and which of them are the validation text."""

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxkd.data import records

_ABOUT = re.compile(  # names of files about data
    r"(licen[cs]e|readme)([-_. ].*)?\.txt|(copying|notice|changelog|citation|requirements)\.txt"
    r"|dataset_(infos?|dict)\.json"
)
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_SHOWN = 5  # names in a note


class Files(NamedTuple):
    """The files of one source."""

    train: list[Path]
    validation: list[Path]  # where the names tell splits apart
    notes: tuple[str, ...]  # on files that are not read, and on splits


def find(spec: str) -> Files:
    """The data files of a path, a folder or a glob.

    A folder stands for the data files in it and below, links followed, without hidden ones; a glob stands for what it
    matches, and for files of other text only where it ends with their suffix.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        if records.suffix(path.name) not in (*records.DATA, *records.TEXT):
            raise ValueError(f"{path} is of an unsupported kind: {_supported()}")
        return Files([path], [], ())
    if path.is_dir():
        root, matches, pattern = path, [path], ""
    elif glob.has_magic(spec):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        matches, pattern = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))], path.name
    else:
        raise FileNotFoundError(f"{spec} does not exist: give a file, a folder, a glob, builtin:NAME or tfds:NAME")
    chosen: dict[Any, Path] = {}  # by device and inode: each file once, however many links lead to it
    others: dict[Any, Path] = {}
    for file in itertools.chain.from_iterable(map(_files_in, matches)):
        is_data = _is_data(file, pattern)
        try:
            stat = file.stat()
        except FileNotFoundError:
            if is_data or not file.suffix:  # a file, or perhaps a folder, of data
                raise FileNotFoundError(f"{file} is a link to {os.readlink(file)}, which does not exist") from None
        else:
            (chosen if is_data else others).setdefault((stat.st_dev, stat.st_ino), file)
    if not chosen:
        raise FileNotFoundError(f"{spec} has no data to read: {_supported()}")
    files = _by_split(root, list(chosen.values()))
    unread = [file for key, file in others.items() if key not in chosen]
    note = [f"not read, as no data: {_listed(root, unread)}"] if unread else []
    return files._replace(notes=(*note, *files.notes))


def _files_in(path: Path) -> Iterator[Path]:
    """The file, or all files in a folder but hidden ones; each folder once, however many links lead to it."""
    if not path.is_dir():
        yield path
        return
    seen: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if real not in seen and not name.startswith("."))
        seen.add(real)


def _is_data(file: Path, pattern: str) -> bool:
    kind = records.suffix(file.name)
    if kind in records.TEXT and kind not in records.DATA:
        return records.suffix(pattern) == kind
    is_named = re.match(r"[^*?\[]", pattern)  # the glob spells how the name begins
    return kind in records.DATA and bool(is_named or not _ABOUT.fullmatch(file.name.lower()))


def _by_split(root: Path, files: list[Path]) -> Files:
    """Split files by their names, where some are named for training and others for validation or a test."""
    by_split: dict[str, list[Path]] = {split: [] for split in ("", *_SPLITS)}
    for file in files:
        by_split[_split(file.relative_to(root))].append(file)
    if not by_split["train"] or not (by_split["validation"] or by_split["test"]):
        return Files(files, [], ())
    texts = {"validation": "validation rows are of", "test": "not read, as a test split:"}
    notes = tuple(f"{text} {_listed(root, by_split[split])}" for split, text in texts.items() if by_split[split])
    return Files(by_split["train"] + by_split[""], by_split["validation"], notes)


def _split(relative: Path) -> str:
    """The split named by a data file or one of its folders, or ""."""
    if records.suffix(relative.name) not in records.DATA:
        return ""
    parts = re.split(r"[-_. ]", relative.name.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[0])
    words = {*map(str.lower, relative.parts[:-1]), parts[0], parts[-1]}
    return next((split for split, spellings in _SPLITS.items() if words & set(spellings)), "")


def _listed(root: Path, files: list[Path]) -> str:
    names = [str(file.relative_to(root)) for file in files]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _supported() -> str:
    others = " ".join(kind for kind in records.TEXT if kind not in records.DATA)
    return f"data files are {' '.join(records.DATA)}, each also .gz or .zst; by name or glob also {others}"
