"""Every kind of source is read, and every mistake in one is named in a line."""

import gzip
import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxkd.data.records import BadRecord
from jaxkd.data.sources import open_source


def read(spec, *arguments):
    """Texts, and what is wrong with bad records."""
    documents = open_source(str(spec), *arguments).documents()
    return [d.why if isinstance(d, BadRecord) else d.text for d in documents]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def folder(tmp_path):
    """One file of each kind, folders inside, and files that are no data."""
    root = tmp_path / "corpus"
    write_lines(root / "a.jsonl", [{"text": "one", "body": "uno"}, "", {"text": "two", "body": "dos"}])
    (root / "b.txt").write_text("\ufefffile text\n", encoding="utf-8")
    table = pyarrow.table({"text": [f"row {i}" for i in range(3)], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, root / "d.parquet")
    (root / "e.json").write_text(json.dumps([{"text": "in an array"}], indent=1))
    write_lines(root / "f.json", [{"text": "a line"}, {"text": "of json"}])
    with gzip.open(root / "g.ndjson.gz", "wt") as file:
        file.write('{"text": "gz"}\n')
    with pyarrow.CompressedOutputStream(str(root / "h.csv.zst"), "zstd") as file:
        file.write(b'id,text\n1,"a, b\nc"\n')
    (root / "inner").mkdir()
    (root / "inner" / "c.md").write_text("inner text")
    (root / "LICENSE.txt").write_text("do what you like")
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / ".hidden.txt").write_text("hidden")
    return root


def test_folder(folder):
    source = open_source(str(folder))
    documents = list(source.documents())
    expected = ["one", "two", "file text\n", "row 0", "row 1", "row 2", "in an array"]
    assert [d.text for d in documents] == [*expected, "a line", "of json", "gz", "a, b\nc"]
    assert {d.group for d in documents} == {None}
    assert source.notes == ("not read, as no data: LICENSE.txt, picture.png, inner/c.md",)


def test_links_are_followed(tmp_path):
    data = tmp_path / "disk"
    write_lines(data / "a.jsonl", [{"text": "on another disk"}])
    write_lines(data / "c.jsonl", [{"text": "through a link to its folder"}])
    write_lines(tmp_path / "blobs" / "0123", [{"text": "in a blob"}])
    root = tmp_path / "root"
    (root / "snapshot").mkdir(parents=True)
    (root / "there").symlink_to(data)
    (root / "snapshot" / "b.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    (root / "again.jsonl").symlink_to(data / "a.jsonl")  # the same file once more
    (data / "loop").symlink_to(root)
    texts = ["in a blob", "on another disk", "through a link to its folder"]
    assert sorted(read(root)) == texts
    assert sorted(read(root / "*")) == texts  # folders that a glob matches are read
    for name in ("d.jsonl", "disk"):
        (root / name).symlink_to(tmp_path / "not mounted")
        with pytest.raises(FileNotFoundError, match=f"{name}.*not mounted"):
            open_source(str(root))
        (root / name).unlink()


@pytest.mark.parametrize("spell", ["{}.jsonl", "{}-00000-of-00001.jsonl", "{}/data.jsonl", "birds_{}.jsonl"])
def test_splits_that_names_tell_are_used_as_such(tmp_path, spell):
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / spell.format(split), [{"text": split}])
    write_lines(tmp_path / "more.jsonl", [{"text": "no split"}])
    source = open_source(str(tmp_path))
    assert sorted(d.text for d in source.documents()) == ["no split", "train"]
    assert [d.text for d in source.validation()] == ["validation"]
    validation, test = source.notes
    assert spell.format("validation") in validation
    assert spell.format("test") in test
    own = open_source(str(tmp_path), "text", str(tmp_path / spell.format("test")))
    assert [d.text for d in own.validation()] == ["test"]  # a text that is named goes before one that is found
    assert own.stamp != source.stamp
    (tmp_path / spell.format("train")).unlink()  # without a training split names mean nothing
    (tmp_path / "more.jsonl").unlink()
    alone = open_source(str(tmp_path))
    assert sorted(d.text for d in alone.documents()) == ["test", "validation"]
    assert (alone.validation, alone.notes) == (None, ())


def test_fields(folder, tmp_path):
    assert read(folder / "a.jsonl", "body") == read(f"{folder}/a.jsonl::body") == ["uno", "dos"]
    assert read(write_lines(tmp_path / "n.jsonl", [{"data": {"text": "deep"}}]), "data.text") == ["deep"]
    assert read(write_lines(tmp_path / "d.jsonl", [{"data.text": "dotted"}]), "data.text") == ["dotted"]
    table = {"meta.text": ["dotted"], "translation": [{"en": "nested", "de": "x"}], "raw": [b"bytes"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "n.parquet")
    for field, text in (("meta.text", "dotted"), ("translation.en", "nested"), ("raw", "bytes")):
        assert read(tmp_path / "n.parquet", field) == [text]


def test_globs_and_opening_which_reads_nothing(folder):
    assert read(folder / "*.txt") == ["file text\n"]
    assert read(folder / "LIC*") == ["do what you like"]
    assert read(folder / "**" / "*.md") == ["inner text"]
    assert read(folder / "inner" / "c.md") == ["inner text"]
    (folder / "a.jsonl").write_text("not json")
    first = open_source(str(folder)).stamp
    assert open_source(str(folder)).stamp == first
    assert open_source(str(folder), "body").stamp != first
    (folder / "b.txt").write_text("another text\n")
    assert open_source(str(folder)).stamp != first


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"body": "x", "in": {"id": 1}}', "no field 'text'.*'body', 'in.id'"),
        (b'{"text": 5}', "'text'.*a number"),
        (b'{"text": null}', "'text'.*null"),
        (b'{"text": ["a", "b"]}', "'text'.*a list"),
        (b'{"text": "cut', "not valid JSON"),
        (b"5", "a number.*'text'"),
        (b'{"text": "caf\xe9"}', "UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    ],
)
def test_a_bad_line_is_a_bad_record(tmp_path, line, why):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fine"}\r' + line + b'\r\n{"text": "last", "id": ' + b"9" * 5000 + b"}")
    first, bad, last = open_source(str(path)).documents()
    assert (first.text, last.text) == ("fine", "last")
    assert bad.where == f"{path}, line 2"
    assert re.search(why, bad.why)


def test_other_bad_records(tmp_path, folder):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    [bad] = open_source(str(folder / "latin.txt")).documents()
    assert "byte 3" in bad.why
    (tmp_path / "x.csv").write_bytes(b"text,id\ncaf\xe9,1\n,2\nfine\n")
    assert [*map(len, read(tmp_path / "x.csv"))][1:] == [0, 4]
    assert "UTF-8" in read(tmp_path / "x.csv")[0]
    assert "'id'" in read(tmp_path / "x.csv", "id")[2]
    assert ["'other' is a number" in why for why in read(folder / "d.parquet", "other")] == [True] * 3


@pytest.mark.parametrize("turn", [{"role": "user", "content": "hi"}, {"from": "human", "value": "hi"}])
def test_a_text_is_taken_before_a_chat(tmp_path, turn):
    assert read(write_lines(tmp_path / "both.jsonl", [{"messages": [turn], "text": "as text"}])) == ["as text"]


def test_source_errors(tmp_path, folder):
    with pytest.raises(ValueError, match=r"'builtin:codes'.*code, dialogue, legal"):
        open_source("builtin:codes")
    with pytest.raises(ValueError, match="'tfds:'"):
        open_source("tfds:")
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_source(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"picture\.png"):
        open_source(str(folder / "picture.png"))
    with pytest.raises(FileNotFoundError, match=r"\*\.png"):
        open_source(str(folder / "*.png"))
    for name in ("d.parquet", "h.csv.zst"):
        with pytest.raises(ValueError, match=f"{name}.*'body'.*'text'"):
            read(folder / name, "body")
    (folder / "broken.parquet").write_bytes(b"PAR1")
    (folder / "utf16.jsonl").write_text('{"text": "x"}', encoding="utf-16")
    (folder / "cut.ndjson.gz").write_bytes((folder / "g.ndjson.gz").read_bytes()[:-9])
    (folder / "cut.csv.zst").write_bytes((folder / "h.csv.zst").read_bytes()[:-3])
    for name in ("broken.parquet", "utf16.jsonl", "cut.ndjson.gz", "cut.csv.zst"):
        with pytest.raises(ValueError, match=name):
            read(folder / name)


# TFDS: rows that this package wrote serve as a dataset of another's making.


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)})
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name="letters", version=tfds.core.Version("1.0.0"), data_dir=str(root), module_name="letters"
            ),
            features=features,
        ),
        max_examples_per_shard=10,
        overwrite=True,
        file_format="array_record",
    )
    writer.initialize_splits(["train", "test"])
    writer.add_examples({"train": [{"text": f"naïve {i}", "label": i} for i in range(4)]})
    writer.add_examples({"test": [{"text": "held out", "label": 9}]})
    writer.close_all()
    return root


def test_tfds_directory(tfds_directory):
    assert sorted(read(f"tfds:{tfds_directory}")) == [f"naïve {i}" for i in range(4)]
    assert read(f"tfds:{tfds_directory}:test") == ["held out"]
    assert len(read(f"tfds:{tfds_directory}:train[:50%]")) == 2
    train, test = open_source(f"tfds:{tfds_directory}"), open_source(f"tfds:{tfds_directory}:test")
    assert train.stamp != test.stamp
    assert "'label' is a number" in read(f"tfds:{tfds_directory}::label")[0]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (("tfds:{data}:dev",), ValueError, r"'dev'.*'test', 'train'"),
        (("tfds:{data}", "body"), ValueError, r"'body'.*'label', 'text'"),
        (("tfds:{empty}",), FileNotFoundError, r"dataset_info\.json"),
        (("tfds:{empty}/gone",), FileNotFoundError, "gone"),
        (("tfds:no_such_dataset",), FileNotFoundError, "'no_such_dataset'"),
        (("tfds:ag_news_subset:test",), FileNotFoundError, "'ag_news_subset'"),
    ],
)
def test_tfds_errors(tfds_directory, tmp_path, monkeypatch, spec, error, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(error, match=message):
        open_source(*(part.format(data=tfds_directory, empty=tmp_path) for part in spec))
