"""A workdir: claimed by one experiment, locked, kept when something is wrong; what loading does before a step."""

import dataclasses
import errno
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import pytest
from harness import fails, here, recipe, tiny_arguments, write_domain

from jaxkd.run import job, metadata, restore
from jaxkd.run import workdir as workdirs
from jaxkd.run.load import check_one_device, host_params
from jaxkd.train.checkpoint import Checkpoints


def tiny():
    return recipe("tiny.py")


def test_a_corrected_command_may_reuse_a_workdir_in_which_nothing_was_trained(tmp_path):
    e = tiny()
    other = dataclasses.replace(e, run=dataclasses.replace(e.run, seed=5))
    workdir = tmp_path / "run"
    assert workdirs.claim(workdir, e, False) == []
    (workdir / "evals.jsonl").write_text("of the first student")
    assert workdirs.claim(workdir, other, False) == []
    assert not (workdir / "evals.jsonl").exists()
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run\.seed"):
        workdirs.claim(workdir, e, True)
    longer = dataclasses.replace(other, run=dataclasses.replace(other.run, steps=99))
    with pytest.raises(ValueError, match=r"run\.steps: 20 -> 99"):
        workdirs.claim(workdir, longer, False)
    assert workdirs.claim(workdir, longer, True) == ["run.steps: 20 -> 99"]
    assert workdirs.saved_experiment(workdir) == other  # until `adopt`, which follows a successful start
    # Logged steps are kept when checkpoints are gone.
    other = dataclasses.replace(e, optim=dataclasses.replace(e.optim, clip=2.0))
    workdirs.claim(tmp_path / "logged", e, False)
    (tmp_path / "logged" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"optim\.clip"):
        workdirs.claim(tmp_path / "logged", other, False)
    assert (tmp_path / "logged" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_domains_may_be_read_from_other_files_where_a_checkpoint_knows_their_rows(tmp_path):
    named = lambda **domains: dataclasses.replace(tiny(), data=dataclasses.replace(tiny().data, domains=domains))
    workdirs.claim(tmp_path, named(a="a.jsonl", b="b"), False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    renamed = named(a="renamed.jsonl", b="b")
    with pytest.raises(ValueError, match=r"data\.domains\.a"):
        workdirs.claim(tmp_path, renamed, True)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert workdirs.claim(tmp_path, renamed, False) == ["data.domains.a: 'a.jsonl' -> 'renamed.jsonl'"]
    for others in (named(a="a.jsonl"), named(b="b", a="a.jsonl"), named(a="a.jsonl", c="b")):
        with pytest.raises(ValueError, match=r"data\.domains"):
            workdirs.claim(tmp_path, others, True)


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', '{"data": '])
def test_another_programs_config_is_kept(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        workdirs.claim(tmp_path, tiny(), True)
    assert (tmp_path / "config.json").read_text() == text
    with pytest.raises(ValueError, match="model_type" if "model_type" in text else r"config\.json"):
        workdirs.saved_experiment(tmp_path)


def test_checkpoints_that_lie_where_marks_would_are_kept(tmp_path):
    """Marks of checkpoints that were moved elsewhere may lie beside whole checkpoints."""
    e, elsewhere = tiny(), tmp_path / "elsewhere"
    e = dataclasses.replace(e, run=dataclasses.replace(e.run, checkpoints=str(elsewhere)))
    (elsewhere / "20").mkdir(parents=True)
    (elsewhere / "20" / "commit_success.txt").write_text("")
    marks = tmp_path / "checkpoints"
    for step, names in {"5": ("commit_success.txt", "train"), "10": ("commit_success.txt",)}.items():
        (marks / step).mkdir(parents=True)
        for name in names:
            (marks / step / name).write_text("")
    restore.mark(Checkpoints(elsewhere, read_only=True), e.run, tmp_path)
    assert sorted(path.name for path in marks.iterdir()) == ["20", "5"]
    assert (marks / "5" / "train").exists()


def test_locks(tmp_path, monkeypatch, capsys):
    """Lustre without flock and NFS without a lock server: a warning, and the run goes on."""
    with workdirs.lock(tmp_path), pytest.raises(ValueError, match=str(tmp_path)), workdirs.lock(tmp_path):
        pass
    with workdirs.lock(tmp_path):
        pass
    for number in (errno.ENOSYS, errno.ENOLCK):
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, "no")))
        with workdirs.lock(tmp_path):
            pass
        assert str(tmp_path / ".lock") in capsys.readouterr().err
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error") as raised, workdirs.lock(tmp_path):
        pass
    assert raised.value.filename == str(tmp_path / ".lock")


def test_one_device_seeds_and_git(monkeypatch):
    """Otherwise student.keep would end in XLA's out-of-memory error at every start, whatever the mesh."""
    model = {"embedding": jax.ShapeDtypeStruct((2**17, 4096), "bfloat16")}
    device = lambda stats: SimpleNamespace(memory_stats=lambda: stats)
    for enough in (None, {}, {"bytes_limit": 3 * 2**30}):
        check_one_device(model, device(enough))
    with pytest.raises(ValueError, match=r"student\.keep .* 2\.0 GiB"):
        check_one_device(model, device({"bytes_limit": 2 * 2**30}))
    built = job.build(tiny())
    first, again, other = (host_params(built.models.teacher._replace(seed=seed)) for seed in (0, 0, 1))
    assert (first["embed"] == again["embed"]).all()
    assert (first["embed"] != other["embed"]).any()
    monkeypatch.setenv("PATH", "/nowhere")
    assert metadata.git_commit() is None


@pytest.mark.slow
def test_rows_that_changed_under_a_run_are_noticed(tmp_path):
    text = write_domain(tmp_path / "a.jsonl", 3)
    arguments = tiny_arguments({"a": text}, tmp_path / "rows", "--config.run.steps=2", "--config.run.eval_every=0")
    workdir = ["--workdir", str(tmp_path / "run")]
    assert here("train", *workdir, *arguments).returncode == 0
    write_domain(text, 4)
    assert "rows of a " in fails("train", *workdir, *arguments)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mount"), reason="needs a small file system of its own")
def test_a_full_disk_is_one_line(tmp_path, two_domains):
    volume = tmp_path / "small"
    volume.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(volume)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        more = ["--config.run.steps=4", "--config.run.checkpoint_every=1", "--config.run.keep_checkpoints=9"]
        arguments = tiny_arguments(two_domains, tmp_path / "rows", *more)
        complaint = fails("train", "--workdir", str(volume / "run"), *arguments)
        assert "the disk is full" in complaint
    finally:
        subprocess.run(["umount", "-l", str(volume)], check=False)


def test_a_workdir_is_any_directory(tmp_path, monkeypatch):
    """A mount point, a link, `.`; a link to nothing is named, and so is the lock where nothing can be written."""
    e, volume = tiny(), tmp_path / "volume ü"
    (volume / "lost+found").mkdir(parents=True)
    assert workdirs.claim(volume, e, False) == []
    (tmp_path / "link").symlink_to(volume)
    monkeypatch.chdir(volume)
    for path in (tmp_path / "link", Path(), Path("new")):
        assert workdirs.claim(path, e, False) == []
        with workdirs.lock(path) as mark:
            workdirs.wait_for_lock(path, mark, 0)
        assert workdirs.saved_experiment(path) == e
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"--workdir .*dangling .*nowhere"):
        workdirs.claim(tmp_path / "dangling", e, False)
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"volume ü/new/\.lock"), workdirs.lock(volume / "new"):
        pass
