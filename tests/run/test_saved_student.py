"""A finished run is exported and evaluated from anywhere, once its teacher, cache and first weights are gone."""

import contextlib
import shutil

import pytest
from harness import fails, here, lines, random_params, succeeds, tiny_arguments, write_domain

from jaxkd.data import tokenize
from jaxkd.models.export import export
from jaxkd.models.transformer import Config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a run of relative paths: its teacher, a cache, rows and text lie beside it."""
    root, own = tmp_path_factory.mktemp("trained"), tokenize.byte_tokenizer()
    config = Config(257, 32, 2, 4, 2, 8, 64, max_length=128)
    files = {"tokenizer_json": own.json, "generation": own.generation, "card": {}}
    export(root / "teacher", config, random_params(config, 0), **files)
    write_domain(root / "alpha.jsonl", 0)
    arguments = tiny_arguments(
        {"alpha": "alpha.jsonl"}, "rows", "--config.teacher.path=teacher", "--config.student.layers=(1,)",
        "--config.teacher.signal=hidden", "--config.teacher.cache=cache", "--config.run.steps=2",
        "--config.data.tokenizer=teacher",
    )  # fmt: skip
    with contextlib.chdir(root):
        succeeds("cache", *arguments)
        succeeds("train", "--workdir", "run", "--no-check", *arguments)
    return root, arguments


def test_a_finished_run_stands_alone(trained, tmp_path, monkeypatch):
    root, arguments = trained
    run = str(root / "run")
    monkeypatch.chdir(tmp_path)
    whole = succeeds("evaluate", "--workdir", run)
    succeeds("export", "--workdir", run, "--output", "before")

    record = root / "run" / "student" / "jaxkd.json"
    text = record.read_text()
    record.write_text(text[:20])
    assert str(record) in here("export", "--workdir", run, "--output", "torn").stderr
    record.write_text(text)

    shutil.rmtree(root / "cache")  # the teacher runs instead
    assert succeeds("evaluate", "--workdir", run) == whole

    logged = (root / "run" / "evals.jsonl").read_bytes()
    shutil.rmtree(root / "teacher")
    title, *_, mean = succeeds("evaluate", "--workdir", run).splitlines()
    assert "teacher" in title
    row = lines(root / "run" / "evals.jsonl")[-1]
    assert f"{row['student_nats']:.3f}" in mean
    assert f"{row['student_bits_per_byte']:.3f}" in mean
    assert f"{row['teacher_nats']:.3f}" not in mean
    assert (root / "run" / "evals.jsonl").read_bytes() == logged

    succeeds("export", "--workdir", run, "--output", "after")
    for file in (tmp_path / "before").iterdir():
        if file.name not in ("jaxkd.json", "README.md"):  # which name the directory
            assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes(), file.name
    succeeds("report", "--workdir", run)
    monkeypatch.chdir(root)
    assert "teacher" in fails("train", "--workdir", "run", *arguments)


def test_the_tokenizers_that_are_kept_are_the_same(tmp_path):
    own = tokenize.byte_tokenizer()
    own.save(tmp_path)
    again = tokenize.from_directory(tmp_path)
    assert (again.fingerprint, again.start, again.end, again.vocab) == (own.fingerprint, own.start, own.end, own.vocab)
    assert again.generation == own.generation
