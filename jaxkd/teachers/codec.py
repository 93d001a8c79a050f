"""Encode and decode one row of a teacher's signal as bytes, in the format of `docs/formats.md`.

Only tokens with weight are stored, with a bit mask. A row's ids are one ascending sequence under an Elias-Fano code:
about 2 + log2(V / K) bits per id, within two bits of the lower bound.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxkd.core.types import LOG_FLOOR, Hidden, Sampled, TopK

DTYPES = {"hidden": ("bfloat16", "int8", "float32"), "top_k": ("uint8", "float32"), "sampled": ("",), "token": ("",)}
"""Signals that can be stored, and their float dtypes; ids, counts and tokens are stored exactly."""

_GRID = 255.0  # largest code of a log-probability
_STEPS = 127.0  # largest code of a hidden state


class Text(NamedTuple):
    """A row of the teacher's own text: the fields of a `Batch` that it replaces."""

    tokens: Any  # int32 [*rows L]
    targets: Any  # int32: the next token of the same segment, 0 where there is none
    weights: Any  # float32, 0 or 1
    segments: Any  # int32, as in a `Batch`
    positions: Any  # int32: from 0 in each segment


Row = Hidden | TopK | Sampled | Text


@dataclasses.dataclass(frozen=True)
class Layout:
    """The contents of a payload; fields that the signal does not use keep their defaults.

    Raises ValueError: a size is invalid or too large for the code of ids.
    """

    signal: str
    length: int  # L, tokens in a row
    vocab: int = 0  # true vocabulary size
    entries: int = 0  # K of a top-k signal, or draws per token
    temperatures: Sequence[float] = ()  # of a top-k signal's tails
    width: int = 0  # E of hidden states
    dtype: str = ""  # one of the signal's `DTYPES`

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(self.temperatures))  # JSON gives a list
        if self.signal not in DTYPES:
            raise ValueError(f"signal {self.signal!r} cannot be stored, only {', '.join(DTYPES)}")
        if self.dtype not in DTYPES[self.signal]:
            raise ValueError(f"a {self.signal} signal is stored as {DTYPES[self.signal]}, not as {self.dtype!r}")
        sparse = self.signal in ("top_k", "sampled")
        needed = {"length": True, "width": self.signal == "hidden", "vocab": self.signal != "hidden", "entries": sparse}
        for name, is_needed in needed.items():
            if is_needed and getattr(self, name) < 1:
                raise ValueError(f"the {name} of a {self.signal} signal must be at least 1, got {getattr(self, name)}")
        if self.signal == "top_k" and not self.temperatures:
            raise ValueError("a top_k signal needs at least one temperature at which its tail is stored")
        if self.signal == "top_k" and self.entries > self.vocab:
            raise ValueError(f"entries={self.entries} is more than the vocabulary of {self.vocab} ids")
        if self.vocab > 2**31 or self.length * max(self.vocab, self.entries) >= 2**62 or (
            self.signal == "sampled" and self.length * self.entries >= 2**32
        ):  # fmt: skip
            raise ValueError(
                f"{self.length} tokens of {self.entries} entries in a vocabulary of {self.vocab} are too many for the "
                "code of ids: make the rows shorter"
            )


class _Reader:
    """Reads a payload from front to back."""

    def __init__(self, payload: bytes) -> None:
        self.payload, self.offset = payload, 0

    def array(self, dtype: Any, *shape: int) -> np.ndarray:
        kind, count = np.dtype(dtype), math.prod(shape)
        start, self.offset = self.offset, self.offset + kind.itemsize * count
        if self.offset > len(self.payload):
            raise ValueError(f"a payload of {len(self.payload)} bytes is too short for its layout")
        return np.frombuffer(self.payload, kind, count, start).reshape(shape)

    def bits(self, *shape: int) -> np.ndarray:
        """[... n] bool; runs of the last axis are padded to whole bytes."""
        packed = self.array(np.uint8, *shape[:-1], -(-shape[-1] // 8))
        return np.unpackbits(packed, axis=-1, count=shape[-1], bitorder="little").view(bool)

    def ones(self, count: int, bits: int) -> np.ndarray:
        """Indices of the ones among `bits` bits, int64 [count]."""
        indices = np.flatnonzero(self.bits(bits))
        if len(indices) != count:
            raise ValueError(f"a payload is damaged, or of another layout: it has {len(indices)} ids, not {count}")
        return indices


def _bits(values: np.ndarray) -> bytes:
    return np.packbits(values, axis=-1, bitorder="little").tobytes()


def _ones(indices: np.ndarray, bits: int) -> bytes:
    ones = np.zeros(bits, bool)
    ones[indices] = True
    return _bits(ones)


def _low_bits(count: int, span: int) -> int:
    return (span // count).bit_length() - 1


def _encode_rising(values: np.ndarray, span: int) -> bytes:
    """Elias-Fano code of strictly ascending int64 [n] in [0, span).

    The lowest l = floor(log2(span / n)) bits of each value verbatim, in l planes of n bits; the upper bits h in unary,
    as ones at indices h_i + i of a bit vector. Source: Elias 1974; Fano 1971.
    """
    if not len(values):
        return b""
    low = _low_bits(len(values), span)
    planes = (values >> np.arange(low)[:, None]) & 1
    high = _ones((values >> low) + np.arange(len(values)), ((span - 1) >> low) + len(values))
    return _bits(planes.astype(bool)) + high


def _decode_rising(reader: _Reader, count: int, span: int) -> np.ndarray:
    if not count:
        return np.zeros(0, np.int64)
    low = _low_bits(count, span)
    planes = reader.bits(low, count)
    values = reader.ones(count, ((span - 1) >> low) + count) - np.arange(count)
    for plane in planes[::-1]:
        values <<= 1
        values |= plane
    return values


def _round_up(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest float16 that is not smaller."""
    near = values.astype(np.float16)
    return np.where(near < values, np.nextafter(near, np.float16(np.inf)), near)


def _require(valid: np.ndarray, live: np.ndarray, message: str) -> None:
    """Raise for the first live token, of bool [n], that is not valid, with its index in the row."""
    if not valid.all():
        raise ValueError(f"token {np.flatnonzero(live)[np.argmin(valid)]} of a row {message}")


def _encode_hidden(layout: Layout, row: Hidden, live: np.ndarray) -> list[bytes]:
    x = np.asarray(row.hidden)[live].astype(np.float32)
    _require(np.isfinite(x).all(-1), live, "has hidden states that are not finite")
    if layout.dtype != "int8":
        stored = x.astype(_float(layout))
        _require(np.isfinite(stored).all(-1), live, f"has hidden states beyond the range of {layout.dtype}")
        return [stored.tobytes()]
    scale = np.abs(x).max(-1)
    steps = np.rint(x / np.where(scale > 0, scale, 1.0)[:, None] * np.float32(_STEPS))
    return [scale.astype("<f4").tobytes(), steps.astype(np.int8).tobytes()]


def _decode_hidden(layout: Layout, reader: _Reader, row: Hidden, live: np.ndarray) -> None:
    size, hidden = int(live.sum()), np.asarray(row.hidden)
    if layout.dtype == "int8":
        scale = reader.array("<f4", size)
        hidden[live] = reader.array(np.int8, size, layout.width) * (scale / np.float32(_STEPS))[:, None]
    else:
        hidden[live] = reader.array(_float(layout), size, layout.width)


def _float(layout: Layout) -> np.dtype:
    if layout.dtype == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype("<f2" if layout.dtype == "uint8" else "<f4")


def _encode_top_k(layout: Layout, row: TopK, live: np.ndarray) -> list[bytes]:
    ids, tail = np.asarray(row.ids)[live].astype(np.int64), np.asarray(row.tail, np.float32)[live]
    order = np.argsort(ids, -1)
    ids = np.take_along_axis(ids, order, -1)
    lp = np.take_along_axis(np.asarray(row.logprobs, np.float32)[live], order, -1)
    inside = (ids[:, 0] >= 0) & (ids[:, -1] < layout.vocab) & (np.diff(ids) > 0).all(-1)
    _require(inside, live, f"does not have {layout.entries} different ids from 0 to {layout.vocab - 1}")
    valid = (lp <= 1e-3).all(-1) & (tail <= 1e-3).all(-1)  # false for NaN too
    _require(valid, live, "has log-probabilities above 0 or NaN: normalise the logits over the whole vocabulary first")
    code = _encode_rising((ids + np.arange(len(ids))[:, None] * layout.vocab).ravel(), len(ids) * layout.vocab)
    if layout.dtype == "float32":
        return [tail.astype("<f4").tobytes(), lp.astype("<f4").tobytes(), code]
    lp = np.maximum(lp, LOG_FLOOR)
    top = _round_up(lp.max(-1, initial=LOG_FLOOR))
    below = top.astype(np.float32)[:, None] - lp
    spread = _round_up(below.max(-1, initial=0.0))
    share = below / np.where(spread > 0, spread, 1).astype(np.float32)[:, None]
    grid = np.rint(np.sqrt(share) * np.float32(_GRID)).astype(np.uint8)
    halves = [x.astype("<f2").tobytes() for x in (top, spread, np.clip(tail, LOG_FLOOR, 0.0))]
    return [*halves, grid.tobytes(), code]


def _decode_top_k(layout: Layout, reader: _Reader, row: TopK, live: np.ndarray) -> None:
    size, dtype = int(live.sum()), _float(layout)
    ids, logprobs, tail = (np.asarray(x) for x in row)
    if layout.dtype == "float32":
        tail[live] = reader.array(dtype, size, len(layout.temperatures))
        logprobs[live] = reader.array(dtype, size, layout.entries)
    else:
        top, spread = reader.array(dtype, 2, size, 1).astype(np.float32)
        tail[live] = reader.array(dtype, size, len(layout.temperatures))
        share = reader.array(np.uint8, size, layout.entries) / np.float32(_GRID)
        logprobs[live] = top - spread * np.square(share)
    values = _decode_rising(reader, size * layout.entries, size * layout.vocab).reshape(size, layout.entries)
    ids[live] = values - np.arange(size)[:, None] * layout.vocab


def _encode_sampled(layout: Layout, row: Sampled, live: np.ndarray) -> list[bytes]:
    ids, counts = (np.asarray(x)[live].astype(np.int64) for x in row)
    drawn = counts > 0
    _require(np.where(drawn, counts, 0).sum(-1) == layout.entries, live, f"does not have {layout.entries} draws")
    inside = (~drawn | ((ids >= 0) & (ids < layout.vocab))).all(-1)
    _require(inside, live, f"has a drawn id outside 0 to {layout.vocab - 1}")
    values = (ids + np.arange(len(ids))[:, None] * layout.vocab)[drawn]
    order = np.argsort(values)
    values, counts = values[order], counts[drawn][order]
    if len(repeated := values[1:][np.diff(values) == 0]):
        unique = np.arange(len(ids)) != repeated[0] // layout.vocab
        _require(unique, live, "has an id twice: add up its counts")
    number = np.array(len(values), "<u4").tobytes()
    draws = _ones(np.cumsum(counts) - 1, len(ids) * layout.entries)
    return [number, _encode_rising(values, len(ids) * layout.vocab), draws]


def _decode_sampled(layout: Layout, reader: _Reader, row: Sampled, live: np.ndarray) -> None:
    size = int(live.sum())
    number = int(reader.array("<u4", 1)[0])
    if number > size * layout.entries or (size and not number):
        raise ValueError(f"a payload is damaged, or of another layout: {number} ids of {size} tokens")
    token, ids = np.divmod(_decode_rising(reader, number, size * layout.vocab), layout.vocab)
    counts = np.diff(reader.ones(number, size * layout.entries), prepend=-1)
    if (np.bincount(token, counts, minlength=size) != layout.entries).any():
        raise ValueError("a payload is damaged, or of another layout: its draws do not belong to its tokens")
    index = np.flatnonzero(live)[token], np.arange(number) - np.searchsorted(token, token)
    np.asarray(row.ids)[index], np.asarray(row.counts)[index] = ids, counts


def _text(tokens: np.ndarray, segments: np.ndarray, live: np.ndarray) -> Text:
    """All fields of a row from its tokens, segments and the bool mask of tokens with weight, each [L]."""
    index = np.arange(len(tokens))
    begins = np.diff(segments, prepend=-1) != 0
    positions = np.where(segments > 0, index - np.maximum.accumulate(np.where(begins, index, 0)), 0)
    continues = np.append(~begins[1:], False) & (segments > 0)
    targets = np.where(continues, np.append(tokens[1:], 0), 0)
    return Text(tokens, targets, live.astype(np.float32), segments, positions)


def _encode_token(layout: Layout, row: Text, live: np.ndarray) -> list[bytes]:
    tokens, segments = (np.asarray(x, np.int64) for x in (row.tokens, row.segments))
    every = np.ones(layout.length, bool)
    _require((tokens >= 0) & (tokens < layout.vocab), every, f"is outside 0 to {layout.vocab - 1}")
    _require((segments >= 0) & (segments < 2**16), every, "has a segment number beyond 16 bits")
    implied = _text(tokens, segments, live)
    compared = {"weights": every, "targets": live, "positions": segments > 0}
    for name, where in compared.items():
        same = (np.asarray(getattr(row, name)) == getattr(implied, name)) | ~where
        _require(same, every, f"has {name} that do not follow from its tokens, its segments and `live`")
    return [tokens.astype("<i4").tobytes(), segments.astype("<u2").tobytes()]


def _decode_token(layout: Layout, reader: _Reader, row: Text, live: np.ndarray) -> None:
    tokens, segments = reader.array("<i4", layout.length), reader.array("<u2", layout.length)
    for out, values in zip(row, _text(tokens, segments.astype(np.int32), live)):
        out[...] = values


_CODECS: dict[str, tuple[Any, Callable[..., list[bytes]], Callable[..., None]]] = {
    "hidden": (Hidden, _encode_hidden, _decode_hidden),
    "top_k": (TopK, _encode_top_k, _decode_top_k),
    "sampled": (Sampled, _encode_sampled, _decode_sampled),
    "token": (Text, _encode_token, _decode_token),
}


def _fields(f: Layout) -> list[tuple[int | None, Any, float]]:
    """Size, dtype and padding of each field of a row."""
    hidden = ml_dtypes.bfloat16 if f.dtype == "bfloat16" else np.float32
    fields: dict[str, list[tuple[int | None, Any, float]]] = {
        "hidden": [(f.width, hidden, 0)],
        # A padding token has all its mass in the tail: log 1 = 0.
        "top_k": [(f.entries, np.int32, -1), (f.entries, np.float32, -np.inf), (len(f.temperatures), np.float32, 0)],
        "sampled": [(f.entries, np.int32, -1), (f.entries, np.int32, 0)],
        "token": [(None, np.float32 if name == "weights" else np.int32, 0) for name in Text._fields],
    }
    return fields[f.signal]


def encode(layout: Layout, row: Row, live: np.ndarray) -> bytes:
    """A row's payload.

    Log-probabilities as "uint8" are lp ~ top - spread (c / 255)^2 with c in 0..255, with an error of at most
    spread (c + 1/4) / 255^2, smallest where probable. The entries' mass may then differ from 1 - exp(tail) by as much
    in proportion; the kernels renormalise to that mass. Values below `LOG_FLOOR` are stored as `LOG_FLOOR`. Hidden
    states as "int8" have an error of at most max |x| / 254 over their token, plus float32 rounding.

    `row` has arrays [L ...]; `live` bool [L] marks the tokens to store, those with weight.

    Raises ValueError: the row is not of this layout, or has a value that cannot be stored; names the first such token.
    """
    (kind, encode_fields, _), live = _CODECS[layout.signal], np.asarray(live)
    if not isinstance(row, kind):
        raise ValueError(f"a {layout.signal} signal is stored from a {kind.__name__}, got {type(row).__name__}")
    if live.dtype != bool or live.shape != (layout.length,):
        raise ValueError(f"live must be bool [{layout.length}], got {live.dtype} {list(live.shape)}")
    for name, values, (size, *_) in zip(row._fields, row, _fields(layout)):
        got, wanted = np.shape(values), (layout.length, *(() if size is None else (size,)))
        if got != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(got)}")
    return b"".join([_bits(live), *encode_fields(layout, row, live)])


def empty(layout: Layout, *rows: int) -> Row:
    """Rows of padding only, arrays [*rows L ...]."""
    shape, kind = (*rows, layout.length), _CODECS[layout.signal][0]
    return kind(*[np.full(shape if size is None else (*shape, size), x, t) for size, t, x in _fields(layout)])


def decode_rows(layout: Layout, payloads: Sequence[bytes]) -> Row:
    """Rows of one layout, stacked: numpy arrays [B L ...], int32 and float32, or bfloat16 for hidden states stored so.

    Ids ascend within a token. Tokens that were not stored have padding: ids -1, log-probabilities -inf, a tail of 0
    (all the mass), counts 0, hidden states 0.

    Raises ValueError: a payload is damaged or not of this layout.
    """
    decode, rows = _CODECS[layout.signal][2], empty(layout, len(payloads))
    for b, payload in enumerate(payloads):
        reader = _Reader(payload)
        live = reader.bits(layout.length)
        decode(layout, reader, type(rows)(*[values[b] for values in rows]), live)
        if reader.offset != len(payload):
            raise ValueError(f"a payload has {len(payload)} bytes, its layout {reader.offset}")
    return rows
