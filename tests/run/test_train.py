"""Whole runs: what they write, refuse and hand on."""

import json
import re
import shutil

import numpy as np
import pytest
from harness import fails, here, jaxkd, lines, logged, succeeds

from jaxkd.report import records

GOLDEN = [  # loss, kd, ce of the first five steps of the tiny recipe on the two made-up domains
    (5.51109, 0.000799, 5.51069),
    (5.20596, 0.008096, 5.20191),
    (4.74463, 0.034037, 4.72761),
    (4.31450, 0.097697, 4.26565),
    (4.03709, 0.210147, 3.93202),
]


def test_a_run_writes_what_it_promises_and_the_same_numbers_as_ever(undisturbed):
    """If GOLDEN moves on purpose, say why in the commit and write the new numbers down; otherwise find out why."""
    rows = lines(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"loss", "kd", "ce", "kd/alpha", "lr", "grad_norm", "tokens", "tokens_per_s"} <= set(rows[0])
    assert rows[-1]["tokens"] > rows[0]["tokens"] * 8
    evaluations = lines(undisturbed / "evals.jsonl")
    assert [(row["step"], row["domain"]) for row in evaluations] == [
        (step, domain) for step in (0, 6, 12) for domain in ("alpha", "beta", "mean")
    ]
    expected = "step domain student_nats teacher_nats student_bits_per_byte teacher_bits_per_byte kl agreement"
    assert list(evaluations[0]) == [*expected.split(), "student_ece", "teacher_ece", "gap_closed", "tokens"]
    last = evaluations[-1]
    assert last["student_nats"] < evaluations[2]["student_nats"] - 0.5
    assert last["teacher_nats"] == evaluations[2]["teacher_nats"]
    run = records.read_run(undisturbed)
    assert run.student.kept_layers == (0, 3)
    assert run.command.startswith("jaxkd train --workdir")
    assert {"run.steps", "optim.lr.peak"} <= set(run.changed)
    page = (undisturbed / "report.html").read_text()
    assert "<th>teacher</th>" in page
    assert "times fewer" in page
    tiles = page.partition('<dl class="tiles">')[2].partition("</dl>")[0]
    assert len(re.findall(r"<dd>\d", tiles)) >= 4  # a dash is a number that is not there; perhaps no gap was closed
    assert "tokens per second" in page
    assert "<h2>Wall clock" in page
    assert list((undisturbed / "tensorboard").iterdir())
    # Bits per byte.
    row = lines(undisturbed / "evals.jsonl")[0]
    # Equal where no document ends in the held-out rows, but for the last digit of a float.
    assert 1 - 1e-12 < row["student_bits_per_byte"] * np.log(2) / row["student_nats"] < 1.05
    rows = lines(undisturbed / "metrics.jsonl")[:5]
    assert [(row["loss"], row["kd"], row["ce"]) for row in rows] == [
        pytest.approx(g, rel=2e-5, abs=2e-6) for g in GOLDEN
    ]


def test_the_finished_command_repeated_changes_nothing(undisturbed, arguments, tmp_path):
    before = (undisturbed / "metrics.jsonl").read_bytes(), (undisturbed / "evals.jsonl").read_bytes()
    output = succeeds("train", "--workdir", str(undisturbed), *arguments)
    assert "mean" in output
    assert ((undisturbed / "metrics.jsonl").read_bytes(), (undisturbed / "evals.jsonl").read_bytes()) == before
    rows = (undisturbed / "evals.jsonl").read_bytes()
    output = succeeds("evaluate", "--workdir", str(undisturbed))
    assert output.startswith("step 12 of ")
    mean = lines(undisturbed / "evals.jsonl")[-1]
    assert f"{mean['student_nats']:.3f}" in output
    assert (undisturbed / "evals.jsonl").read_bytes() == rows  # the step is there already
    succeeds("export", "--workdir", str(undisturbed), "--output", str(tmp_path / "student"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in (tmp_path / "student").iterdir()
    }


def test_torn_state_files_do_not_end_a_run(undisturbed, arguments, tmp_path):
    """Emptied by a full disk or cut short by a power cut, beside whole checkpoints."""
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    config = (workdir / "config.json").read_text()
    for name, text in (("run.json", ""), ("config.json", ""), ("config.json", config[:99])):
        (workdir / name).write_text(text)
        result = here("train", "--workdir", str(workdir), *arguments)
        assert result.returncode == 0, result.stderr
        assert str(workdir / name) in result.stdout + result.stderr
        assert "resuming at step 12" in result.stdout
    assert (workdir / "config.json").read_text() == config
    assert json.loads((workdir / "run.json").read_text())["command"].startswith("jaxkd train")


@pytest.mark.slow
def test_another_mesh_gives_the_same_rows_and_nearly_the_same_losses(undisturbed, arguments, tmp_path):
    workdir = tmp_path / "sharded"
    options = ["--config.run.mesh.data=4", "--config.run.mesh.model=2"]
    succeeds("train", "--workdir", str(workdir), *arguments, *options)
    pairs = list(zip(logged(workdir), logged(undisturbed), strict=True))
    assert all(a["tokens"] == b["tokens"] for a, b in pairs)
    # Adam magnifies rounding; the first steps show that rows and losses are the same.
    for sharded, single in pairs[:3]:
        assert sharded["loss"] == pytest.approx(single["loss"], rel=1e-4)


def test_a_changed_config_is_refused_unless_told(undisturbed, arguments, tmp_path):
    order = here("train", "--workdir", str(undisturbed), *arguments, "--config.data.interval=4", "--accept-changes")
    assert order.returncode == 1
    assert "data.interval" in order.stderr
    changed = [*arguments, "--config.optim.lr.peak=1e-3"]
    result = here("train", "--workdir", str(undisturbed), *changed)
    assert result.returncode == 1
    assert "holds another experiment: optim.lr.peak: 0.01 -> 0.001" in result.stderr
    assert result.stderr.count("\n") == 1
    before = (undisturbed / "config.json").read_bytes()
    succeeds("train", "--workdir", str(undisturbed), *changed, "--accept-changes")
    (undisturbed / "config.json").write_bytes(before)


def test_an_export_goes_to_no_bucket(undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "gs://bucket/student" in fails("export", "--workdir", str(undisturbed), "--output", "gs://bucket/student")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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
    output = succeeds("train", "--workdir", str(workdir), *first)
    assert "3 of 4 layers" in output
    assert len(json.loads((workdir / "run.json").read_text())["student"]["kept_layers"]) == 3
    longer = [*arguments, *options, "--config.run.steps=6"]
    output = succeeds("train", "--workdir", str(workdir), *longer, "--accept-changes")
    assert "changed: run.steps: 4 -> 6" in output
    assert [row["step"] for row in lines(workdir / "metrics.jsonl")] == [2, 4, 6]
    # On a machine without that mesh:
    result = jaxkd("evaluate", "--workdir", str(workdir))
    assert result.returncode == 0, result.stderr
