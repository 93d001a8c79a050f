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
from harness import jaxkd, process_environment, tiny_arguments

GOLDEN = [  # loss, kd, ce of the first five steps of the tiny recipe on the two made-up domains
    (5.50975, 0.000879, 5.50931),
    (5.21610, 0.007055, 5.21258),
    (4.76021, 0.034366, 4.74303),
    (4.32711, 0.096730, 4.27875),
    (4.00262, 0.208092, 3.89858),
]
TIMINGS = ("tokens_per_s", "step_s")
SMALL = (
    "--config.run.steps=12",
    "--config.run.checkpoint_every=3",
    "--config.run.eval_every=6",
    "--config.data.interval=5",
    "--config.run.keep_checkpoints=1",
)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logged(workdir: Path) -> list[dict]:
    """The metrics, timings left out."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in lines(workdir / "metrics.jsonl")]


def final_state(workdir: Path, step: int = 12) -> tuple[dict, dict]:
    """Every array of a checkpoint as bytes, and the mixture."""
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

    def wait_for_step(self, step: int, file: str = "metrics.jsonl") -> None:
        """Until a file has so many lines, or the run is over."""
        deadline = time.monotonic() + 300
        path = self.workdir / file
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
    run = Background(workdir, arguments, cache=False)
    if number == signal.SIGKILL:
        run.wait_for_step(4)
    else:  # while the step compiles: these steps take milliseconds, and JAX looks for SIGTERM about once a second
        run.wait_for_step(0, "evals.jsonl")
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
    order = jaxkd("train", "--workdir", str(undisturbed), *arguments, "--config.data.interval=4", "--accept-changes")
    assert order.returncode == 1
    assert "data.interval decides which rows a step sees and cannot change in a run" in order.stderr
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


def test_an_exported_student_continues_as_a_checkpoint(undisturbed, arguments, tmp_path):
    student = tmp_path / "student"
    assert jaxkd("export", "--workdir", str(undisturbed), "--to", str(student)).returncode == 0
    more = ["--config.student.layers=()", f"--config.student.path={student}", f"--config.data.tokenizer={student}"]
    result = jaxkd("train", "--workdir", str(tmp_path / "on"), *arguments, *more, "--config.run.steps=1")
    assert result.returncode == 0, result.stderr
    first, last = lines(tmp_path / "on" / "evals.jsonl")[2], lines(undisturbed / "evals.jsonl")[-1]
    assert first["student_nats"] == pytest.approx(last["student_nats"], rel=1e-5)


def test_the_numbers_are_what_they_were(undisturbed):
    """If this moves on purpose, say why in the commit and write the new numbers down; otherwise find out why."""
    rows = lines(undisturbed / "metrics.jsonl")[:5]
    assert [(row["loss"], row["kd"], row["ce"]) for row in rows] == [
        pytest.approx(g, rel=2e-5, abs=2e-6) for g in GOLDEN
    ]


def test_every_option_of_the_template_in_one_sharded_run(arguments, tmp_path):
    """bfloat16, rematerialisation, micro-batches, measured importance, a sparse log; stopped and resumed."""
    options = [
        "--config.run.dtype=bfloat16",
        "--config.teacher.dtype=bfloat16",
        "--config.run.remat=layer",
        "--config.optim.micro_batches=2",
        "--config.student.layers=()",
        "--config.student.keep=3",
        "--config.run.log_every=2",
        "--config.run.mesh.data=4",
        "--config.run.mesh.model=2",
        "--config.objective.kd.divergence=generalized_jsd(beta=0.3)",
    ]
    workdir = tmp_path / "template"
    first = [*arguments, *options, "--config.run.steps=4"]
    result = jaxkd("train", "--workdir", str(workdir), *first, devices=8)
    assert result.returncode == 0, result.stderr
    assert "3 of 4 layers" in result.stdout
    assert len(json.loads((workdir / "run.json").read_text())["student"]["kept_layers"]) == 3
    longer = [*arguments, *options, "--config.run.steps=6"]
    result = jaxkd("train", "--workdir", str(workdir), *longer, "--accept-changes", devices=8)
    assert result.returncode == 0, result.stderr
    assert "changed: run.steps: 4 -> 6" in result.stdout
    assert [row["step"] for row in lines(workdir / "metrics.jsonl")] == [2, 4, 6]
    # Looked at on a machine without that mesh:
    result = jaxkd("evaluate", "--workdir", str(workdir))
    assert result.returncode == 0, result.stderr


def test_a_student_of_random_weights(arguments, tmp_path):
    shape = {"vocab": 257, "embed": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 32}
    options = [f"--config.student.shape.{key}={value}" for key, value in shape.items()]
    options += ["--config.student.path=random", "--config.student.layers=()", "--config.run.steps=2"]
    result = jaxkd("train", "--workdir", str(tmp_path / "random"), *arguments, *options)
    assert result.returncode == 0, result.stderr
    assert "student: random, 1 layers" in result.stdout


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(arguments, tmp_path):
    workdir = tmp_path / "diverged"
    more = ["--config.optim.lr.peak=1e30", "--config.optim.clip=0.0", "--config.optim.weight_decay=1e20"]
    result = jaxkd("train", "--workdir", str(workdir), *arguments, *more)
    assert result.returncode == 1
    assert "is nan at step" in result.stderr or "is inf at step" in result.stderr
    assert "Traceback" not in result.stderr
    for path in (workdir / "checkpoints").glob("[0-9]*"):
        state, _ = final_state(workdir, int(path.name))
        assert all(np.isfinite(np.frombuffer(b, np.float32)).all() for key, b in state.items() if "student" in key)
