"""A cache is read by docs/formats.md alone: below, nothing of jaxkd but what wrote it."""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from signal_rows import hidden_row, rising, sampled_row, text_row, top_k_row

from jaxkd.core.types import TopK
from jaxkd.teachers.codec import Layout, decode_rows, encode
from jaxkd.teachers.store import Writer

PAGE = Path(__file__).parents[2] / "docs/formats.md"

# The reader of somebody who has only the page.


def varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = message[at], at + 1
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at


def fields(message: bytes):
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        value, at = varint(message, at)
        if key % 8 == 2:
            value, at = message[at : at + value], at + value
        yield key >> 3, value


def example(message: bytes) -> dict:
    [(_, features)] = fields(message)
    record = {}
    for _, entry in fields(features):
        named = dict(fields(entry))
        [(kind, values)] = fields(named[2])
        [(_, value)] = fields(values)
        record[named[1].decode()] = varint(value, 0)[0] if kind == 3 and isinstance(value, bytes) else value
    return record


def read_row(root: Path, domain: str, split: str, row: int) -> tuple[dict, bytes]:
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["format"] == 1
    assert manifest["complete"] is True
    block, rows = manifest["block"], manifest["sizes"][domain][split]
    name = f"signals-{split}.array_record-{row // block:05d}-of-{math.ceil(rows / block):05d}"
    reader = ArrayRecordReader(str(root / domain / "1.0.0" / name))
    record = example(reader.read([row % block])[0])
    reader.close()
    assert record["row"] == row
    assert record["checksum"] == zlib.crc32(f"{domain}\n{split}\n{row}\n".encode() + record["payload"])
    return manifest["layouts"][split], record["payload"]


class Payload:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def take(self, kind: str, *shape: int) -> np.ndarray:
        size = np.dtype(kind).itemsize * math.prod(shape)
        taken, self.content = self.content[:size], self.content[size:]
        return np.frombuffer(taken, kind).reshape(shape)

    def bits(self, count: int) -> list[int]:
        packed = self.take("u1", math.ceil(count / 8)).tolist()
        return [packed[i // 8] >> i % 8 & 1 for i in range(count)]

    def rising(self, k: int, u: int) -> list[int]:
        if not k:
            return []
        low = int(math.log2(u // k))
        planes = [self.bits(k) for _ in range(low)]
        ones = [p for p, bit in enumerate(self.bits((u - 1) // 2**low + k)) if bit]
        return [(p - i) * 2**low + sum(planes[j][i] << j for j in range(low)) for i, p in enumerate(ones)]


def hidden(layout: dict, payload: Payload, live: list[int]):
    n, width = sum(live), layout["width"]
    if layout["dtype"] == "float32":
        return [payload.take("<f4", n, width)]
    if layout["dtype"] == "bfloat16":
        return [(payload.take("<u2", n, width).astype("<u4") << 16).view("<f4")]
    scale = payload.take("<f4", n, 1)
    return [payload.take("i1", n, width) * scale / np.float32(127)]


def top_k(layout: dict, payload: Payload, live: list[int]):
    n, entries, tails, vocab = sum(live), layout["entries"], len(layout["temperatures"]), layout["vocab"]
    if layout["dtype"] == "float32":
        tail, logprobs = payload.take("<f4", n, tails), payload.take("<f4", n, entries)
    else:
        top, spread, tail = (payload.take("<f2", n, c).astype("<f4") for c in (1, 1, tails))
        logprobs = top - spread * (payload.take("u1", n, entries) / np.float32(255)) ** 2
    values = payload.rising(n * entries, n * vocab)
    ids = [[x - t * vocab for x in values[t * entries : (t + 1) * entries]] for t in range(n)]
    return np.array(ids).reshape(n, entries), logprobs, tail


def sampled(layout: dict, payload: Payload, live: list[int]):
    n, draws, vocab = sum(live), layout["entries"], layout["vocab"]
    values = payload.rising(int(payload.take("<u4", 1)[0]), n * vocab)
    ids, counts, filled = np.full((n, draws), -1), np.zeros((n, draws), int), [0] * n
    ends, before = [p for p, bit in enumerate(payload.bits(n * draws)) if bit], -1
    for x, end in zip(values, ends, strict=True):
        t = x // vocab
        ids[t, filled[t]], counts[t, filled[t]] = x % vocab, end - before
        filled[t], before = filled[t] + 1, end
    return ids, counts


def token(layout: dict, payload: Payload, live: list[int]):
    length = layout["length"]
    tokens, segments = payload.take("<i4", length).tolist(), payload.take("<u2", length).tolist()
    targets, positions = [0] * length, [0] * length
    for t in range(length):
        if t and segments[t] and segments[t] == segments[t - 1]:
            targets[t - 1], positions[t] = tokens[t], positions[t - 1] + 1
    return tokens, targets, [float(x) for x in live], segments, positions


READERS = {"hidden": hidden, "top_k": top_k, "sampled": sampled, "token": token}


def decoded(layout: dict, content: bytes):
    """Which tokens are live, and the arrays of those; of a text, the arrays of all tokens."""
    payload = Payload(content)
    live = payload.bits(layout["length"])
    arrays = READERS[layout["signal"]](layout, payload, live)
    assert payload.content == b"", "nothing is left"
    return np.array(live, bool), arrays


LENGTH, ROWS = 21, 5
LAYOUTS = {
    "single": Layout("hidden", LENGTH, width=6, dtype="float32"),
    "half": Layout("hidden", LENGTH, width=6, dtype="bfloat16"),
    "eighth": Layout("hidden", LENGTH, width=6, dtype="int8"),
    "exact": Layout("top_k", LENGTH, 700, 5, (1.0, 2.0), dtype="float32"),
    "coarse": Layout("top_k", LENGTH, 700, 5, (1.0, 2.0), dtype="uint8"),
    "whole": Layout("top_k", LENGTH, 9, 9, (1.0,), dtype="float32"),
    "drawn": Layout("sampled", LENGTH, 700, 11),
    "written": Layout("token", LENGTH, 700),
}


def signal_of(split: str, row: int):
    layout, rng = LAYOUTS[split], np.random.default_rng([len(split), row])
    live = rng.random(LENGTH) < (0.6 if row else 0.0)  # the first row has no token with weight
    if layout.signal == "token":
        return text_row(rng, LENGTH, layout.vocab)
    if layout.signal == "hidden":
        return hidden_row(rng, LENGTH, layout.width), live
    if layout.signal == "sampled":
        return sampled_row(rng, LENGTH, layout.vocab, layout.entries), live
    return rising(top_k_row(rng, LENGTH, layout.vocab, layout.entries, layout.temperatures)), live


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    with Writer(root, {"layouts": LAYOUTS}, {"alpha": dict.fromkeys(LAYOUTS, ROWS)}, block=2) as writer:
        for block in writer.missing():
            rows = [signal_of(block.split, row) for row in range(block.start, block.stop)]
            writer.write(block, [encode(LAYOUTS[block.split], *row) for row in rows])
        writer.finish()
    return root


@pytest.mark.parametrize("split", LAYOUTS)
def test_read_by_the_page(cache, split):
    tolerance = {"half": (2.0**-8, 0.0), "eighth": (0.0, 0.02), "coarse": (2.0**-11, 0.05)}.get(split, (0.0, 0.0))
    for row in range(ROWS):
        layout, content = read_row(cache, "alpha", split, row)
        live, arrays = decoded(layout, content)
        wanted, wanted_live = signal_of(split, row)
        np.testing.assert_array_equal(live, wanted_live)
        kept = np.ones(LENGTH, bool) if layout["signal"] == "token" else live
        rows = decode_rows(LAYOUTS[split], [content])
        again = type(rows)(*[values[0] for values in rows])
        for ours, stored, by_code in zip(arrays, wanted, again, strict=True):
            np.testing.assert_allclose(ours, stored[kept], rtol=tolerance[0], atol=tolerance[1])
            np.testing.assert_allclose(ours, by_code[kept].astype(np.float64), rtol=1e-6)


def test_worked_example():
    text = re.sub(r"\s+", " ", PAGE.read_text(encoding="utf-8"))
    [mask] = re.findall(r"The mask is `([0-9A-F ]+)`", text)
    [code] = re.findall(r"So the ids are `([0-9A-F ]+)`", text)
    ids = np.array([[3, 7], [0, 0], [0, 11], [0, 0]], np.int32)
    row = TopK(ids, np.full((4, 2), -1.0, np.float32), np.full((4, 1), -1.0, np.float32))
    payload = encode(Layout("top_k", 4, 12, 2, (1.0,), dtype="float32"), row, np.array([True, False, True, False]))
    assert payload[:1] == bytes.fromhex(mask)
    assert payload[1 + 2 * 4 + 4 * 4 :] == bytes.fromhex(code)
    assert Payload(bytes.fromhex(code)).rising(4, 24) == [3, 7, 12, 23]
