"""`jaxkd rollback`: what it sets aside, what it says, and when it touches nothing."""

import json
import os
import platform
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import flip_a_bit, here, recipe

from jaxkd.run import workdir as workdirs
from jaxkd.train.checkpoint import Checkpoints
from jaxkd.train.retention import Keep
from jaxkd.train.state import TrainState


def state_of(step: int) -> TrainState:
    w = jax.random.normal(jax.random.key(step), (64, 16))
    return TrainState(jnp.int32(step), {"student": {"w": w}, "objective": {}}, (w * 2, [w.astype(jnp.bfloat16)]))


@pytest.fixture(scope="module")
def saved(arguments, tmp_path_factory) -> Path:
    """A run's workdir without the run: its config, and three checkpoints of which the second is the best."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdirs.write_config(workdir, recipe(*arguments))
    writer = Checkpoints(workdir / "checkpoints", Keep(9))
    for step, loss in ((3, 2.0), (6, 1.0), (9, 3.0)):
        writer.save(step, state_of(step), {"tokens": step}, loss)
    writer.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def rollback(workdir: Path, step: str):
    return here("rollback", "--workdir", str(workdir), "--step", step)


def files(workdir: Path) -> dict[str, bytes]:
    """All that is there, but for the lock, which says who had it last."""
    paths = {str(f.relative_to(workdir)): f for f in workdir.rglob("*") if f.is_file()}
    return {name: f.read_bytes() for name, f in paths.items() if name != ".lock"}


def assert_refused(workdir: Path, step: str, sentence: str) -> None:
    before = files(workdir)
    done = rollback(workdir, step)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert files(workdir) == before


def test_later_steps_are_set_aside_whole_and_named_and_can_be_put_back(workdir):
    checkpoints, before = workdir / "checkpoints", files(workdir)
    done = rollback(workdir, "3")
    assert done.returncode == 0, done.stderr
    first, on, undo = done.stdout.splitlines()
    assert "step 3 " in first
    assert f"{checkpoints}: 6 as 6.aside, 9 as 9.aside" in first
    assert "resumes from step 3" in on
    assert "--accept-changes" in on
    assert undo.endswith("rename 6.aside to 6, 9.aside to 9")
    assert Checkpoints(checkpoints, read_only=True).steps() == [3]
    for step in ("6", "9"):
        (checkpoints / f"{step}.aside").rename(checkpoints / step)
    assert files(workdir) == before
    assert Checkpoints(checkpoints, read_only=True).latest() == 9
    assert "step 6 is the newest" in rollback(workdir, "best").stdout
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps() == [3, 6]
    assert "step 6 is already the newest" in rollback(workdir, "6").stdout


def test_a_step_that_is_not_there_or_not_whole_is_refused(workdir, tmp_path, monkeypatch):
    assert_refused(workdir, "5", f"there is no checkpoint {workdir}/checkpoints/5; existing steps: 3, 6, 9")
    assert_refused(workdir, "last", "--step last is no checkpoint")
    assert "holds no run" in rollback(tmp_path / "nothing", "3").stderr
    assert not (tmp_path / "nothing").exists()

    monkeypatch.setattr("jaxkd.train.orbax_io._PORTION", 5000)  # so that the arrays take several portions
    step = workdir / "checkpoints" / "6"
    flip_a_bit(step / "train", np.asarray(state_of(6).opt_state[1][0]).tobytes())
    assert_refused(workdir, "6", f"{step} cannot be restored: opt_state.1.0 ")
    (workdir / "checkpoints" / "9" / "mixture" / "metadata").write_text("{}")
    assert_refused(workdir, "9", "9 cannot be restored: its mixture ")
    assert rollback(workdir, "3").returncode == 0


def test_a_run_in_progress_is_left_alone(workdir, monkeypatch):
    """On this host the lock tells; between hosts the heartbeat does, a file that all of them see."""
    with workdirs.lock(workdir):
        assert_refused(workdir, "3", f"a run is in progress in {workdir}, on this host")
    beat = {"time": time.time() - 4, "phase": "steps", "step": 9, "since": 0.0, "pid": os.getpid()}
    (workdir / "heartbeat.json").write_text(json.dumps(beat))
    (workdir / ".lock").write_text("pod-7 4711 abc")
    assert_refused(workdir, "3", f"a run is in progress in {workdir}: pod-7 wrote heartbeat.json 4 s ago")
    for over in ({"time": time.time() - 61}, {"phase": "end"}):
        (workdir / "heartbeat.json").write_text(json.dumps(beat | over))
        assert rollback(workdir, "9").returncode == 0
    (workdir / "heartbeat.json").write_text(json.dumps(beat))
    (workdir / ".lock").write_text(f"{platform.node()} 4711 abc")  # of a process that was killed here
    assert rollback(workdir, "3").returncode == 0
    monkeypatch.setenv("JAXKD_COORDINATOR", "10.0.0.2:8476")
    monkeypatch.setenv("JAXKD_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAXKD_PROCESS_ID", "1")
    assert_refused(workdir, "3", "start it on one host")


def test_marks_follow_checkpoints_that_are_elsewhere(saved, arguments, tmp_path):
    elsewhere, workdir = shutil.copytree(saved / "checkpoints", tmp_path / "elsewhere"), tmp_path / "run"
    workdirs.write_config(workdir, recipe(*arguments, f"--config.run.checkpoints={elsewhere}"))
    for step in (3, 6, 9):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "commit_success.txt").touch()
    assert f"under {elsewhere}: 6 as 6.aside, 9 as 9.aside" in rollback(workdir, "3").stdout
    assert sorted(path.name for path in elsewhere.iterdir()) == ["3", "6.aside", "9.aside"]
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
    elsewhere.rename(tmp_path / "unmounted")
    assert "there is no checkpoint" in rollback(workdir, "3").stderr
    assert not elsewhere.exists()  # where a disk is not mounted nothing is made
