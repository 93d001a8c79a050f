"""Building: nothing twice, nothing on both sides, nothing half-made, and nothing again without a reason."""

import contextlib
import dataclasses
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
from corpus import sentences, write_jsonl

from jaxkd.data import build
from jaxkd.data.pack import Tokens
from jaxkd.data.records import BadRecord, Document
from jaxkd.data.rows import Rows
from jaxkd.data.sources import Source, open_source
from jaxkd.data.tokenize import byte_tokenizer

TOKENIZER = byte_tokenizer()


def source_of(documents, stamp="f", validation=None):
    reading = lambda texts: lambda: iter([t if isinstance(t, BadRecord) else Document(*t) for t in texts])
    return Source("made up", stamp, reading(documents), reading(validation) if validation else None)


def prepare(documents, directory, **options):
    options = {"length": 32, "train_rows": 0, "valid_rows": 0, "progress": False, **options}
    source = documents if isinstance(documents, Source) else source_of(documents)
    tokenizer = options.pop("tokenizer", TOKENIZER)
    return build.prepare(options.pop("name", "made"), source, tokenizer, directory=directory, **options)


def stored_documents(path, split):
    """Texts back out of the rows: for documents that fit into one piece."""
    rows = Rows(path, split)
    stored = rows.read(range(len(rows)))
    result = set()
    for tokens, segments in zip(stored["tokens"], stored["segments"]):
        for segment in range(1, segments.max() + 1):
            result.add(TOKENIZER.decode(tokens[segments == segment]))
    return result


def left_in(directory):
    files = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.suffix != ".lock")


def test_rows_hold_each_text_once(tmp_path):
    texts = [text[:30] for text in dict.fromkeys(sentences(100))]
    again = [text.upper().replace(" ", " \n ") for text in texts[:15]]
    prepared = prepare([(str(i), text) for i, text in enumerate([*texts, *again, "", " \n"])], tmp_path, length=64)
    assert prepared.built
    assert (prepared.documents, prepared.duplicates) == (100, 15)
    train, valid = (stored_documents(prepared.path, split) for split in ("train", "valid"))
    assert sorted(train | valid) == sorted(texts)
    assert not train & valid
    assert prepared.bytes == sum(len(text.encode()) for text in texts)  # every byte is scored once
    assert prepared.tokens == prepared.bytes + 2 * 100
    rows = [Rows(prepared.path, split) for split in ("train", "valid")]
    assert [len(side) for side in rows] == [prepared.train_rows, prepared.valid_rows]
    assert sum(int(side.read(range(len(side)))["bytes"].sum()) for side in rows) == prepared.bytes


def test_groups_stay_on_one_side(tmp_path):
    documents = [(f"group {i % 20}", f"g{i % 20} number {i}") for i in range(200)]
    prepared = prepare(documents, tmp_path, valid_share=0.2, length=64)
    sides = [{text.split()[0] for text in stored_documents(prepared.path, split)} for split in ("train", "valid")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 20
    assert 2 <= len(sides[1]) <= 6


def test_two_groups_give_two_sides(tmp_path):
    """A group that is nearly all of the text stays in training."""
    for big in ("a", "b"):
        prepared = prepare([*((big, f"{big} long {i} " * 20) for i in range(50)), ("other", "short text")], tmp_path)
        assert stored_documents(prepared.path, "valid") == {"short text"}
        assert prepared.train_rows > 100


def test_caps_stop_early(tmp_path, monkeypatch):
    seen = []
    encode = type(TOKENIZER).documents
    monkeypatch.setattr(type(TOKENIZER), "documents", lambda self, t: seen.extend(t) or encode(self, t))
    monkeypatch.setattr(build, "_BATCH_CHARACTERS", 100)
    prepared = prepare([(str(i), f"text {i} " * 10) for i in range(2000)], tmp_path, train_rows=9, valid_rows=5)
    assert (prepared.train_rows, prepared.valid_rows) == (9, 5)
    assert len(seen) < 200


def test_a_capped_side_takes_many_documents_and_knows_the_rows_of_the_whole_text(tmp_path):
    documents = [(str(i), f"doc{i:02d} " * 2000) for i in range(60)]
    prepared = prepare(documents, tmp_path, valid_share=0.5, valid_rows=16, train_rows=16)
    for split in ("train", "valid"):
        assert len({text[-6:] for text in stored_documents(prepared.path, split)}) >= 10
    few = prepare(documents[:4], tmp_path, valid_share=0.5, valid_rows=300, train_rows=300)
    assert (few.train_rows, few.valid_rows) == (300, 300)  # the rest of the documents follows their windows
    documents = [(str(i), text) for i, text in enumerate(dict.fromkeys(sentences(400)))]
    whole = prepare(documents, tmp_path)
    assert whole.whole_rows == whole.train_rows
    few = prepare(documents, tmp_path, train_rows=20, valid_rows=4)
    assert few.train_rows == 20
    assert few.whole_rows == pytest.approx(whole.train_rows, rel=0.05)
    roomy = prepare(documents, tmp_path, train_rows=10_000, valid_rows=4)
    assert roomy.whole_rows == roomy.train_rows == whole.train_rows


def test_spread_keeps_every_target_once():
    targets = lambda documents: sorted(token for document in documents for token in document.ids[1:])
    documents = [Tokens(np.arange(n) + 1000 * n, np.ones(n, np.int64)) for n in (1, 2, 8, 9, 10, 100, 57)]
    for seed in range(20):
        spread = list(build._spread(documents, 8, 2, seed))
        assert targets(spread) == targets(documents)


def test_rerun_does_nothing(tmp_path):
    path = write_jsonl(tmp_path / "text.jsonl", sentences(50))
    first = prepare(open_source(str(path)), tmp_path / "rows")
    times = [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*"))]

    def forbidden():
        raise AssertionError("a prepared domain was read again")

    began = time.monotonic()
    again = prepare(dataclasses.replace(open_source(str(path)), documents=forbidden), tmp_path / "rows")
    assert time.monotonic() - began < 0.5
    assert again == first._replace(built=False)
    assert [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*"))] == times


def test_the_same_build_gives_the_same_rows(tmp_path):
    documents = [(str(i), text) for i, text in enumerate(sentences(60))]
    one = prepare(documents, tmp_path / "one")
    two = prepare(documents[::-1], tmp_path / "two")  # the order of reading does not matter
    three = prepare(documents, tmp_path / "three", seed=1)
    stored = [Rows(p.path, "train") for p in (one, two, three)]
    tokens = [rows.read(range(10))["tokens"] for rows in stored]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert not np.array_equal(tokens[0], tokens[2])


def test_identity_is_content(tmp_path):
    """Touched, renamed, copied, compressed, divided otherwise: the text is the same, and so are the rows."""
    texts = ["The same words", *sentences(50), "the SAME  words"]  # which of two variants stays is no matter of order
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    first = prepare(open_source(str(path)), tmp_path / "rows")
    assert first.duplicates == 1

    def same(path):
        again = prepare(open_source(str(path)), tmp_path / "rows")
        assert again == first._replace(built=False)

    os.utime(path, ns=(1, 1))
    same(path)
    path.rename(tmp_path / "renamed.jsonl")
    same(tmp_path / "renamed.jsonl")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", texts[:20])
    write_jsonl(folder / "a.json", texts[20:])
    same(folder)
    with gzip.open(tmp_path / "text.jsonl.gz", "wt") as file:
        file.write((tmp_path / "renamed.jsonl").read_text())
    same(tmp_path / "text.jsonl.gz")
    elsewhere = prepare(open_source(str(folder)), tmp_path / "other rows")
    assert elsewhere.fingerprint == first.fingerprint
    stored = [Rows(p.path, "valid").read(range(p.valid_rows))["tokens"] for p in (first, elsewhere)]
    np.testing.assert_array_equal(*stored)
    times = (folder / "b.jsonl").stat()
    write_jsonl(folder / "b.jsonl", ["w" + text[1:] for text in texts[:19]] + ["x" + texts[19][1:]])  # of the same size
    os.utime(folder / "b.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare(open_source(str(folder)), tmp_path / "rows").fingerprint != first.fingerprint


def test_a_validation_text_of_its_own_is_held_out_and_not_trained_on(tmp_path):
    held_out = [f"Held out {i}" for i in range(8)]
    copies = [(None, f"held  OUT {i}") for i in range(8)]
    training = [(None, text[:30]) for text in dict.fromkeys(sentences(20))]
    prepared = prepare(source_of(training + copies, "f", [(None, text) for text in held_out]), tmp_path, length=64)
    assert stored_documents(prepared.path, "valid") == set(held_out)
    assert stored_documents(prepared.path, "train") == {text for _, text in training}
    assert (prepared.documents, prepared.duplicates) == (28, 8)
    with pytest.raises(ValueError, match=r"'made'.*no training documents"):
        prepare(source_of([(None, "held OUT")], "g", [(None, "Held out")]), tmp_path)


def test_bad_records_are_counted_up_to_a_share(tmp_path, capfd):
    documents = [(None, text) for text in sentences(18)]
    bad = [BadRecord("x.jsonl, line 3", "null"), BadRecord("x.jsonl, line 9", "cut")]
    source = source_of([*documents[:9], *bad, *documents[9:]])
    prepared = prepare(source, tmp_path, bad_records=0.1, progress=True)
    assert (prepared.documents, prepared.bad) == (18, 2)
    assert "made: 2 of 20 records are bad and left out; the first is x.jsonl, line 3: null" in capfd.readouterr().err
    for share in (0.09, 0.0):  # known without another reading, too
        with pytest.raises(ValueError, match=r"'made': 2 of the 20 .*data\.bad_records.* line 3: null"):
            prepare(dataclasses.replace(source, documents=lambda: iter(())), tmp_path, bad_records=share)
    with pytest.raises(ValueError, match=r"'made': 1 of the 10 .*data\.bad_records"):
        prepare(source, tmp_path / "none allowed", bad_records=0.0)

    def wrong_field():
        yield from [BadRecord("x", "no field")] * 100
        raise AssertionError("read on")

    with pytest.raises(ValueError, match=r"100 of the 100 .*no field"):
        prepare(Source("made up", "g", wrong_field), tmp_path)


def test_fingerprint_covers_everything(tmp_path):
    documents = [(str(i), text) for i, text in enumerate(sentences(60))]
    source = source_of(documents)
    other_tokenizer = dataclasses.replace(TOKENIZER, fingerprint="other")
    base = {"length": 32, "train_rows": 4, "valid_rows": 2, "valid_share": 0.1, "seed": 0}
    changes = {"length": 33, "train_rows": 5, "valid_rows": 3, "valid_share": 0.2, "seed": 1}
    variants = [
        (source, TOKENIZER, base),
        (source_of([*documents[:-1], ("59", documents[-1][1].upper())], "another text"), TOKENIZER, base),
        (source_of([*documents[:-1], ("other", documents[-1][1])], "another group"), TOKENIZER, base),
        (source_of(documents, "a validation text", [("held out", "other words")]), TOKENIZER, base),
        (source, other_tokenizer, base),
        (source, dataclasses.replace(TOKENIZER, start=None), base),
        *[(source, TOKENIZER, base | {key: value}) for key, value in changes.items()],
    ]
    made = [build.prepare("made", s, t, directory=tmp_path, progress=False, **o) for s, t, o in variants]
    assert all(prepared.built for prepared in made)
    assert len({prepared.fingerprint for prepared in made}) == len({p.path for p in made}) == len(variants)


def test_killed_build(tmp_path):
    """SIGKILL when training rows are written and validation rows are not."""
    path = write_jsonl(tmp_path / "text.jsonl", sentences(50))
    script = """
        import os, signal, sys
        from jaxkd.data import build
        from jaxkd.data.sources import open_source
        from jaxkd.data.tokenize import byte_tokenizer

        generate = build.PackedRows._generate_examples
        def dying(self, split):
            for example in generate(self, split):
                if split == "valid":
                    os.kill(os.getpid(), signal.SIGKILL)
                yield example
        build.PackedRows._generate_examples = dying
        build.prepare("made", open_source(sys.argv[1]), byte_tokenizer(), 32, 0, 0, sys.argv[2])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path), str(tmp_path / "rows")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    left = [file.name for file in (tmp_path / "rows" / "packed_rows").glob("*/*")]
    assert left
    assert all(name.startswith("incomplete.") for name in left)
    prepared = prepare(open_source(str(path)), tmp_path / "rows")
    assert prepared.built
    assert len(Rows(prepared.path, "train")) == prepared.train_rows
    assert [file.name for file in (tmp_path / "rows" / "packed_rows").glob("[!.]*/*")] == ["2.0.0"]


def test_two_builds_at_once_are_one(tmp_path):
    arrived, go_on = threading.Event(), threading.Event()
    documents = [(str(i), f"document {i} of this source says nothing else") for i in range(20)]

    def slow():
        arrived.set()
        assert go_on.wait(30)
        yield from (Document(*document) for document in documents)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare, Source("made up", "f", slow), tmp_path)
        assert arrived.wait(30)
        second = pool.submit(prepare, documents, tmp_path)
        time.sleep(0.2)
        assert not second.done()
        go_on.set()
        assert (first.result().built, second.result().built) == (True, False)
    assert first.result()._replace(built=False) == second.result()


def test_a_build_that_another_host_has_overtaken_takes_its_rows(tmp_path, monkeypatch):
    """Where the lock does not reach the other host, as on many network disks."""
    texts, overtaking = [(str(i), text) for i, text in enumerate(sentences(200))], []

    def overtaken(*arguments):
        if not overtaking:
            overtaking.append(None)
            overtaking[0] = prepare(texts, tmp_path)
        return pack_side(*arguments)

    pack_side = build._pack_side
    monkeypatch.setattr(build, "_locked", lambda lock: contextlib.nullcontext())
    monkeypatch.setattr(build, "_pack_side", overtaken)
    prepared = prepare(texts, tmp_path)
    assert overtaking[0].built
    assert not prepared.built
    assert prepared == overtaking[0]._replace(built=False)
    assert not [name for name in left_in(tmp_path) if "incomplete" in name]


def test_failing_builds_leave_nothing(tmp_path, monkeypatch):
    def full_disk():
        yield Document("a", "text")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="'made'"):
        prepare(Source("made up", "f", full_disk), tmp_path)
    assert left_in(tmp_path) == []

    late = RuntimeError("write(): No space left on device; writing x")
    monkeypatch.setattr(type(TOKENIZER), "documents", Mock(side_effect=late))
    with pytest.raises(OSError, match="'made'"):
        prepare(TWO, tmp_path)
    assert left_in(tmp_path) == []


TWO = [("a", "text"), ("b", "other")]


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([("a", "text")], {}, r"'made' \(made up\).* 1 groups"),
        ([("a", "text"), ("b", "TEXT ")], {}, "1 groups"),
        ([("a", "text"), ("a", "more")], {}, "1 groups"),
        ([], {}, "0 groups"),
        # One token is no target.
        (
            [("a", "long enough"), ("b", "x")],
            {"tokenizer": dataclasses.replace(TOKENIZER, start=None, end=None)},
            r"'made' \(made up\).* valid",
        ),
        (TWO, {"name": "a/b"}, "'a/b'"),
        (TWO, {"length": 1}, "length=1"),
        (TWO, {"valid_share": 1.0}, "valid_share"),
        (TWO, {"bad_records": 1.0}, "bad_records"),
    ],
)
def test_texts_and_arguments_that_are_refused_leave_nothing(tmp_path, documents, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(documents, tmp_path, **options)
    assert left_in(tmp_path) == []


def test_damaged_metadata(tmp_path):
    (prepare(TWO, tmp_path).path / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"metadata\.json"):
        prepare(TWO, tmp_path)


def test_odd_text(tmp_path):
    """Lone surrogates, which JSON can spell, and null characters."""
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["a \ud800 b", "nul \0 nul", "plain"]))
    assert prepare(open_source(str(path)), tmp_path / "rows").documents == 3


def test_what_is_shown(tmp_path, capfd):
    prepared = prepare(TWO, tmp_path, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert f"made: rows written to {prepared.path}" in err
    assert "absl" not in err
    assert "Downloading" not in err
    prepare(TWO, tmp_path, progress=False, seed=1)
    assert capfd.readouterr() == ("", "")


def test_tensorflow_is_not_imported():
    code = "import sys, jaxkd.data.loader, jaxkd.data.build; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0
