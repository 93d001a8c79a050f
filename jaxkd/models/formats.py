"""Reading safetensors and GGUF files, and writing safetensors; the only module that imports their libraries."""

import dataclasses
import hashlib
import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_MIB = 1 << 20
_HEADER_BYTES = 100_000_000  # the format's maximum
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_STRING, _ARRAY = gguf.GGUFValueType.STRING.value, gguf.GGUFValueType.ARRAY.value
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))  # GGUF's number types, for struct


@dataclasses.dataclass(frozen=True)
class Stored:
    """Location, shape and type of one tensor in a file."""

    file: Path
    offset: int
    size: int  # bytes
    shape: tuple[int, ...]
    kind: str  # a safetensors type such as F32, or a GGUF type such as Q4_1

    def read(self) -> np.ndarray:
        """The tensor `[*shape]`, in its own type or dequantised to float32."""
        # A plain array: np.memmap's overhead per operation would dominate dequantising.
        raw = np.asarray(np.memmap(self.file, np.uint8, "r", self.offset, (self.size,)))
        if self.kind in FLOATS:
            return raw.view(FLOATS[self.kind]).reshape(self.shape)
        kind = gguf.GGMLQuantizationType[self.kind]
        rows = raw.reshape(gguf.quant_shape_to_byte_shape(self.shape, kind))
        if self.shape[0] % 16 == 0:  # blocks do not depend on rows: longer rows need fewer steps
            rows = rows.reshape(self.shape[0] // 16, -1)
        return gguf.dequantize(rows, kind).reshape(self.shape)


def fingerprint(files: Iterable[Path], entries: Mapping[str, Stored], config: bytes = b"") -> str:
    """sha256 of `config` and of the files' names, sizes, first and last MiB and 4 KiB from each tensor's middle."""
    digest = hashlib.sha256(config)
    for file in files:
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_MIB))
            opened.seek(max(0, size - _MIB))
            digest.update(opened.read())
            for entry in entries.values():
                if entry.file == file:
                    opened.seek(entry.offset + entry.size // 2)
                    digest.update(opened.read(min(4096, entry.size - entry.size // 2)))
    return digest.hexdigest()


def _require_bytes(file: Path, expected: int, entries: Mapping[str, Stored] | None = None) -> None:
    """Raises where the file ends before `expected` or the last entry's end."""
    expected = max((entry.offset + entry.size for entry in (entries or {}).values()), default=expected)
    if expected > (size := file.stat().st_size):
        raise ValueError(f"{file}: cut short: {expected} bytes expected, {size} found; fetch it again")


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(24).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file}: a Git LFS pointer, not the weights; run: git lfs pull")


def read_safetensors(file: Path) -> dict[str, Stored]:
    """Tensors of a safetensors file by name; reads the header only. Raises ValueError for a damaged file."""
    _refuse_pointer(file)
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        if start > _HEADER_BYTES:
            raise ValueError(f"{file}: not a safetensors file")
        _require_bytes(file, start)
        header_text = opened.read(start - 8)
    entries = {}
    try:
        header = json.loads(header_text)
        header.pop("__metadata__", None)
        for name, info in header.items():
            begin, end = info["data_offsets"]
            entries[name] = Stored(file, start + begin, end - begin, tuple(info["shape"]), info["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: not a safetensors file, or its header is damaged") from None
    for name, entry in entries.items():
        if entry.kind in FLOATS and entry.size != math.prod(entry.shape) * np.dtype(FLOATS[entry.kind]).itemsize:
            raise ValueError(f"{file}: {name} takes {entry.size} bytes, which is not {entry.kind} {entry.shape}")
    _require_bytes(file, start, entries)
    return entries


def save_safetensors(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes model.safetensors, or numbered shards of `shard_bytes` (or one tensor) and their index.

    Holds the tensors of one shard in memory. The directory must exist.
    """
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = held = 0

    def close() -> None:
        # transformers requires this entry; the tensors are the same for every framework.
        save_file(pending, directory / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, array in tensors:
        if pending and held + array.nbytes > shard_bytes:
            close()
            held = 0
        pending[name] = np.ascontiguousarray(array)  # the library ignores strides
        held, total = held + array.nbytes, total + array.nbytes
    close()
    if len(shards) == 1:
        (directory / "0.part").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.part").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array in a GGUF header that is decoded on demand, because a vocabulary is slow to decode."""

    file: Path
    offset: int
    kind: int
    count: int

    def __len__(self) -> int:
        return self.count

    def decode(self) -> list:
        with _Cursor(self.file, self.offset) as cursor:
            if self.kind in _NUMBERS:
                return list(struct.unpack_from(f"<{self.count}{_NUMBERS[self.kind]}", cursor.data, self.offset))
            if self.kind != _STRING:
                return [cursor.value(self.kind) for _ in range(self.count)]
            strings, offset, size = [], self.offset, struct.Struct("<Q")
            for _ in range(self.count):  # without a call per string: a vocabulary has 100,000 of them
                end = offset + 8 + size.unpack_from(cursor.data, offset)[0]
                strings.append(cursor.data[offset + 8 : end].decode())
                offset = end
            return strings


class _Cursor:
    """Reads a GGUF header's values in sequence, about ten times faster than the gguf package's own reader."""

    def __init__(self, file: Path, offset: int = 0) -> None:
        self.file, self.offset = file, offset

    def __enter__(self) -> "_Cursor":
        with self.file.open("rb") as opened:
            self.data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self

    def __exit__(self, *_: object) -> None:
        self.data.close()

    def number(self, code: str) -> Any:
        number = struct.Struct(f"<{code}")
        (value,) = number.unpack_from(self.data, self.offset)
        self.offset += number.size
        return value

    def string(self) -> str:
        size = self.number("Q")
        self.offset += size
        return self.data[self.offset - size : self.offset].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        lazy = Lazy(self.file, self.offset, inner, count)
        if inner in _NUMBERS:
            self.offset += count * struct.calcsize(f"<{_NUMBERS[inner]}")
        else:
            for _ in range(count):
                if inner == _STRING:
                    self.offset += 8 + struct.unpack_from("<Q", self.data, self.offset)[0]
                else:
                    self.value(inner)
        return lazy


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(metadata, tensors by name) of a GGUF file; reads the header only (ggml/docs/gguf.md)."""
    _refuse_pointer(file)
    _require_bytes(file, 24)
    with _Cursor(file) as cursor:
        magic, version = cursor.number("I"), cursor.number("I")
        if magic != gguf.GGUF_MAGIC or version not in (2, 3):
            raise ValueError(f"{file}: not a little-endian GGUF file of version 2 or 3")
        count, keys = cursor.number("Q"), cursor.number("Q")
        try:
            fields = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(keys)}
            kind = lambda: gguf.GGMLQuantizationType(cursor.number("I"))
            shape = lambda: tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
            infos = [(cursor.string(), shape(), kind(), cursor.number("Q")) for _ in range(count)]
        except (struct.error, UnicodeDecodeError, KeyError, ValueError, OverflowError):
            size = file.stat().st_size
            raise ValueError(f"{file}: cut short: header damaged or beyond its {size} bytes; fetch it again") from None
        if fields.get("split.count", 1) > 1:
            raise ValueError(f"{file}: one part of a split GGUF file; join them with llama-gguf-split --merge")
        align = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        start = -(-cursor.offset // align) * align
    entries = {}
    for name, dims, type_, offset in infos:
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        entries[name] = Stored(file, start + offset, math.prod(dims) // block * block_bytes, dims, type_.name)
    _require_bytes(file, start, entries)
    return fields, entries
