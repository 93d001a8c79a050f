"""A cache loses no row, however its writer ends, and says what is wrong with it before it teaches anything wrong."""

import errno
import json
import os
import pickle
import random
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import tensorflow_datasets as tfds

from jaxkd.teachers import shards
from jaxkd.teachers.codec import Layout
from jaxkd.teachers.store import Store, Writer

LAYOUTS = {
    "train": Layout("top_k", 16, 100, 8, (1.0, 2.0), dtype="uint8"),
    "valid": Layout("hidden", 16, width=4, dtype="bfloat16"),
}
MANIFEST = {
    "teacher": {"fingerprint": "abc", "dtype": "float32"},
    "rows": {"alpha": "a1", "beta": "b1"},
    "entries": 64,
    "temperatures": (1.0, 2.0),
    "layouts": LAYOUTS,
}
SIZES = {"alpha": {"train": 23, "valid": 3}, "beta": {"train": 8}}


def payload(domain: str, split: str, row: int) -> bytes:
    rng = random.Random(f"{domain} {split} {row}")
    return rng.randbytes(rng.randrange(1, 300))


def payloads(block: shards.Block) -> list[bytes]:
    return [payload(block.domain, block.split, row) for row in range(block.start, block.stop)]


def fill(root: Path, sizes=SIZES, block: int = 8) -> Path:
    with Writer(root, MANIFEST, sizes, block) as writer:
        for missing in writer.missing():
            writer.write(missing, payloads(missing))
        writer.finish()
    return root


def file_of(root: Path, domain: str, split: str, number: int) -> Path:
    [path] = (root / domain / "1.0.0").glob(f"signals-{split}.array_record-{number:05d}-of-*")
    return path


def holds_all(root: Path, sizes=SIZES) -> bool:
    store = Store(root)
    return all(
        store.read(domain, split, range(rows)) == [payload(domain, split, row) for row in range(rows)]
        for domain, splits in sizes.items()
        for split, rows in splits.items()
    )


def test_written_rows_are_read_by_threads_copies_and_tfds(tmp_path):
    assert holds_all(fill(tmp_path / "cache"))
    store = Store(tmp_path / "cache")
    assert store.read("alpha", "train", [22, 0, 9, 0]) == [payload("alpha", "train", row) for row in (22, 0, 9, 0)]
    assert store.read("alpha", "train", []) == []
    assert store.layout("train") == LAYOUTS["train"]
    assert store.layout("valid") == LAYOUTS["valid"]
    # Threads and copies.
    store = pickle.loads(pickle.dumps(Store(fill(tmp_path / "cache"))))
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda row: store.read("alpha", "train", [row, 22 - row]), list(range(23)) * 4))
    assert rows == [[payload("alpha", "train", r) for r in (row, 22 - row)] for row in list(range(23)) * 4]
    fill(tmp_path / "cache")
    # TFDS.
    builder = tfds.builder_from_directory(tmp_path / "cache" / "alpha" / "1.0.0")
    assert builder.info.disable_shuffling, "the order is the rows'"
    source = builder.as_data_source("train")
    assert len(source) == 23
    records = source.__getitems__(list(range(23)))
    assert [record["row"] for record in records] == list(range(23))
    assert [record["payload"].tobytes() for record in records] == [payload("alpha", "train", row) for row in range(23)]


def test_more_shards_than_open_files(tmp_path):
    """A reader keeps its shard open, and the limit that a shell sets is low."""
    sizes = {"alpha": {"train": 90}}
    fill(tmp_path, sizes, block=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        assert holds_all(tmp_path, sizes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


KILLED = f"""
import os, random, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_store
root, chance = test_store.Path(sys.argv[1]), random.Random(0)
for kill in range(8):
    goal = kill % 2 and len(list(root.glob("*/1.0.0/signals-*"))) + chance.randrange(1, 20)
    writer = os.fork()
    if not writer:
        test_store.fill(root, test_store.MANY, block=2)
        os._exit(0)
    while len(list(root.glob("*/1.0.0/signals-*"))) < goal:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.02))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    reader = os.fork()
    if not reader:
        print(*test_store.in_place(root), flush=True)
        os._exit(0)
    os.waitpid(reader, 0)
"""
MANY = {"alpha": {"train": 199}, "beta": {"train": 201}}


def in_place(root: Path) -> tuple[int, int]:
    """Files that have a shard's name, and how many of them are not whole."""
    cache = shards.Shards(root, MANY, 2)
    missing = cache.missing()
    return len(list(root.glob("*/1.0.0/signals-*"))), sum(cache.path(b).exists() for b in missing)


def test_killed_writer_goes_on(tmp_path):
    root = tmp_path / "cache"
    result = subprocess.run([sys.executable, "-c", KILLED, str(root)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    written, broken = zip(*[map(int, line.split()) for line in result.stdout.splitlines()])
    assert list(written) == sorted(written)
    assert written[-1] > 0
    assert broken == (0,) * 8
    whole = {path: path.stat().st_mtime_ns for path in root.glob("*/1.0.0/signals-*")}
    fill(root, MANY, block=2)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole, "what was there is not written again"
    assert holds_all(root, MANY)
    assert not list(root.rglob("incomplete.*"))


def test_named_when_on_the_disk(tmp_path, monkeypatch):
    steps = []

    def watch(module, name):
        original = getattr(module, name)

        def run(*arguments):
            steps.append((name, any(tmp_path.glob("*/*/signals-*"))))
            return original(*arguments)

        monkeypatch.setattr(module, name, run)

    with Writer(tmp_path, MANIFEST, SIZES, 8) as writer:
        block = writer.missing()[0]
        for module, name in ((shards, "write"), (os, "fsync"), (os, "replace")):
            watch(module, name)
        writer.write(block, payloads(block))
    assert steps == [("write", False), ("fsync", False), ("replace", False), ("fsync", True)]


def test_two_writers(tmp_path):
    refused = pytest.raises(ValueError, match=str(tmp_path))
    with Writer(tmp_path, MANIFEST, SIZES), refused, Writer(tmp_path, MANIFEST, SIZES):
        pass
    with Writer(tmp_path, MANIFEST, SIZES) as writer:
        assert len(writer.missing()) == 3


def test_several_processes(tmp_path):
    alone = pytest.raises(ValueError, match=f"{tmp_path} holds no cache")
    with alone, Writer(tmp_path, MANIFEST, SIZES, 8, leader=False) as other:
        other.missing()
    with Writer(tmp_path, MANIFEST, SIZES, 8, leader=False) as other, Writer(tmp_path, MANIFEST, SIZES, 8) as leader:
        blocks = leader.missing()
        assert other.missing() == blocks
        for number, block in enumerate(blocks):
            (leader, other)[number % 2].write(block, payloads(block))
        with pytest.raises(ValueError, match="leader"):
            other.finish()
        leader.finish()
    assert holds_all(tmp_path)


def test_nothing_and_too_little(tmp_path):
    with pytest.raises(FileNotFoundError, match="jaxkd cache"):
        Store(tmp_path)
    with Writer(tmp_path, MANIFEST, SIZES, 8) as writer:
        blocks = writer.missing()
        assert [tuple(block)[2:] for block in blocks] == [(0, 0, 8), (1, 8, 16), (2, 16, 23), (0, 0, 3), (0, 0, 8)]
        writer.write(blocks[1], payloads(blocks[1]))
        with pytest.raises(ValueError, match="7 payloads"):
            writer.write(blocks[0], payloads(blocks[0])[1:])
        with pytest.raises(ValueError, match=r"4 blocks.*'alpha'.*number=0"):
            writer.finish()
    with pytest.raises(ValueError, match=r"4 of 5 .*-00000-of-00003"):
        Store(tmp_path)
    with Writer(tmp_path, MANIFEST, SIZES, 8) as writer:
        for block in writer.missing():
            writer.write(block, payloads(block))
    with pytest.raises(ValueError, match="0 of 5"):
        Store(tmp_path)
    assert holds_all(fill(tmp_path))


def test_another_cache_or_other_files_in_the_place(tmp_path):
    fill(tmp_path)
    other = {**MANIFEST, "entries": 8, "teacher": {"fingerprint": "xyz", "dtype": "float32"}, "seed": 1}
    del other["temperatures"]
    with pytest.raises(ValueError, match=r"teacher.fingerprint") as caught, Writer(tmp_path, other, SIZES, 16):
        pass
    for part in (
        str(tmp_path),
        'teacher.fingerprint="abc"',
        '"xyz"',
        "entries=64",
        "block=8",
        "no seed",
        "temperatures=[1.0, 2.0]",
    ):
        assert part in str(caught.value)
    assert "dtype" not in str(caught.value)
    assert holds_all(tmp_path)
    # Other files.
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis.tex"), Writer(foreign, MANIFEST, SIZES):
        pass
    assert os.listdir(foreign) == ["thesis.tex"]


def test_expectations(tmp_path):
    store = Store(fill(tmp_path))
    store.expect({"rows": {"beta": "b1"}, "temperatures": (1.0, 2.0), "layouts": {"train": LAYOUTS["train"]}})
    with pytest.raises(ValueError, match="entries") as caught:
        store.expect({"entries": 8, "rows": {"beta": "b2", "gamma": "c1"}, "teacher": {"fingerprint": "abc"}})
    for part in (str(tmp_path), "entries=64", 'rows.beta="b1"', '"b2"', "no rows.gamma", '"c1"'):
        assert part in str(caught.value)
    assert "fingerprint" not in str(caught.value)
    with pytest.raises(ValueError, match="gamma/train"):
        store.read("gamma", "train", [0])
    with pytest.raises(ValueError, match="'dev'"):
        store.layout("dev")
    for row in (23, -1):
        with pytest.raises(IndexError, match=r"alpha/train.* 23"):
            store.read("alpha", "train", [0, row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": {"../alpha": {"train": 1}}}, "'../alpha'"),
        ({"sizes": {"alpha": {"test": 1}}}, "'test'"),
        ({"manifest": {**MANIFEST, "complete": True}}, "complete"),
        ({"manifest": {"layouts": {**LAYOUTS, "train": {"signal": "logits", "length": 1}}}}, "'logits'"),
        ({"block": 0}, "block"),
        ({"root": "gs://bucket/cache"}, "gs://bucket/cache"),
    ],
)
def test_bad_arguments(change, message, tmp_path):
    arguments = {"root": tmp_path / "cache", "manifest": MANIFEST, "sizes": SIZES} | change
    with pytest.raises(ValueError, match=message):
        Writer(**arguments)


def test_shards_of_another_size_or_with_records_of_another(tmp_path):
    first, last = (file_of(fill(tmp_path), "alpha", "train", number) for number in (0, 2))
    first.write_bytes(last.read_bytes())
    with pytest.raises(ValueError, match=rf"1 of 5 .*{first}"):
        Store(tmp_path)
    store, file = Store(fill(tmp_path)), file_of(tmp_path, "alpha", "train", 1)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"row 9 of alpha/train in {file}"):
        store.read("alpha", "train", [0, 9])
    fill(tmp_path)
    first, second = (file_of(tmp_path, "alpha", "train", number) for number in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"row 10 of alpha/train.*checksum"):
        Store(tmp_path).read("alpha", "train", [0, 10])
    first.write_bytes(file_of(tmp_path, "beta", "train", 0).read_bytes())
    with pytest.raises(ValueError, match=r"row 3 of alpha/train.*checksum"):
        Store(tmp_path).read("alpha", "train", [3])


@pytest.mark.parametrize("cut", [1, 200, 10**6])
def test_truncated_shard(tmp_path, cut):
    file = file_of(fill(tmp_path), "alpha", "train", 1)
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=rf"1 of 5 .*{file}"):
        Store(tmp_path)
    with Writer(tmp_path, MANIFEST, SIZES, 8) as writer:
        assert [tuple(block)[:3] for block in writer.missing()] == [("alpha", "train", 1)]
    assert not json.loads((tmp_path / "manifest.json").read_text())["complete"]
    assert holds_all(fill(tmp_path))


def test_flipped_byte(tmp_path):
    file = file_of(fill(tmp_path), "alpha", "train", 1)
    content = file.read_bytes()
    offset = content.index(payload("alpha", "train", 13))
    file.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=rf"row 13 of alpha/train in {file}"):
        store.read("alpha", "train", [2, 13, 20])
    assert store.read("alpha", "train", [12, 14]) == [payload("alpha", "train", row) for row in (12, 14)]
    file.unlink()
    assert holds_all(fill(tmp_path))
    # Every record is verified.
    store = Store(fill(tmp_path))
    assert store.verify() == sum(rows for splits in SIZES.values() for rows in splits.values())
    file = file_of(tmp_path, "alpha", "train", 1)
    content = bytearray(file.read_bytes())
    content[content.index(payload("alpha", "train", 13))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=str(file)):
        Store(tmp_path).verify()
    file.unlink()
    assert fill(tmp_path)
    assert Store(tmp_path).verify() > 0


@pytest.mark.parametrize(
    "error", [OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("write() failed: No space left on device;")]
)
def test_full_disk(tmp_path, monkeypatch, error):
    with Writer(tmp_path, MANIFEST, SIZES, 8) as writer:
        blocks = writer.missing()
        writer.write(blocks[0], payloads(blocks[0]))
        monkeypatch.setattr(
            *((os, "fsync") if isinstance(error, OSError) else (shards, "write")), Mock(side_effect=error)
        )
        with pytest.raises(OSError, match="No space left on device") as caught:
            writer.write(blocks[1], payloads(blocks[1]))
        monkeypatch.undo()
        assert caught.value.errno == errno.ENOSPC
        assert not list(tmp_path.rglob("incomplete.*"))
        assert writer.missing() == blocks[1:]
    assert holds_all(fill(tmp_path))


def test_damaged_metadata(tmp_path):
    fill(tmp_path)
    (tmp_path / "beta" / "1.0.0" / "features.json").write_text("{")
    with pytest.raises(ValueError, match="beta"):
        Store(tmp_path)
    assert holds_all(fill(tmp_path))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2"):
        Store(tmp_path)
    for content in ("{", None):  # torn, or lost while the blocks are there
        manifest.unlink() if content is None else manifest.write_text(content)
        for open_cache in (Store, lambda root: Writer(root, MANIFEST, SIZES, 8).__enter__()):
            with pytest.raises(ValueError, match=str(manifest)):
                open_cache(tmp_path)
    with pytest.raises(FileNotFoundError, match="jaxkd cache"):
        Store(tmp_path / "elsewhere")
