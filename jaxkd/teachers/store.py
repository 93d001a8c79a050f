"""A teacher's signal on disk: one payload per row, written block by block and read in any order.

A writer that was killed goes on with the blocks that are missing, and every payload is checked when it is read.
"""

import contextlib
import os
import re
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from jaxkd.runtime import files, locks
from jaxkd.teachers import shards
from jaxkd.teachers.codec import Layout
from jaxkd.teachers.shards import FORMAT, MANIFEST, Block, Sizes

_LOCK = ".lock"
_SPARE_FILES = 256  # open files that others in the process may need


class Writer:
    """Writes a cache, or goes on with one; a context manager.

    Several processes may write different blocks of one cache. One of them leads; when all have entered and met, all ask
    what is missing, and when all have that answer and met again, they write.
    """

    def __init__(
        self, root: epath.PathLike, manifest: Mapping[str, Any], sizes: Sizes, block: int = 64, leader: bool = True
    ) -> None:
        """Nothing is touched before the context is entered.

        Args:
            root: the cache's directory, on a file system that is mounted.
            manifest: all that decides what the payloads hold, as JSON; `layouts` names a `Layout` per split.
            sizes: rows of each domain and split.
            block: rows in a block: what is lost at most when the writer is killed.
            leader: takes the lock, makes the manifest and finishes; the other processes only write blocks.

        Raises:
            ValueError: a bad argument.
        """
        if "://" in os.fspath(root):
            raise ValueError(f"a cache is written to a mounted file system, not to {root}: mount the bucket")
        if block < 1:
            raise ValueError(f"a block must have at least 1 row, got {block}")
        self.root, self._leader = Path(root).expanduser(), leader
        facts = shards.plain({"format": FORMAT, "block": block, "sizes": sizes})
        if taken := sorted(({*facts} | {"complete"}) & {*manifest}):
            raise ValueError(f"the manifest's {', '.join(taken)} are the writer's to say")
        self._facts = {**shards.plain(manifest), **facts}
        if not sizes or not all(sizes.values()):
            raise ValueError(f"a cache needs a domain, and every domain a split, got {dict(sizes)}")
        for domain, splits in sizes.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", domain):
                raise ValueError(f"domain name {domain!r} must be made of letters, digits, '_', '.' and '-'")
            for split, rows in splits.items():
                if not re.fullmatch(r"[a-z]+", split) or rows < 1:
                    raise ValueError(f"{domain}/{split} needs a name of small letters and at least 1 row, got {rows}")
                if split not in self._facts.get("layouts", {}):
                    raise ValueError(f"the manifest's layouts do not name the split {split!r}")
        for facts in self._facts["layouts"].values():
            Layout(**facts)

    def __enter__(self) -> "Writer":
        """Lead, if this is the leader: take the lock, see whose the directory is, clear what was half-written.

        Raises:
            ValueError: another writer is at work, or the directory holds another cache or other files.
        """
        with contextlib.ExitStack() as stack:
            if self._leader:
                self._lead(stack)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def _lead(self, stack: contextlib.ExitStack) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in self.root.iterdir()}
        others = [name for name in names if name != _LOCK and not name.startswith(files.PARTIAL)]
        if others and MANIFEST not in others:
            raise ValueError(f"{self.root} holds {min(others)} and no cache: name a new or an empty directory")
        lock = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        stack.callback(os.close, lock)
        if not locks.acquire(lock, self.root / _LOCK):
            raise ValueError(f"another process is writing the cache {self.root}: let it end, or stop it")
        if not (self.root / MANIFEST).exists():
            self._write_manifest(complete=False)
        complete = self._match()
        for left_over in self.root.rglob(f"{files.PARTIAL}*"):
            left_over.unlink()
        for domain in self._facts["sizes"]:
            shards.folder(self.root, domain).mkdir(parents=True, exist_ok=True)
        if complete and self.missing():
            self._write_manifest(complete=False)  # before finish() touches what readers would open

    def _match(self) -> bool:
        """See that the manifest in place is this cache's; whether it is complete."""
        made = shards.read_manifest(self.root)
        complete = made.pop("complete", False)
        shards.compare(self.root, made, self._facts, both=True)
        return complete

    def _write_manifest(self, complete: bool) -> None:
        files.write_json(self.root / MANIFEST, {**self._facts, "complete": complete})

    def missing(self) -> list[Block]:
        """Blocks that are not there, or cut short, in the order of domains, splits and rows.

        Raises:
            ValueError: the leader's manifest is not there, or is of another cache.
        """
        if not (self.root / MANIFEST).is_file():
            raise ValueError(
                f"{self.root} holds no cache, although its leader was to make it: all processes must see one directory"
            )
        self._match()
        return shards.missing(self.root, self._facts["sizes"], self._facts["block"])

    def write(self, block: Block, payloads: Sequence[bytes]) -> None:
        """Put a block in place, whole.

        Args:
            block: one of `missing()`.
            payloads: of its rows in their order.

        Raises:
            ValueError: not as many payloads as the block has rows.
            OSError: nothing can be written; a full disk leaves nothing half-made.
        """
        if len(payloads) != block.stop - block.start:
            raise ValueError(f"{len(payloads)} payloads are not the rows {block.start} to {block.stop} of {block}")
        with files.atomic(shards.shard(self.root, self._facts["sizes"], self._facts["block"], block)) as part:
            shards.write(part, block, payloads)

    def finish(self) -> None:
        """Write what TFDS needs to read the cache, and mark it complete.

        Raises:
            ValueError: blocks are missing, or this process does not lead.
        """
        if not self._leader:
            raise ValueError("only the leader finishes a cache")
        if missing := self.missing():
            raise ValueError(f"the cache {self.root} still lacks {len(missing)} blocks, the first is {missing[0]}")
        for domain in self._facts["sizes"]:
            shards.write_metadata(self.root, domain, self._facts["sizes"], self._facts["block"])
        self._write_manifest(complete=True)


class Store:
    """A complete cache, read by domain, split and row. Threads may share it, and it can be pickled."""

    def __init__(self, root: epath.PathLike) -> None:
        """Open the cache, and see that no block is missing or cut short.

        Args:
            root: the directory that `Writer` filled.

        Raises:
            FileNotFoundError: there is no cache.
            ValueError: it is incomplete, damaged, or of another format.
        """
        self.root = epath.Path(root).expanduser()
        if not (self.root / MANIFEST).is_file():
            raise FileNotFoundError(f"{self.root} holds no cache: make it with `jaxkd cache --config ...`")
        self.manifest = shards.read_manifest(self.root)
        sizes, size = self.manifest["sizes"], self.manifest["block"]
        number, missing = len(list(shards.blocks(sizes, size))), shards.missing(self.root, sizes, size)
        if missing or not self.manifest.get("complete"):
            first = f", the first is {shards.shard(self.root, sizes, size, missing[0])}" if missing else ""
            raise ValueError(
                f"the cache {self.root} is incomplete: {len(missing)} of {number} blocks are missing{first}; run "
                "`jaxkd cache --config ...` as before, and it goes on"
            )
        _allow_files(number, self.root)
        self._sources: dict[tuple[str, str], Any] = {}
        for domain, splits in sizes.items():
            try:
                builder = tfds.builder_from_directory(shards.folder(self.root, domain))
                for split in splits:
                    self._sources[domain, split] = builder.as_data_source(split)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(
                    f"the cache {self.root} cannot be read through TFDS ({domain}: {reason}): run "
                    "`jaxkd cache --config ...` as before, and it writes what TFDS needs again"
                ) from None

    def layout(self, split: str) -> Layout:
        """What the payloads of a split hold.

        Raises:
            ValueError: the cache has no such split.
        """
        if split not in self.manifest["layouts"]:
            raise ValueError(f"the cache {self.root} has no split {split!r}, only {list(self.manifest['layouts'])}")
        return Layout(**self.manifest["layouts"][split])

    def expect(self, wanted: Mapping[str, Any]) -> None:
        """See that the cache is what a run needs.

        Args:
            wanted: keys of the manifest, nested as there, and their values; what it does not name is not compared.

        Raises:
            ValueError: naming every difference with both sides.
        """
        shards.compare(self.root, self.manifest, shards.plain(wanted), both=False)

    def read(self, domain: str, split: str, rows: Sequence[int | np.integer] | np.ndarray) -> list[bytes]:
        """Payloads of rows, each held against its checksum.

        Args:
            domain: its name.
            split: its name.
            rows: in any order, repeats allowed.

        Raises:
            ValueError: there is no such domain or split, or a record is damaged; names file, domain and row.
            IndexError: a row is outside the split.
        """
        if (domain, split) not in self._sources:
            has = ", ".join("/".join(key) for key in self._sources)
            raise ValueError(f"the cache {self.root} has no rows of {domain}/{split}, only of {has}")
        source, wanted = self._sources[domain, split], [int(row) for row in rows]
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(source):
            where = f"{domain}/{split} in the cache {self.root}"
            raise IndexError(f"rows {min(wanted)} to {max(wanted)} were asked for, {where} has {len(source)}")
        try:
            records = source.__getitems__(wanted)
        except Exception:  # one of them, as it turns out below
            records = [None] * len(wanted)
        return [self._checked(domain, split, row, record) for row, record in zip(wanted, records, strict=True)]

    def _checked(self, domain: str, split: str, row: int, record: Mapping[str, Any] | None) -> bytes:
        try:
            record = self._sources[domain, split].__getitems__([row])[0] if record is None else record
            return shards.payload_of(record, domain, split, row)
        except Exception as error:  # a broken file, a broken message, a wrong checksum: the same to a user
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
        size = self.manifest["block"]
        block = Block(domain, split, row // size, row, row + 1)
        file = shards.shard(self.root, self.manifest["sizes"], size, block)
        raise ValueError(
            f"row {row} of {domain}/{split} in {file} is damaged: {why}. Delete that file and run "
            "`jaxkd cache --config ...` as before: it writes only what is missing"
        )


def _allow_files(number: int, root: Any) -> None:
    """Readers keep every shard open that they have read from, and a shell's usual limit is 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = 2**31 if hard == resource.RLIM_INFINITY else hard
    if number + _SPARE_FILES > hard:
        raise ValueError(
            f"the cache {root} has {number} files, and this system lets a process open {hard}: raise the limit "
            "(`ulimit -Hn`), or make the cache with larger blocks"
        )
    if soft != resource.RLIM_INFINITY:
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + number, hard), hard))
