"""`jaxkd evaluate`: a run's checkpoint or any model, on held-out rows or on text of the user's own."""

import pytest
from harness import fails, here, succeeds, write_domain


def scored(*arguments):
    """The first line, and the table's mean row."""
    title, *_, mean = succeeds("evaluate", *arguments).strip().splitlines()
    return title, mean.split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_domain(tmp_path_factory.mktemp("own") / "own text.jsonl", 7, 9)


def test_a_run_on_text_of_ones_own(undisturbed, text):
    evaluations = (undisturbed / "evals.jsonl").read_bytes()
    run = ["--workdir", str(undisturbed), "--data", str(text)]
    title, mean = scored(*run, "--step", "12")
    assert title == f"step 12 of {undisturbed}"
    _, fewer = scored(*run, "--config.data.valid_rows=2")
    assert int(fewer[1]) < int(mean[1].replace(",", ""))
    assert (undisturbed / "evals.jsonl").read_bytes() == evaluations


def test_a_model_against_a_teacher(undisturbed, text, tmp_path):
    student = str(tmp_path / "student")
    assert here("export", "--workdir", str(undisturbed), "--output", student).returncode == 0
    same_rows = ["--data", f"mine={text}", "--config.data.length=64"]
    title, mean = scored("--model", student, "--teacher", student, *same_rows)
    assert title == f"{student} against {student}"
    assert mean[2] == mean[4]  # nats per token
    assert mean[6:8] == ["0.000", "100.0%"]  # KL, agreement
    _, run = scored("--workdir", str(undisturbed), *same_rows)
    assert (run[1], run[4]) == (mean[1], mean[4])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--model", "x", "--data", "y"], "--teacher"),
        (["--model", "x", "--teacher", "y"], "--data"),
        (["--model", "x", "--teacher", "y", "--data", "z", "--step", "3"], "--step"),
        (["--model", "x", "--teacher", "y", "--data", "z", "z"], "NAME=z"),
        (["--model", "x", "--teacher", "y", "--data", "z"], "x"),
    ],
)
def test_errors_name_what_is_missing(arguments, key):
    assert key in fails("evaluate", *arguments)
