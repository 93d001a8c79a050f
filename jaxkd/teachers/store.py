"""A cache of a teacher's signal: one payload per row, written in blocks, read in any order.

A restarted writer continues with the missing blocks; every payload is verified when it is read.
"""

import contextlib
import os
import re
import resource
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from jaxkd.runtime import files, locks
from jaxkd.teachers import shards
from jaxkd.teachers.codec import Layout
from jaxkd.teachers.shards import FORMAT, MANIFEST, Block, Shards, Sizes

_LOCK = ".lock"
_SPARE_FILES = 256  # open files left for the rest of the process


class Writer:
    """Writes a cache, or resumes one; a context manager.

    Several processes may write different blocks of one cache, one of them as the leader: all enter, barrier, all call
    `missing`, barrier, then they write.
    """

    def __init__(
        self, root: epath.PathLike, manifest: Mapping[str, Any], sizes: Sizes, block: int = 64, leader: bool = True
    ) -> None:
        """Check the arguments; the directory is not accessed before the context is entered.

        Args:
            root: the cache's directory, on a mounted file system.
            manifest: JSON values that determine the payloads; `layouts` has the fields of a `Layout` per split.
            sizes: rows by domain and split.
            block: rows per block, the most that an interrupted writer loses.
            leader: whether this process takes the lock, writes the manifest and finishes.
        """
        if "://" in os.fspath(root):
            raise ValueError(f"a cache is written to a mounted file system, not to {root}: mount the bucket")
        if block < 1:
            raise ValueError(f"a block must have at least 1 row, got {block}")
        self.root, self._leader = Path(root).expanduser(), leader
        facts = shards.plain({"format": FORMAT, "block": block, "sizes": sizes})
        if taken := sorted(({*facts} | {"complete"}) & {*manifest}):
            raise ValueError(f"the writer itself sets the manifest's {', '.join(taken)}")
        self._facts, self._shards = {**shards.plain(manifest), **facts}, Shards(self.root, sizes, block)
        for domain, splits in sizes.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", domain):
                raise ValueError(f"domain name {domain!r} must be made of letters, digits, '_', '.' and '-'")
            for split in splits:
                if split not in self._facts.get("layouts", {}):
                    raise ValueError(f"the manifest's layouts do not name the split {split!r}")
        for facts in self._facts["layouts"].values():
            Layout(**facts)

    def __enter__(self) -> "Writer":
        """As the leader: take the lock, check the existing manifest, delete unfinished files.

        Raises ValueError: another writer has the lock, or the directory holds another cache or other files.
        """
        with contextlib.ExitStack() as stack:
            if self._leader:
                self._lead(stack)
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def _lead(self, stack: contextlib.ExitStack) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in self.root.iterdir()}
        others = [name for name in names if name != _LOCK and not name.startswith(files.PARTIAL)]
        if others and MANIFEST not in others and not shards.has_blocks(self.root):
            raise ValueError(f"{self.root} holds {min(others)} and no cache: name a new or an empty directory")
        lock = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        stack.callback(os.close, lock)
        if not locks.acquire(lock, self.root / _LOCK):
            raise ValueError(f"another process is writing the cache {self.root}: let it end, or stop it")
        if not (self.root / MANIFEST).exists() and not shards.has_blocks(self.root):
            self._write_manifest(complete=False)
        complete = self._match()
        for unfinished in self.root.rglob(f"{files.PARTIAL}*"):
            unfinished.unlink()
        for domain in self._facts["sizes"]:
            self._shards.folder(domain).mkdir(parents=True, exist_ok=True)
        if complete and self.missing():
            self._write_manifest(complete=False)  # before finish() rewrites files that readers may open

    def _match(self) -> bool:
        """Check the existing manifest; returns whether it is marked complete."""
        manifest = shards.read_manifest(self.root)
        complete = manifest.pop("complete", False)
        shards.compare(self.root, manifest, self._facts, exact=True)
        return complete

    def _write_manifest(self, complete: bool) -> None:
        files.write_json(self.root / MANIFEST, {**self._facts, "complete": complete})

    def missing(self) -> list[Block]:
        """Missing or incomplete blocks, in the order of `Shards.blocks`.

        Raises ValueError: the leader's manifest is missing, or is of another cache.
        """
        if not (self.root / MANIFEST).is_file():
            raise ValueError(
                f"{self.root} holds no cache although the leader has made one: all processes must see one directory"
            )
        self._match()
        return self._shards.missing()

    def write(self, block: Block, payloads: Sequence[bytes]) -> None:
        """Write the payloads of a block's rows atomically; OSError leaves no partial file."""
        if len(payloads) != block.stop - block.start:
            raise ValueError(f"{len(payloads)} payloads are not the rows {block.start} to {block.stop} of {block}")
        with files.atomic(self._shards.path(block)) as part:
            shards.write(part, block, payloads)

    def finish(self) -> None:
        """Write TFDS's metadata and mark the cache complete; ValueError if blocks are missing."""
        if not self._leader:
            raise ValueError("only the leader finishes a cache")
        if missing := self.missing():
            raise ValueError(f"the cache {self.root} still lacks {len(missing)} blocks, the first is {missing[0]}")
        for domain in self._facts["sizes"]:
            self._shards.write_metadata(domain)
        self._write_manifest(complete=True)


class Store:
    """A complete cache, read by domain, split and row. Threads may share it, and it can be pickled."""

    def __init__(self, root: epath.PathLike) -> None:
        """Open the cache in `root` and check the number of records of every block.

        Raises:
            FileNotFoundError: there is no cache.
            ValueError: it is incomplete, damaged, or of another format.
        """
        self.root = epath.Path(root).expanduser()
        self.manifest = shards.read_manifest(self.root)
        self._shards = Shards(self.root, self.manifest["sizes"], self.manifest["block"])
        number, missing = len(list(self._shards.blocks())), self._shards.missing()
        if missing or not self.manifest.get("complete"):
            first = f", the first is {self._shards.path(missing[0])}" if missing else ""
            raise ValueError(
                f"the cache {self.root} is incomplete: {len(missing)} of {number} blocks are missing{first}; run "
                "`jaxkd cache --config ...` as before, which resumes"
            )
        _allow_files(number, self.root)
        self._sources: dict[tuple[str, str], Any] = {}
        for domain, splits in self._shards.sizes.items():
            try:
                builder = tfds.builder_from_directory(self._shards.folder(domain))
                for split in splits:
                    self._sources[domain, split] = builder.as_data_source(split)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(
                    f"the cache {self.root} cannot be read through TFDS ({domain}: {reason}): run "
                    "`jaxkd cache --config ...` as before, and it writes what TFDS needs again"
                ) from None

    def layout(self, split: str) -> Layout:
        """The layout of a split's payloads; ValueError for an unknown split."""
        if split not in self.manifest["layouts"]:
            raise ValueError(f"the cache {self.root} has no split {split!r}, only {list(self.manifest['layouts'])}")
        return Layout(**self.manifest["layouts"][split])

    def expect(self, wanted: Mapping[str, Any]) -> None:
        """Check that the manifest has the wanted values; ValueError names every difference."""
        shards.compare(self.root, self.manifest, shards.plain(wanted), exact=False)

    def read(self, domain: str, split: str, rows: Sequence[int | np.integer] | np.ndarray) -> list[bytes]:
        """Verified payloads of rows, in any order, with repetitions.

        Raises:
            ValueError: an unknown domain or split, or a damaged record (names file, domain and row).
            IndexError: a row is outside the split.
        """
        if (domain, split) not in self._sources:
            existing = ", ".join("/".join(key) for key in self._sources)
            raise ValueError(f"the cache {self.root} has no rows of {domain}/{split}, only of {existing}")
        source, wanted = self._sources[domain, split], [int(row) for row in rows]
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(source):
            where = f"{domain}/{split} in the cache {self.root}"
            raise IndexError(f"rows {min(wanted)} to {max(wanted)} were asked for, {where} has {len(source)}")
        try:
            records = source.__getitems__(wanted)
        except Exception:  # `_checked` finds the damaged record
            records = [None] * len(wanted)
        return [self._checked(domain, split, row, record) for row, record in zip(wanted, records, strict=True)]

    def verify(self) -> int:
        """Verify every payload and return their number; ValueError names the damaged files."""

        def is_damaged(block: Block) -> bool:
            try:
                self.read(block.domain, block.split, range(block.start, block.stop))
            except ValueError:
                return True
            return False

        blocks = list(self._shards.blocks())
        with ThreadPoolExecutor(8) as pool:
            damaged = [block for block, bad in zip(blocks, pool.map(is_damaged, blocks)) if bad]
        if damaged:
            files = ", ".join(str(self._shards.path(block)) for block in damaged[:3])
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            raise ValueError(
                f"{len(damaged)} of {len(blocks)} files of the cache {self.root} are damaged: {files}{more}. Delete "
                "them and run `jaxkd cache --config ...` as before: it writes only what is missing"
            )
        return sum(block.stop - block.start for block in blocks)

    def _checked(self, domain: str, split: str, row: int, record: Mapping[str, Any] | None) -> bytes:
        try:
            record = self._sources[domain, split].__getitems__([row])[0] if record is None else record
            return shards.payload_of(record, domain, split, row)
        except Exception as error:  # a damaged file, an invalid protocol buffer, a wrong checksum
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        file = self._shards.path(Block(domain, split, row // self._shards.size, row, row + 1))
        raise ValueError(
            f"row {row} of {domain}/{split} in {file} is damaged: {reason}. Delete that file and run "
            "`jaxkd cache --config ...` as before: it writes only what is missing"
        )


def _allow_files(number: int, root: Any) -> None:
    """Raise the soft limit of open files: readers keep every shard open, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = 2**31 if hard == resource.RLIM_INFINITY else hard
    if number + _SPARE_FILES > hard:
        raise ValueError(
            f"the cache {root} has {number} files, and this system lets a process open {hard}: raise the limit "
            "(`ulimit -Hn`), or make the cache with larger blocks"
        )
    if soft != resource.RLIM_INFINITY:
        with contextlib.suppress(ValueError, OSError):  # macOS enforces a lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + number, hard), hard))
