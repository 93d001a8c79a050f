"""Whole runs in processes of their own: killed, signalled, resumed; the same bits every time."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import jaxkd, process_environment, tiny_arguments

TIMINGS = ("tokens_per_s", "step_s")
SMALL = (
    "--config.run.steps=12",
    "--config.run.checkpoint_every=3",
    "--config.run.eval_every=6",
    "--config.data.interval=5",
)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logged(workdir: Path) -> list[dict]:
    """The metrics, timings left out."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in lines(workdir / "metrics.jsonl")]


def final_state(workdir: Path) -> tuple[dict, dict]:
    """Every array of the newest checkpoint as bytes, and the mixture."""
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert step == 12
    reader, path = ocp.PyTreeCheckpointer(), workdir.absolute() / "checkpoints" / str(step)
    shapes = reader.metadata(path / "train").item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    tree = reader.restore(path / "train", ocp.args.PyTreeRestore(restore_args=as_numpy))
    mixture = json.loads((path / "mixture" / "metadata").read_text())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}, mixture


def assert_same_run(workdir: Path, reference: Path) -> None:
    assert logged(workdir) == logged(reference)
    assert lines(workdir / "evals.jsonl") == lines(reference / "evals.jsonl")
    (state, mixture), (expected, expected_mixture) = final_state(workdir), final_state(reference)
    assert len(expected) > 20
    assert state == expected
    assert mixture == expected_mixture


class Background:
    """A run that can be killed or signalled."""

    def __init__(self, workdir: Path, arguments: list[str], cache: bool = True):
        self.workdir = workdir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxkd", "train", "--workdir", str(workdir), *arguments],
            env=process_environment(cache=cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        """Until that step's metrics are on disk, or the run is over."""
        deadline = time.monotonic() + 300
        path = self.workdir / "metrics.jsonl"
        while time.monotonic() < deadline and self.process.poll() is None:
            if path.exists() and path.read_text().count("\n") >= step:
                return
            time.sleep(0.005)
        assert self.process.poll() is not None, "the run made no progress"

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=300)
        return output


@pytest.fixture(scope="module")
def arguments(two_domains, tmp_path_factory) -> list[str]:
    return tiny_arguments(two_domains, tmp_path_factory.mktemp("rows"), *SMALL)


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    result = jaxkd("train", "--workdir", str(workdir), *arguments)
    assert result.returncode == 0, result.stderr
    assert "report.html" in result.stdout
    return workdir


def test_a_run_writes_what_it_promises(undisturbed):
    rows = lines(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"loss", "kd", "ce", "kd/alpha", "lr", "grad_norm", "tokens", "tokens_per_s"} <= set(rows[0])
    assert rows[-1]["tokens"] > rows[0]["tokens"] * 8
    evaluations = lines(undisturbed / "evals.jsonl")
    assert [(row["step"], row["domain"]) for row in evaluations] == [
        (step, domain) for step in (0, 6, 12) for domain in ("alpha", "beta", "mean")
    ]
    expected = "step domain student_nats teacher_nats student_bits_per_byte teacher_bits_per_byte kl agreement"
    assert list(evaluations[0]) == [*expected.split(), "gap_closed", "tokens"]
    last = evaluations[-1]
    assert last["student_nats"] < evaluations[2]["student_nats"] - 0.5
    assert last["teacher_nats"] == evaluations[2]["teacher_nats"]
    run = json.loads((undisturbed / "run.json").read_text())
    assert run["student"]["kept_layers"] == [0, 3]
    assert run["command"].startswith("jaxkd train --workdir")
    assert list((undisturbed / "tensorboard").iterdir())


def test_bits_per_byte_are_nats_over_bytes(undisturbed):
    """The byte tokenizer has one byte a token, but for the document's end."""
    row = lines(undisturbed / "evals.jsonl")[0]
    assert row["student_bits_per_byte"] >= row["student_nats"] / np.log(2)
    assert row["student_bits_per_byte"] < 1.05 * row["student_nats"] / np.log(2)


def test_the_finished_command_repeated_changes_nothing(undisturbed, arguments):
    before = (undisturbed / "metrics.jsonl").read_bytes(), (undisturbed / "evals.jsonl").read_bytes()
    result = jaxkd("train", "--workdir", str(undisturbed), *arguments)
    assert result.returncode == 0, result.stderr
    assert "mean" in result.stdout
    assert ((undisturbed / "metrics.jsonl").read_bytes(), (undisturbed / "evals.jsonl").read_bytes()) == before


@pytest.mark.slow
def test_killed_ten_times_equals_undisturbed(undisturbed, arguments, tmp_path):
    workdir, rng = tmp_path / "killed", random.Random(5)
    for _ in range(10):
        run = Background(workdir, arguments, cache=False)
        reached = len(lines_so_far(workdir))
        run.wait_for_step(min(reached + rng.randint(1, 3), 12))
        time.sleep(rng.random() * 0.05)
        run.process.kill()
        run.finish()
    result = jaxkd("train", "--workdir", str(workdir), *arguments)
    assert result.returncode == 0, result.stderr
    assert_same_run(workdir, undisturbed)


def lines_so_far(workdir: Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_once_equals_undisturbed(number, undisturbed, arguments, tmp_path):
    workdir = tmp_path / "stopped"
    # Long enough that the signal arrives before the end; the rest of the run is the same.
    run = Background(workdir, arguments)
    run.wait_for_step(4)
    run.process.send_signal(number)
    output = run.finish()
    if number != signal.SIGKILL:
        assert run.process.returncode == 0, output
        assert "Traceback" not in output
        if "the same command goes on" not in output:
            pytest.fail(f"the run ended before the signal was noticed: {output[-500:]}")
    result = jaxkd("train", "--workdir", str(workdir), *arguments)
    assert result.returncode == 0, result.stderr
    if number != signal.SIGKILL:  # which may come before the first checkpoint is whole
        assert "resuming at step" in result.stdout
    assert_same_run(workdir, undisturbed)


def test_another_mesh_gives_the_same_rows_and_nearly_the_same_losses(undisturbed, arguments, tmp_path):
    workdir = tmp_path / "sharded"
    options = ["--config.run.mesh.data=4", "--config.run.mesh.model=2"]
    result = jaxkd("train", "--workdir", str(workdir), *arguments, *options, devices=8)
    assert result.returncode == 0, result.stderr
    pairs = list(zip(logged(workdir), logged(undisturbed), strict=True))
    assert all(a["tokens"] == b["tokens"] for a, b in pairs)
    # Adam magnifies rounding; the first steps show that rows and losses are the same.
    for sharded, single in pairs[:3]:
        assert sharded["loss"] == pytest.approx(single["loss"], rel=1e-4)


def test_a_changed_config_is_refused_unless_told(undisturbed, arguments, tmp_path):
    changed = [*arguments, "--config.optim.lr.peak=1e-3"]
    result = jaxkd("train", "--workdir", str(undisturbed), *changed)
    assert result.returncode == 1
    assert "holds another experiment: optim.lr.peak: 0.01 -> 0.001" in result.stderr
    assert result.stderr.count("\n") == 1
    before = (undisturbed / "config.json").read_bytes()
    result = jaxkd("train", "--workdir", str(undisturbed), *changed, "--accept-changes")
    assert result.returncode == 0, result.stderr
    (undisturbed / "config.json").write_bytes(before)


def test_evaluate_and_export_read_the_run(undisturbed, tmp_path):
    rows = (undisturbed / "evals.jsonl").read_bytes()
    result = jaxkd("evaluate", "--workdir", str(undisturbed))
    assert result.returncode == 0, result.stderr
    mean = lines(undisturbed / "evals.jsonl")[-1]
    assert f"{mean['student_nats']:.3f}" in result.stdout
    assert (undisturbed / "evals.jsonl").read_bytes() == rows  # the step is there already

    result = jaxkd("export", "--workdir", str(undisturbed), "--to", str(tmp_path / "student"))
    assert result.returncode == 0, result.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in (tmp_path / "student").iterdir()
    }
    # The exported directory is a model like any other: as a student of its own, it starts where the run ended.
    again = tmp_path / "again"
    result = jaxkd(
        "train",
        "--workdir",
        str(again),
        *tiny_arguments({}, Path("unused")),
    )
    assert result.returncode == 1  # no domain is left
    assert "data.domains is empty" in result.stderr


def test_an_exported_student_continues_as_a_checkpoint(undisturbed, arguments, tmp_path):
    student = tmp_path / "student"
    assert jaxkd("export", "--workdir", str(undisturbed), "--to", str(student)).returncode == 0
    more = ["--config.student.layers=()", f"--config.student.path={student}", f"--config.data.tokenizer={student}"]
    result = jaxkd("train", "--workdir", str(tmp_path / "on"), *arguments, *more, "--config.run.steps=1")
    assert result.returncode == 0, result.stderr
    first, last = lines(tmp_path / "on" / "evals.jsonl")[2], lines(undisturbed / "evals.jsonl")[-1]
    assert first["student_nats"] == pytest.approx(last["student_nats"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(arguments, tmp_path):
    workdir = tmp_path / "diverged"
    more = ["--config.optim.lr.peak=1e30", "--config.optim.clip=0.0", "--config.optim.weight_decay=1e20"]
    result = jaxkd("train", "--workdir", str(workdir), *arguments, *more)
    assert result.returncode == 1
    assert "is nan at step" in result.stderr or "is inf at step" in result.stderr
    assert "Traceback" not in result.stderr
    assert not [p for p in (workdir / "checkpoints").iterdir() if p.name == "12"]
