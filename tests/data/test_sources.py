"""Every kind of source is read, and every mistake in one is named in a line."""

import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxkd.data.sources import open_source


def texts(spec, **options):
    return [document.text for document in open_source(str(spec), **options).documents()]


@pytest.fixture
def folder(tmp_path):
    """One file of each kind, a folder inside, and files that are no text."""
    root = tmp_path / "corpus"
    (root / "inner").mkdir(parents=True)
    (root / "a.jsonl").write_text('{"text": "one", "body": "uno"}\n\n{"text": "two", "body": "dos"}\n')
    (root / "b.txt").write_text("\ufefffile text\n", encoding="utf-8")
    (root / "inner" / "c.md").write_text("inner text")
    table = pyarrow.table({"text": [f"row {i}" for i in range(3)], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, root / "d.parquet")
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / ".hidden.txt").write_text("hidden")
    return root


def test_folder(folder):
    documents = list(open_source(str(folder)).documents())
    assert [d.text for d in documents] == [
        "one", "two", "file text\n", "row 0", "row 1", "row 2", "inner text"
    ]  # fmt: skip
    assert len({d.group for d in documents}) == 7
    assert str(folder) not in "".join(d.group for d in documents)  # another place, the same division


def test_single_files(folder):
    assert texts(folder / "a.jsonl", text_key="body") == ["uno", "dos"]
    assert texts(folder / "d.parquet") == ["row 0", "row 1", "row 2"]
    assert texts(folder / "b.txt") == ["file text\n"]


def test_glob(folder):
    assert texts(folder / "*.txt") == ["file text\n"]
    assert texts(folder / "**" / "*.md") == ["inner text"]


def test_opening_reads_nothing(folder):
    (folder / "a.jsonl").write_text("not json")
    open_source(str(folder))


def test_fingerprint(folder):
    first = open_source(str(folder)).fingerprint
    assert open_source(str(folder)).fingerprint == first
    assert open_source(str(folder), text_key="body").fingerprint != first
    os.utime(folder / "b.txt", ns=(1, 1))
    touched = open_source(str(folder)).fingerprint
    assert touched != first
    (folder / "b.txt").rename(folder / "e.txt")
    assert open_source(str(folder)).fingerprint != touched


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 1}', r"bad.jsonl, line 2: no field 'text', the fields are 'body', 'id'"),
        ('{"text": 5}', r"bad.jsonl, line 2: field 'text' is int"),
        ('{"text": ', r"bad.jsonl, line 2: not valid JSON"),
        ("[1]", r"bad.jsonl, line 2: expected an object"),
    ],
)
def test_jsonl_errors(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        texts(path)


def test_file_errors(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="does not exist: give a file"):
        open_source(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"picture.png is of an unsupported kind: files can be .jsonl"):
        open_source(str(folder / "picture.png"))
    with pytest.raises(FileNotFoundError, match="has no text to read"):
        open_source(str(folder / "*.png"))
    with pytest.raises(ValueError, match=r"d.parquet: no column 'body', the columns are 'other', 'text'"):
        texts(folder / "d.parquet", text_key="body")
    with pytest.raises(ValueError, match=r"d.parquet, row 1: field 'other' is int"):
        texts(folder / "d.parquet", text_key="other")
    (folder / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken.parquet cannot be read as Parquet"):
        texts(folder / "broken.parquet")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        texts(folder / "latin.txt")


def test_unknown_names():
    with pytest.raises(ValueError, match="not a built-in text domain: there are code, dialogue, legal"):
        open_source("builtin:codes")
    with pytest.raises(ValueError, match="write tfds:NAME or tfds:NAME:SPLIT"):
        open_source("tfds:")


# TFDS: rows that this package wrote serve as a dataset of another's making.


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    """A prepared dataset with a text feature."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)})
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name="letters",
                version=tfds.core.Version("1.0.0"),
                data_dir=str(root),
                module_name="letters",
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
    assert sorted(texts(f"tfds:{tfds_directory}")) == [f"naïve {i}" for i in range(4)]
    assert texts(f"tfds:{tfds_directory}:test") == ["held out"]
    assert len(texts(f"tfds:{tfds_directory}:train[:50%]")) == 2
    train, test = open_source(f"tfds:{tfds_directory}"), open_source(f"tfds:{tfds_directory}:test")
    assert train.fingerprint != test.fingerprint


def test_tfds_errors(tfds_directory, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no split 'dev', the splits are 'test', 'train'"):
        open_source(f"tfds:{tfds_directory}:dev")
    with pytest.raises(ValueError, match="no feature 'body', the features are 'label', 'text'"):
        open_source(f"tfds:{tfds_directory}", text_key="body")
    with pytest.raises(ValueError, match="field 'label' is int"):
        texts(f"tfds:{tfds_directory}", text_key="label")
    with pytest.raises(FileNotFoundError, match=r"not a prepared TFDS dataset, it has no dataset_info.json"):
        open_source(f"tfds:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"the TFDS directory .*gone does not exist"):
        open_source(f"tfds:{tmp_path}/gone")
    with pytest.raises(FileNotFoundError, match=r"'no_such_dataset'.*give the local directory"):
        open_source("tfds:no_such_dataset")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'ag_news_subset' is not prepared on this machine"):
        open_source("tfds:ag_news_subset:test")
