"""Rows come back as they were stored, and damage is noticed."""

import shutil

import numpy as np
import pytest

from jaxkd.data.rows import Rows


def test_read(domains):
    rows = Rows(domains[0].path, "train")
    assert len(rows) == domains[0].train_rows
    assert rows.length == 32
    batch = rows.read([3, 0, 3])
    kinds = {name: (values.shape, str(values.dtype)) for name, values in batch.items()}
    wide = ((3, 32), "int32")
    assert kinds == {
        "tokens": wide, "targets": wide, "segments": wide, "positions": wide,
        "weights": ((3, 32), "float32"), "bytes": ((3,), "int64"),
    }  # fmt: skip
    np.testing.assert_array_equal(batch["tokens"][0], batch["tokens"][2])
    np.testing.assert_array_equal(batch["tokens"][1], rows.read(np.array([0]))["tokens"][0])
    assert rows.read([])["tokens"].shape == (0, 32)


def test_targets_and_weights(domains):
    rows = Rows(domains[0].path, "train")
    stored = rows.read(range(len(rows)))
    assert stored["segments"].max() > 1
    for tokens, targets, weights, segments in zip(*(stored[k] for k in ("tokens", "targets", "weights", "segments"))):
        for t in range(32):
            scored = t + 1 < 32 and segments[t] > 0 and segments[t] == segments[t + 1]
            assert weights[t] == scored
            assert targets[t] == (tokens[t + 1] if scored else 0)


def test_bad_requests(domains, tmp_path):
    rows = Rows(domains[0].path, "valid")
    for wanted in ([len(rows)], [-1]):
        with pytest.raises(IndexError, match="row index"):
            rows.read(wanted)
    with pytest.raises(ValueError, match="'dev'"):
        Rows(domains[0].path, "dev")
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        Rows(tmp_path, "train")


@pytest.mark.parametrize("damage", ["short", "empty", "gone", "features"])
def test_damage(domains, tmp_path, damage):
    copy = tmp_path / "1.0.0"
    shutil.copytree(domains[0].path, copy)
    file = next(copy.glob("*train*"))
    if damage == "short":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    else:
        (copy / "features.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Rows(copy, "train")


def test_damage_inside(domains, tmp_path):
    """A flipped byte is found when its rows are read, if not before."""
    copy = tmp_path / "1.0.0"
    shutil.copytree(domains[0].path, copy)
    file = next(copy.glob("*train*"))
    content = bytearray(file.read_bytes())
    content[500] ^= 255
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged"):
        Rows(copy, "train").read(range(domains[0].train_rows))
