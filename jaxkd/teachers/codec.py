"""One row of a teacher's signal as bytes, and back: what `docs/formats.md` specifies byte by byte.

Only tokens with weight are stored; a bit mask says which. Ids within a row are one rising sequence under one
Elias-Fano code, which takes about 2 + log2(V / K) bits an id, two more than no code at all could beat.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxkd.core.types import LOG_FLOOR, Hidden, Sampled, TopK

DTYPES = {"hidden": ("bfloat16", "int8", "float32"), "top_k": ("uint8", "float32"), "sampled": ("",), "token": ("",)}
"""Signals that can be stored, and what their numbers may be stored as; ids, counts and tokens are always exact."""

_GRID = 255.0  # largest code of a log-probability
_STEPS = 127.0  # largest code of a hidden state


class Text(NamedTuple):
    """A row whose tokens the teacher wrote: the fields of a `Batch` that take the place of the data's."""

    tokens: Any  # int32 [*rows L]
    targets: Any  # int32: the next token of the same segment, 0 where there is none
    weights: Any  # float32, 0 or 1
    segments: Any  # int32, as in a `Batch`
    positions: Any  # int32: from 0 in each segment


Row = Hidden | TopK | Sampled | Text


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a payload holds; what its signal has no use for stays at its default.

    Args:
        signal: "hidden", "top_k", "sampled" or "token".
        length: L, tokens in a row.
        vocab: V, true vocabulary.
        entries: K of a top-k signal, or the draws N of a sampled one.
        temperatures: T at which the tail of a top-k signal is stored.
        width: E of hidden states.
        dtype: one that `DTYPES` names for the signal.

    Raises:
        ValueError: for sizes that no payload can have.
    """

    signal: str
    length: int
    vocab: int = 0
    entries: int = 0
    temperatures: Sequence[float] = ()
    width: int = 0
    dtype: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(self.temperatures))  # a list where it comes from JSON
        if self.signal not in DTYPES:
            raise ValueError(f"signal {self.signal!r} cannot be stored, only {', '.join(DTYPES)}")
        if self.dtype not in DTYPES[self.signal]:
            raise ValueError(f"a {self.signal} signal is stored as {DTYPES[self.signal]}, not as {self.dtype!r}")
        sparse = self.signal in ("top_k", "sampled")
        needed = {"length": True, "width": self.signal == "hidden", "vocab": self.signal != "hidden", "entries": sparse}
        for name in [name for name, is_needed in needed.items() if is_needed]:
            if getattr(self, name) < 1:
                raise ValueError(f"the {name} of a {self.signal} signal must be at least 1, got {getattr(self, name)}")
        if self.signal == "top_k" and not self.temperatures:
            raise ValueError("a top_k signal needs at least one temperature at which its tail is stored")
        if self.signal == "top_k" and self.entries > self.vocab:
            raise ValueError(f"there are no {self.entries} different ids in a vocabulary of {self.vocab}")
        if self.vocab > 2**31 or self.length * max(self.vocab, self.entries) >= 2**62 or (
            self.signal == "sampled" and self.length * self.entries >= 2**32
        ):  # fmt: skip
            raise ValueError(
                f"{self.length} tokens of {self.entries} entries in a vocabulary of {self.vocab} are more than the "
                "code of ids can hold: make the rows shorter"
            )


class _Reader:
    """A payload, taken from its beginning to its end."""

    def __init__(self, payload: bytes) -> None:
        self.payload, self.offset = payload, 0

    def array(self, dtype: Any, *shape: int) -> np.ndarray:
        kind, count = np.dtype(dtype), math.prod(shape)
        start, self.offset = self.offset, self.offset + kind.itemsize * count
        if self.offset > len(self.payload):
            raise ValueError(f"a payload of {len(self.payload)} bytes is too short for what it should hold")
        return np.frombuffer(self.payload, kind, count, start).reshape(shape)

    def bits(self, *shape: int) -> np.ndarray:
        """[... n] bool; the last axis is packed by itself."""
        packed = self.array(np.uint8, *shape[:-1], -(-shape[-1] // 8))
        return np.unpackbits(packed, axis=-1, count=shape[-1], bitorder="little").view(bool)

    def ones(self, count: int, bits: int) -> np.ndarray:
        """Places of the ones among so many bits, int64 [count]."""
        found = np.flatnonzero(self.bits(bits))
        if len(found) != count:
            raise ValueError(f"a payload is damaged, or of another layout: {len(found)} ids where {count} should be")
        return found


def _bits(values: np.ndarray) -> bytes:
    return np.packbits(values, axis=-1, bitorder="little").tobytes()


def _unary(places: np.ndarray, bits: int) -> bytes:
    marks = np.zeros(bits, bool)
    marks[places] = True
    return _bits(marks)


def _low_bits(count: int, span: int) -> int:
    return (span // count).bit_length() - 1


def _encode_rising(values: np.ndarray, span: int) -> bytes:
    """Elias-Fano code of strictly rising int64 [n] in [0, span).

    The lowest l = floor(log2(span / n)) bits of each value as they are, in l planes of n bits; the rest h in unary,
    as ones at places h_i + i of a bit vector. Source: Elias 1974; Fano 1971.
    """
    if not len(values):
        return b""
    low = _low_bits(len(values), span)
    planes = (values >> np.arange(low)[:, None]) & 1
    high = _unary((values >> low) + np.arange(len(values)), ((span - 1) >> low) + len(values))
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
    """float32 to the next float16 that is not below."""
    near = values.astype(np.float16)
    return np.where(near < values, np.nextafter(near, np.float16(np.inf)), near)


def _require(good: np.ndarray, live: np.ndarray, what: str) -> None:
    """See that every live token [n] is good, or name the first that is not by its place in the row."""
    if not good.all():
        raise ValueError(f"token {np.flatnonzero(live)[np.argmin(good)]} of a row {what}")


def _encode_hidden(layout: Layout, row: Hidden, live: np.ndarray) -> list[bytes]:
    x = np.asarray(row.hidden)[live].astype(np.float32)
    _require(np.isfinite(x).all(-1), live, "has hidden states that are not finite: nothing can be stored of it")
    if layout.dtype != "int8":
        kept = x.astype(_float(layout))
        _require(np.isfinite(kept).all(-1), live, f"has hidden states beyond the range of {layout.dtype}")
        return [kept.tobytes()]
    scale = np.abs(x).max(-1)
    steps = np.rint(x / np.where(scale > 0, scale, 1.0)[:, None] * np.float32(_STEPS))
    return [scale.astype("<f4").tobytes(), steps.astype(np.int8).tobytes()]


def _decode_hidden(layout: Layout, reader: _Reader, row: Hidden, live: np.ndarray) -> None:
    size, out = int(live.sum()), np.asarray(row.hidden)
    if layout.dtype == "int8":
        scale = reader.array("<f4", size)
        out[live] = reader.array(np.int8, size, layout.width) * (scale / np.float32(_STEPS))[:, None]
    else:
        out[live] = reader.array(_float(layout), size, layout.width)


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
    proper = (lp <= 1e-3).all(-1) & (tail <= 1e-3).all(-1)  # false for NaN too
    _require(proper, live, "has log-probabilities above 0 or NaN: normalise the logits over the whole vocabulary first")
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
    size, kept = int(live.sum()), _float(layout)
    ids, logprobs, tail = (np.asarray(x) for x in row)
    if layout.dtype == "float32":
        tail[live] = reader.array(kept, size, len(layout.temperatures))
        logprobs[live] = reader.array(kept, size, layout.entries)
    else:
        top, spread = reader.array(kept, 2, size, 1).astype(np.float32)
        tail[live] = reader.array(kept, size, len(layout.temperatures))
        share = reader.array(np.uint8, size, layout.entries) / np.float32(_GRID)
        logprobs[live] = top - spread * np.square(share)
    rising = _decode_rising(reader, size * layout.entries, size * layout.vocab).reshape(size, layout.entries)
    ids[live] = rising - np.arange(size)[:, None] * layout.vocab


def _encode_sampled(layout: Layout, row: Sampled, live: np.ndarray) -> list[bytes]:
    ids, counts = (np.asarray(x)[live].astype(np.int64) for x in row)
    kept = counts > 0
    _require(np.where(kept, counts, 0).sum(-1) == layout.entries, live, f"does not have {layout.entries} draws")
    inside = (~kept | ((ids >= 0) & (ids < layout.vocab))).all(-1)
    _require(inside, live, f"has a drawn id outside 0 to {layout.vocab - 1}")
    values = (ids + np.arange(len(ids))[:, None] * layout.vocab)[kept]
    order = np.argsort(values)
    values, counts = values[order], counts[kept][order]
    if len(again := values[1:][np.diff(values) == 0]):
        good = np.arange(len(ids)) != again[0] // layout.vocab
        _require(good, live, "has an id twice: add up its counts")
    number = np.array(len(values), "<u4").tobytes()
    draws = _unary(np.cumsum(counts) - 1, len(ids) * layout.entries)
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
    place = np.flatnonzero(live)[token], np.arange(number) - np.searchsorted(token, token)
    np.asarray(row.ids)[place], np.asarray(row.counts)[place] = ids, counts


def _text(tokens: np.ndarray, segments: np.ndarray, live: np.ndarray) -> Text:
    """What follows from tokens, segments and which tokens have weight, all [L]."""
    place = np.arange(len(tokens))
    begins = np.diff(segments, prepend=-1) != 0
    positions = np.where(segments > 0, place - np.maximum.accumulate(np.where(begins, place, 0)), 0)
    goes_on = np.append(~begins[1:], False) & (segments > 0)
    targets = np.where(goes_on, np.append(tokens[1:], 0), 0)
    return Text(tokens, targets, live.astype(np.float32), segments, positions)


def _encode_token(layout: Layout, row: Text, live: np.ndarray) -> list[bytes]:
    tokens, segments = (np.asarray(x, np.int64) for x in (row.tokens, row.segments))
    everything = np.ones(layout.length, bool)
    _require((tokens >= 0) & (tokens < layout.vocab), everything, f"is outside 0 to {layout.vocab - 1}")
    _require((segments >= 0) & (segments < 2**16), everything, "is in a segment that 16 bits cannot number")
    implied = _text(tokens, segments, live)
    where = {"weights": everything, "targets": live, "positions": segments > 0}
    for name, matters in where.items():
        same = (np.asarray(getattr(row, name)) == getattr(implied, name)) | ~matters
        _require(same, everything, f"has {name} that do not follow from its tokens, its segments and `live`")
    return [tokens.astype("<i4").tobytes(), segments.astype("<u2").tobytes()]


def _decode_token(layout: Layout, reader: _Reader, row: Text, live: np.ndarray) -> None:
    tokens, segments = reader.array("<i4", layout.length), reader.array("<u2", layout.length)
    for out, values in zip(row, _text(tokens, segments.astype(np.int32), live)):
        out[...] = values


class _Codec(NamedTuple):
    kind: type
    encode: Callable[..., list[bytes]]
    decode: Callable[..., None]
    fields: Callable[[Layout], list[tuple[int | None, Any, float]]]  # size, dtype and filling, in the kind's order


_CODECS = {
    "hidden": _Codec(
        Hidden,
        _encode_hidden,
        _decode_hidden,
        lambda f: [(f.width, ml_dtypes.bfloat16 if f.dtype == "bfloat16" else np.float32, 0)],
    ),
    "top_k": _Codec(
        TopK,
        _encode_top_k,
        _decode_top_k,
        # Without entries all the mass is in the tail, whose log is then 0.
        lambda f: [(f.entries, np.int32, -1), (f.entries, np.float32, -np.inf), (len(f.temperatures), np.float32, 0)],
    ),
    "sampled": _Codec(
        Sampled, _encode_sampled, _decode_sampled, lambda f: [(f.entries, np.int32, -1), (f.entries, np.int32, 0)]
    ),
    "token": _Codec(
        Text,
        _encode_token,
        _decode_token,
        lambda f: [(None, np.float32 if name == "weights" else np.int32, 0) for name in Text._fields],
    ),
}


def encode(layout: Layout, row: Row, live: np.ndarray) -> bytes:
    """A row's payload.

    Log-probabilities as "uint8" are lp ~ top - spread (c / 255)^2 with c in 0..255, off by at most
    spread (c + 1/4) / 255^2: finest where probable. Their mass may then differ from 1 - exp(tail) by as much in
    proportion, which the kernels undo: they normalise the entries to that mass. What lies below `LOG_FLOOR` is
    stored as that. Hidden states as "int8" are off by at most max |x| / 254 of their token, give or take float32.

    Args:
        layout: of the signal.
        row: arrays [L ...] of the layout's sizes.
        live: bool [L], the tokens to store: those with weight.

    Raises:
        ValueError: the row is not of this layout, or holds what it cannot store; names the first such token.
    """
    codec, live = _CODECS[layout.signal], np.asarray(live)
    if not isinstance(row, codec.kind):
        raise ValueError(f"a {layout.signal} signal is stored from a {codec.kind.__name__}, got {type(row).__name__}")
    if live.dtype != bool or live.shape != (layout.length,):
        raise ValueError(f"live must be bool [{layout.length}], got {live.dtype} {list(live.shape)}")
    for name, values, (size, _, _) in zip(row._fields, row, codec.fields(layout)):
        got, wanted = np.shape(values), (layout.length, *(() if size is None else (size,)))
        if got != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(got)}")
    return b"".join([_bits(live), *codec.encode(layout, row, live)])


def empty(layout: Layout) -> Row:
    """A row of which nothing is known: filling alone, arrays [L ...]."""
    codec, length = _CODECS[layout.signal], (layout.length,)
    fields = codec.fields(layout)
    return codec.kind(
        *[np.full(length if size is None else (*length, size), fill, kind) for size, kind, fill in fields]
    )


def decode_rows(layout: Layout, payloads: Sequence[bytes]) -> Row:
    """Rows of one layout, stacked.

    Ids rise within a token. Tokens that were not stored hold filling: ids -1, log-probabilities -inf, a tail of 0
    (which is all the mass), counts 0, hidden states 0.

    Args:
        layout: they were encoded with.
        payloads: one a row.

    Returns:
        numpy arrays [B L ...]: int32, float32; hidden states as bfloat16 where stored so; [B L N] of N draws.

    Raises:
        ValueError: a payload is too short or too long, or not of this layout.
    """
    codec, shape = _CODECS[layout.signal], (len(payloads), layout.length)
    rows = [
        np.full(shape if size is None else (*shape, size), filling, dtype)
        for size, dtype, filling in codec.fields(layout)
    ]
    for b, payload in enumerate(payloads):
        reader = _Reader(payload)
        live = reader.bits(layout.length)
        codec.decode(layout, reader, codec.kind(*[values[b] for values in rows]), live)
        if reader.offset != len(payload):
            raise ValueError(f"a payload has {len(payload)} bytes where {reader.offset} should be")
    return codec.kind(*rows)


def decode(layout: Layout, payload: bytes) -> Row:
    """One row of `decode_rows`, arrays [L ...].

    Args:
        layout: it was encoded with.
        payload: as `encode` made it.

    Raises:
        ValueError: as `decode_rows`.
    """
    found = decode_rows(layout, [payload])
    return type(found)(*[values[0] for values in found])
