"""The files of a cache: names, records, checksums and the manifest, as `docs/formats.md` specifies them.

A block of rows is one shard of a TFDS dataset. It is written under another name and renamed when all of it is on the
disk, so what is there is whole.
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
"""Version of the directory, the records and the payloads: raise it when one changes."""

MANIFEST = "manifest.json"

_VERSION, _NAME = "1.0.0", "signals"  # of every domain's TFDS dataset
_OPTIONS = "group_size:1,uncompressed"  # one record a chunk, to be read alone; payloads do not compress

Sizes = Mapping[str, Mapping[str, int]]
"""domain -> split -> rows"""


class Block(NamedTuple):
    """Neighbouring rows that are written at once: `start` to `stop`, not included."""

    domain: str
    split: str
    number: int
    start: int
    stop: int


def blocks(sizes: Sizes, size: int) -> Iterator[Block]:
    """All blocks of so many rows, in the order of domains, splits and rows; the last of a split may be shorter."""
    for domain, splits in sizes.items():
        for split, rows in splits.items():
            for number, start in enumerate(range(0, rows, size)):
                yield Block(domain, split, number, start, min(start + size, rows))


def folder(root: Any, domain: str) -> Any:
    """A domain's TFDS dataset."""
    return root / domain / _VERSION


def shard(root: Any, sizes: Sizes, size: int, block: Block) -> Any:
    """A block's file: TFDS's own name of a shard."""
    total = -(-sizes[block.domain][block.split] // size)
    return folder(root, block.domain) / f"{_NAME}-{block.split}.array_record-{block.number:05d}-of-{total:05d}"


def missing(root: Any, sizes: Sizes, size: int) -> list[Block]:
    """Blocks whose file is not there or does not hold as many records as it should, in order."""

    def lacks(block: Block) -> bool:
        try:
            reader = array_record_module.ArrayRecordReader(os.fspath(shard(root, sizes, size, block)))
            records = reader.num_records()
            reader.close()  # says what went wrong before
        except RuntimeError:
            return True
        return records != block.stop - block.start

    every = list(blocks(sizes, size))
    with ThreadPoolExecutor(16) as pool:
        return [block for block, is_missing in zip(every, pool.map(lacks, every)) if is_missing]


@functools.cache
def _features() -> tfds.features.FeaturesDict:
    payload = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
    number = tfds.features.Scalar(np.int64)
    return tfds.features.FeaturesDict({"row": number, "payload": payload, "checksum": number})


def _checksum(domain: str, split: str, row: int, payload: Any) -> int:
    """CRC-32 of where a payload belongs and of the payload, so that a whole one in the wrong place shows too."""
    return zlib.crc32(payload, zlib.crc32(f"{domain}\n{split}\n{row}\n".encode()))


def write(path: Path, block: Block, payloads: Sequence[bytes]) -> None:
    """A block's records to a file."""
    writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
    for row, payload in enumerate(payloads, block.start):
        checksum = _checksum(block.domain, block.split, row, payload)
        example = {"row": row, "payload": np.frombuffer(payload, np.uint8), "checksum": checksum}
        writer.write(_features().serialize_example(example))
    writer.close()


def payload_of(record: Mapping[str, Any], domain: str, split: str, row: int) -> bytes:
    """The payload of a record as TFDS reads it.

    Raises:
        ValueError: it is damaged, or another row's.
    """
    payload = np.asarray(record["payload"], np.uint8).tobytes()
    if record["checksum"] != _checksum(domain, split, row, payload):
        raise ValueError("its checksum does not fit")
    return payload


def write_metadata(root: Path, domain: str, sizes: Sizes, size: int) -> None:
    """What TFDS reads of a domain before its shards: dataset_info.json and features.json."""
    place, infos = folder(root, domain), []
    for split, rows in sizes[domain].items():
        every = list(blocks({domain: {split: rows}}, size))
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[block.stop - block.start for block in every],
                num_bytes=sum(shard(root, sizes, size, block).stat().st_size for block in every),
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=epath.Path(place), dataset_name=_NAME, split=split, filetype_suffix="array_record"
                ),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=place,
        features=_features(),
        split_infos=infos,
        check_data=False,  # it would read through TensorFlow
        description="A teacher's signal for rows of tokens, one payload a row.",
        disable_shuffling=True,
    )
    for name in ("dataset_info.json", "features.json"):
        files.sync(place / name)


def plain(facts: Any) -> Any:
    """What JSON makes of it: dicts, lists, numbers, strings."""
    return json.loads(json.dumps(facts, default=dataclasses.asdict))


def _differences(made: Any, wanted: Any, both: bool, name: str = "") -> Iterator[str]:
    if not isinstance(made, dict) or not isinstance(wanted, dict):
        if made != wanted:
            yield f"{name}={json.dumps(made)}, this run asks for {json.dumps(wanted)}"
        return
    for key in [*wanted, *(key for key in made if both and key not in wanted)]:
        where = f"{name}.{key}" if name else key
        if key not in made:
            yield f"no {where}, this run asks for {json.dumps(wanted[key])}"
        elif key not in wanted:
            yield f"{where}={json.dumps(made[key])}, this run asks for none"
        else:
            yield from _differences(made[key], wanted[key], both, where)


def compare(root: Any, made: Any, wanted: Any, both: bool) -> None:
    """See that a manifest is the one that is wanted.

    Args:
        root: the cache's.
        made: its manifest.
        wanted: keys, nested as there, and their values.
        both: what is not wanted must not be there.

    Raises:
        ValueError: naming every difference with both sides.
    """
    if found := list(_differences(made, wanted, both)):
        raise ValueError(
            f"the cache {root} was made with {'; with '.join(found)}: name another directory, or change the config"
        )


def read_manifest(root: Any) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{root / MANIFEST} is damaged: delete the cache and make it again") from None
    if not known:
        raise ValueError(f"the cache {root} has format {manifest['format']}, this jaxkd has {FORMAT}: make it again")
    return manifest
