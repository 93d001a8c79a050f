"""A cache's files: names, records, checksums and manifest, in the format of `docs/formats.md`.

A block of rows is one shard of a TFDS dataset, written to a temporary file and renamed, so that it is complete.
"""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from jaxkd.runtime import files

FORMAT = 1
"""Version of directory, records and payloads together."""

MANIFEST = "manifest.json"

_VERSION, _NAME = "1.0.0", "signals"  # of every domain's TFDS dataset
_OPTIONS = "group_size:1,uncompressed"  # one record per chunk, for random access; payloads do not compress

Sizes = Mapping[str, Mapping[str, int]]
"""domain -> split -> rows"""


class Block(NamedTuple):
    """Consecutive rows [start, stop) that are written as one shard."""

    domain: str
    split: str
    number: int
    start: int
    stop: int


class Shards(NamedTuple):
    """A cache's blocks of `size` rows, each a shard of its domain's TFDS dataset."""

    root: Any
    sizes: Sizes
    size: int

    def blocks(self) -> Iterator[Block]:
        """All blocks by domain, split and row; the last one of a split may be shorter."""
        for domain, splits in self.sizes.items():
            for split, rows in splits.items():
                for number, start in enumerate(range(0, rows, self.size)):
                    yield Block(domain, split, number, start, min(start + self.size, rows))

    def folder(self, domain: str) -> Any:
        """The directory of a domain's TFDS dataset."""
        return self.root / domain / _VERSION

    def path(self, block: Block) -> Any:
        """The file of a block, in TFDS's naming of shards."""
        total = -(-self.sizes[block.domain][block.split] // self.size)
        return self.folder(block.domain) / f"{_NAME}-{block.split}.array_record-{block.number:05d}-of-{total:05d}"

    def missing(self) -> list[Block]:
        """Blocks whose file is missing or has the wrong number of records, in the order of `blocks`."""

        def is_missing(block: Block) -> bool:
            try:
                reader = array_record_module.ArrayRecordReader(os.fspath(self.path(block)))
                records = reader.num_records()
                reader.close()  # raises for errors of the calls before
            except RuntimeError:
                return True
            return records != block.stop - block.start

        expected = list(self.blocks())
        with ThreadPoolExecutor(16) as pool:
            return [block for block, missing in zip(expected, pool.map(is_missing, expected)) if missing]

    def write_metadata(self, domain: str) -> None:
        """Write TFDS's dataset_info.json and features.json of a domain."""
        directory, infos = self.folder(domain), []
        for split in self.sizes[domain]:
            of_split = [block for block in self.blocks() if (block.domain, block.split) == (domain, split)]
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[block.stop - block.start for block in of_split],
                    num_bytes=sum(self.path(block).stat().st_size for block in of_split),
                    filename_template=tfds.core.ShardedFileTemplate(
                        data_dir=epath.Path(directory), dataset_name=_NAME, split=split, filetype_suffix="array_record"
                    ),
                )
            )
        tfds.folder_dataset.write_metadata(
            data_dir=directory,
            features=_features(),
            split_infos=infos,
            check_data=False,  # it would import TensorFlow
            description="A teacher's signal for rows of tokens, one payload a row.",
            disable_shuffling=True,
        )
        for name in ("dataset_info.json", "features.json"):
            files.sync(directory / name)


@functools.cache
def _features() -> tfds.features.FeaturesDict:
    payload = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
    number = tfds.features.Scalar(np.int64)
    return tfds.features.FeaturesDict({"row": number, "payload": payload, "checksum": number})


def _checksum(domain: str, split: str, row: int, payload: Any) -> int:
    """CRC-32 of a payload with its address, so that an intact payload of another row fails too."""
    return zlib.crc32(payload, zlib.crc32(f"{domain}\n{split}\n{row}\n".encode()))


def write(path: Path, block: Block, payloads: Sequence[bytes]) -> None:
    """Write a block's records to a file."""
    writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
    for row, payload in enumerate(payloads, block.start):
        checksum = _checksum(block.domain, block.split, row, payload)
        example = {"row": row, "payload": np.frombuffer(payload, np.uint8), "checksum": checksum}
        writer.write(_features().serialize_example(example))
    writer.close()


def payload_of(record: Mapping[str, Any], domain: str, split: str, row: int) -> bytes:
    """The payload of a TFDS record; ValueError if its checksum does not match."""
    payload = np.asarray(record["payload"], np.uint8).tobytes()
    if record["checksum"] != _checksum(domain, split, row, payload):
        raise ValueError("its checksum does not match")
    return payload


def plain(facts: Any) -> Any:
    """The value after a round trip through JSON; dataclasses become dicts."""
    return json.loads(json.dumps(facts, default=dataclasses.asdict))


def _differences(stored: Any, wanted: Any, exact: bool, name: str = "") -> Iterator[str]:
    if not isinstance(stored, dict) or not isinstance(wanted, dict):
        if stored != wanted:
            yield f"{name}={json.dumps(stored)}, this run asks for {json.dumps(wanted)}"
        return
    for key in [*wanted, *(key for key in stored if exact and key not in wanted)]:
        path = f"{name}.{key}" if name else key
        if key not in stored:
            yield f"no {path}, this run asks for {json.dumps(wanted[key])}"
        elif key not in wanted:
            yield f"{path}={json.dumps(stored[key])}, this run asks for none"
        else:
            yield from _differences(stored[key], wanted[key], exact, path)


def compare(root: Any, stored: Any, wanted: Any, exact: bool) -> None:
    """Compare a stored manifest with the expected values, nested alike; with `exact`, other keys are differences too.

    Raises ValueError: naming every difference.
    """
    if differences := list(_differences(stored, wanted, exact)):
        raise ValueError(
            f"the cache {root} was made with {'; with '.join(differences)}: name another directory, or change the "
            "config"
        )


def read_manifest(root: Any) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the manifest is damaged, of another format, or missing beside the cache's blocks.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        supported = manifest["format"] == FORMAT
    except FileNotFoundError:
        if not has_blocks(root):
            raise FileNotFoundError(f"{root} holds no cache: make it with `jaxkd cache --config ...`") from None
        state = "missing"
    except (ValueError, KeyError, TypeError):
        state = "damaged"
    else:
        if supported:
            return manifest
        state = f"of format {manifest['format']}, where this jaxkd has {FORMAT}"
    raise ValueError(
        f"{path} is {state}, and without it the cache is of no known teacher and rows: restore that file, or delete "
        f"{root} and run `jaxkd cache --config ...`"
    )


def has_blocks(root: Any) -> bool:
    """Whether a directory has blocks of a cache, even without a manifest."""
    return any(True for _ in root.glob(f"*/{_VERSION}/{_NAME}-*"))
