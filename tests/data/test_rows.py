"""Rows come back as they were stored, and damage is noticed."""

import shutil

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxkd.data import build, loader
from jaxkd.data.pack import Tokens, pack
from jaxkd.data.rows import Rows


def test_read(domains):
    rows = Rows(domains[0].path, "train")
    assert len(rows) == domains[0].train_rows
    assert rows.length == 32
    batch = rows.read([3, 0, 3])
    assert batch.pop("aux") == {}
    kinds = {name: (values.shape, str(values.dtype)) for name, values in batch.items()}
    wide = ((3, 32), "int32")
    assert kinds == {
        "tokens": wide, "targets": wide, "segments": wide, "positions": wide,
        "weights": ((3, 32), "float32"), "bytes": ((3,), "int64"),
    }  # fmt: skip
    np.testing.assert_array_equal(batch["tokens"][0], batch["tokens"][2])
    np.testing.assert_array_equal(batch["tokens"][1], rows.read(np.array([0]))["tokens"][0])
    assert rows.read([])["tokens"].shape == (0, 32)
    stored = rows.read(range(len(rows)))
    assert stored["segments"].max() > 1
    for tokens, targets, weights, segments in zip(*(stored[k] for k in ("tokens", "targets", "weights", "segments"))):
        for t in range(32):
            scored = t + 1 < 32 and segments[t] > 0 and segments[t] == segments[t + 1]
            assert weights[t] == scored
            assert targets[t] == (tokens[t + 1] if scored else 0)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Rows whose targets are not the next tokens, with a weight of a half and two further arrays."""
    documents = [Tokens(np.arange(n), np.ones(n, np.int64), np.full(n, 0.5, np.float32)) for n in (9, 12, 32)]

    def examples():
        for number, row in enumerate(pack(documents, 32)):
            aux = {"label": np.int64(number - 1), "advantage": np.linspace(0, number, 32, dtype=np.float32)}
            aux["scores"] = np.full(3, number, np.float32)
            yield {**row, "targets": (row["tokens"] + 100).astype(np.int32), "aux": aux}

    token = tfds.features.Tensor(shape=(32,), dtype=np.int32)
    aux = {name: tfds.features.Tensor(shape=(n,), dtype=np.float32) for name, n in (("advantage", 32), ("scores", 3))}
    aux["label"] = tfds.features.Scalar(np.int64)
    builder = build.PackedRows(
        length=32,
        sides={"train": examples},
        caps={"train": 0},
        facts={"name": "labelled", "spec": "made up", "tokens": 0, "bytes": 0},
        progress=False,
        extra={"targets": token, "aux": aux},
        data_dir=str(tmp_path_factory.mktemp("labelled")),
        config=tfds.core.BuilderConfig(name="labelled"),
        file_format="array_record",
    )
    builder.download_and_prepare(download_dir=str(tmp_path_factory.mktemp("downloads")))
    return Rows(builder.data_path, "train")


def test_targets_weights_and_aux_of_rows_and_batches(labelled, domains):
    """A domain without an array has zeros of it, so that all batches have one structure."""
    stored = labelled.read([1, 0])
    np.testing.assert_array_equal(stored["targets"], stored["tokens"] + 100)
    inside = stored["segments"][:, 1:] == stored["segments"][:, :-1]
    np.testing.assert_array_equal(stored["weights"][:, :-1], 0.5 * (inside & (stored["segments"][:, 1:] > 0)))
    assert stored["aux"]["label"].tolist() == [0, -1]
    np.testing.assert_allclose(stored["aux"]["advantage"][0], np.linspace(0, 1, 32), rtol=1e-6)
    assert labelled.read([])["aux"]["advantage"].shape == (0, 32)
    # Batches carry aux of every domain.
    both = [Rows(domains[0].path, "train"), labelled]
    local = loader.read_rows(both, np.array([1, 0, 1]), np.array([1, 5, 0]))
    batch = loader.to_devices(local, 3, np.arange(3), None)
    assert batch.aux["label"].tolist() == [0, 0, -1]
    assert batch.aux["advantage"].shape == (3, 32)
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    local = loader.read_rows(both, np.array([1, 0]), np.array([1, 5]))
    sharded = loader.to_devices(local, 2, np.arange(2), sharding)
    assert sharded.aux["advantage"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(
        sharded.aux["scores"], [[1, 1, 1], [0, 0, 0]]
    )  # 3 values are not split over 2 devices
    only = loader.read_rows(both, np.array([0]), np.array([5]))
    assert {name: values.tolist() for name, values in only["aux"].items() if name == "label"} == {"label": [0]}
    whole, _ = next(loader.fixed_batches(labelled, 1, 4))
    assert whole.aux["label"].tolist() == [-1, 0, 0, 0]
    assert whole.weights[2:].sum() == 0


def test_bad_requests(domains, tmp_path):
    rows = Rows(domains[0].path, "valid")
    for wanted in ([len(rows)], [-1]):
        with pytest.raises(IndexError, match="row index"):
            rows.read(wanted)
    with pytest.raises(ValueError, match="'dev'"):
        Rows(domains[0].path, "dev")
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        Rows(tmp_path, "train")


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[500] ^= 255
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("*train*", lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), "damaged"),
        ("*train*", lambda file: file.write_bytes(b""), "damaged"),
        ("*train*", lambda file: file.unlink(), "damaged"),
        ("*train*", flip_a_byte, "damaged"),  # is found when its rows are read, if not before
        ("features.json", lambda file: file.write_text("{"), "damaged"),
    ],
)
def test_damage(domains, tmp_path, name, damage, message):
    copy = shutil.copytree(domains[0].path, tmp_path / "1.0.0")
    damage(next(copy.glob(name)))
    with pytest.raises(ValueError, match=message):
        Rows(copy, "train").read(range(domains[0].train_rows) if damage is flip_a_byte else [])
