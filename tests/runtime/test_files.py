"""Atomic replacement and JSON lines: a crash or a full disk never leaves half a file under its name."""

import errno
import os
from unittest.mock import Mock

import pytest

from jaxkd.runtime import files


def test_a_file_is_replaced_with_the_umasks_mode_and_synced_with_its_directory(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "run.json", [], os.fsync
    path.write_text("old")
    inode = path.stat().st_ino
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    before = os.umask(0o027)
    try:
        files.write_json(path, {"a": 1})
    finally:
        os.umask(before)
    assert path.stat().st_ino != inode
    assert files.read_json(path) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o640
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("write() failed: No space left on device;"),
    ],
)
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, error):
    path = tmp_path / "state.json"
    files.write_json(path, {"old": True})
    monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
    with (
        pytest.raises(OSError, match="No space left on device while testing") as caught,
        files.errors_name(path, "testing"),
    ):
        files.write_text(tmp_path / "other", "new")
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_json(path, {"new": True})
    assert caught.value.filename == str(path)
    monkeypatch.undo()
    assert files.read_json(path) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[1]", "\xff"])
def test_a_torn_json_file_is_named(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(files.Torn, match=r"run\.json"):
        files.read_json(path)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "absent.json")


def test_a_torn_last_line_is_skipped_and_replaced(tmp_path):
    path = tmp_path / "goodput.jsonl"
    assert files.read_jsonl(path) == []
    files.append_jsonl(path, [{"step": 1}, {"step": 2}])
    for torn in ('{"step": 3', "{"):
        path.write_text(path.read_text() + torn)
        assert files.read_jsonl(path)[-1]["step"] in (2, 4)
        files.append_jsonl(path, [{"step": 4}])
    assert [row["step"] for row in files.read_jsonl(path)] == [1, 2, 4, 4]
    path.write_text('{"st')
    files.append_jsonl(path, [{"step": 1}])
    assert files.read_jsonl(path) == [{"step": 1}]


@pytest.mark.parametrize("line", [b'{"step": 2{"step": 3}', b"[1]", b'{"loss": 1}', b"\xff"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n' + line + b'\n{"step": 4}\n')
    with pytest.raises(files.Torn, match=r"metrics\.jsonl line 3"):
        files.read_jsonl(path)
