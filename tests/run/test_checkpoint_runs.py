"""Runs and their checkpoints: a damaged one costs its steps and no more; the best is found; they may be elsewhere."""

import shutil

import pytest
from harness import assert_same_run, final_state, flip_a_bit, here, lines, logged, succeeds
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    """(workdir, arguments): twelve steps, of which 6, 9 and 12 are kept."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    more = [*arguments, "--config.run.keep_checkpoints=3"]
    succeeds("train", "--workdir", str(workdir), *more)
    return workdir, more


@pytest.fixture
def workdir(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "run")


def flip_a_bit_of_the_student(workdir, step):
    arrays = (b for name, b in final_state(workdir, step)[0].items() if name.startswith("['params']['student']"))
    flip_a_bit(workdir / "checkpoints" / str(step) / "train", max(arrays, key=len))


def test_a_damaged_checkpoint_costs_its_steps_and_no_more(run, workdir):
    before, arguments = run
    (workdir / "checkpoints" / "12" / "mixture" / "metadata").write_text("{}")
    succeeds("evaluate", "--workdir", str(workdir))
    flip_a_bit_of_the_student(workdir, 12)
    evaluated = here("evaluate", "--workdir", str(workdir))
    assert "checkpoints/12 cannot be restored" in evaluated.stderr
    assert "step 9 is used" in evaluated.stderr

    output = succeeds("train", "--workdir", str(workdir), *arguments)
    assert "its mixture differs from what was saved (checksum); it is kept as 12.aside, and step 9 is used" in output
    assert "resuming at step 9 of 12" in output
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "12.aside", "6", "9"]
    (workdir / "evals.jsonl").write_text(
        "".join(line for line in (workdir / "evals.jsonl").read_text().splitlines(True) if '"step": 9' not in line)
    )
    assert_same_run(workdir, before)


def test_after_a_rollback_the_learning_rate_may_be_lower(run, workdir):
    """The usual way out of a loss that does not come down again."""
    before, arguments = run
    assert here("rollback", "--workdir", str(workdir), "--step", "6").returncode == 0
    lower = [*arguments, "--config.optim.lr.peak=1e-3", "--config.optim.lr.end=1e-4"]
    refused = here("train", "--workdir", str(workdir), *lower)
    assert "optim.lr.peak: 0.01 -> 0.001. Use a new --workdir, or add --accept-changes" in refused.stderr
    output = succeeds("train", "--workdir", str(workdir), *lower, "--accept-changes")
    assert "resuming at step 6 of 12" in output
    rows, as_it_was = logged(workdir), logged(before)
    assert rows[:6] == as_it_was[:6]
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row, other in zip(rows[6:], as_it_was[6:], strict=True):
        assert row["lr"] == pytest.approx(other["lr"] / 10, rel=1e-5)
    assert rows[6]["loss"] == as_it_was[6]["loss"]  # the same state and the same rows, until an update differs
    assert rows[8]["loss"] != as_it_was[8]["loss"]


def test_spikes_may_be_watched_for_a_part_of_a_run(run, workdir):
    """Twelve steps are too few for any to count as one: watching them changes what is remembered, and last bits."""
    before, arguments = run
    assert here("rollback", "--workdir", str(workdir), "--step", "6").returncode == 0
    output = succeeds("train", "--workdir", str(workdir), *arguments, "--config.optim.spike=6.0", "--accept-changes")
    assert "resuming at step 6 of 12" in output
    assert logged(workdir)[:6] == logged(before)[:6]
    more = final_state(workdir)[0].keys() - final_state(before)[0].keys()
    assert more
    assert all("recent" in name for name in more)

    assert here("rollback", "--workdir", str(workdir), "--step", "9").returncode == 0
    output = succeeds("train", "--workdir", str(workdir), *arguments, "--accept-changes")
    assert "resuming at step 9 of 12" in output
    assert final_state(workdir)[0].keys() == final_state(before)[0].keys()
    assert [row["step"] for row in logged(workdir)] == list(range(1, 13))
    losses = [[row["loss"] for row in logged(directory)] for directory in (workdir, before)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_best_student_is_exported(workdir, tmp_path):
    losses = {row["step"]: row["student_nats"] for row in lines(workdir / "evals.jsonl") if row["domain"] == "mean"}
    assert losses[12] < losses[6]
    shutil.rmtree(workdir / "checkpoints" / "12")  # so that the newest, 9, was not evaluated, and 6 is the best
    succeeds("export", "--workdir", str(workdir), "--step", "best", "--output", str(tmp_path / "best"))
    state, _ = final_state(workdir, 6)
    norm = load_file(tmp_path / "best" / "model.safetensors")["model.norm.weight"]
    assert norm.tobytes() in state.values()
    shutil.rmtree(workdir / "checkpoints" / "6")
    result = here("export", "--workdir", str(workdir), "--step", "best", "--output", str(tmp_path / "none"))
    assert "run.eval_every" in result.stderr
    assert "--step 5x is no checkpoint: give a number of steps, or best" in here(
        "export", "--workdir", str(workdir), "--step", "5x", "--output", str(tmp_path / "none")
    ).stderr  # fmt: skip


def test_checkpoints_in_another_place(arguments, tmp_path):
    elsewhere, workdir = tmp_path / "elsewhere", tmp_path / "run"
    short = [*arguments, "--config.run.steps=2", f"--config.run.checkpoints={elsewhere}"]
    succeeds("train", "--workdir", str(workdir), *short)
    assert [p.name for p in elsewhere.iterdir()] == ["2"]
    assert (workdir / "checkpoints" / "2" / "commit_success.txt").read_text() == f"{elsewhere / '2'}\n"

    # The workdir knows that it was trained in, and from where it goes on.
    changed = here("train", "--workdir", str(workdir), *short, "--config.optim.b1=0.5")
    assert "holds another experiment: optim.b1" in changed.stderr
    # A new machine has an empty workdir: the same run goes on, another one does not take it for its own.
    again = here("train", "--workdir", str(tmp_path / "new machine"), *short)
    assert "resuming at step 2 of 2" in again.stdout
    other = here("train", "--workdir", str(tmp_path / "other"), *short, "--config.optim.b1=0.5")
    assert "holds checkpoints of another run, whose optim.b1 differ from this config" in other.stderr
    # And nothing begins anew because a disk is not there.
    elsewhere.rename(tmp_path / "unmounted")
    lost = here("train", "--workdir", str(workdir), *short)
    assert f"has made a checkpoint at step 2, but there is none under {elsewhere}" in lost.stderr
    relative = here("train", "--workdir", str(tmp_path / "x"), *arguments, "--config.run.checkpoints=here")
    assert "run.checkpoints=here must be absolute" in relative.stderr
