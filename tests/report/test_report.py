"""The report: one file that needs nothing else, tells the run's numbers, and survives incomplete runs."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxkd.report import records
from jaxkd.report import run as report
from jaxkd.report.records import DomainInfo, ModelInfo, RunInfo
from jaxkd.runtime import files

CONFIG = {
    "student": {"layers": 15},
    "teacher": {"path": "smollm2"},
    "objective": {"kd": {"weight": 0.2}, "ce": {"weight": 1.0}},
    "data": {"domains": ["code", "math"]},
    "optim": {"lr": {"peak": 3e-4}},
    "run": {"steps": 60},
}
RUN = RunInfo(
    command="jaxkd train --config configs/quickstart.py",
    versions={"jaxkd": "0.1.0", "python": "3.11.7", "jax": "0.10.0"},
    git="a2481da",
    devices="1 x cpu",
    mesh={"data": 1, "model": 1},
    sharding_notes=("vocab is replicated",),
    teachers={"teacher": ModelInfo("smollm2", 134_515_008, 30, 538_060_032)},
    student=ModelInfo("teacher", 81_400_000, 15, kept_layers=(0, 1, 2)),
    domains=(
        DomainInfo("code", train_rows=3001, valid_rows=61, documents=512, duplicates=7),
        DomainInfo("math", train_rows=4002, valid_rows=62, documents=513, duplicates=8),
    ),
    changed=("student.layers", "optim.lr.peak"),
)


def step(index: int, **changes) -> dict:
    values = {"loss": 5.0 - index / 100, "kd": 2.0 - index / 100, "ce": 4.5 - index / 100}
    values |= {"kd/code": 1.5, "kd/math": 2.5, "grad_norm": 1.25, "lr": 3e-4 * index / 60}
    return records.training(index, values, tokens=1024 * index, tokens_per_s=512.0, step_s=2.0) | changes


def evaluation(index: int, student: float, gap: float | None) -> list[dict]:
    figures = (student, 3.125, student / 3, 1.04, student - 3.5, 0.4, 0.05, 0.04, gap, 2048)
    return [records.Evaluation(index, name, *figures)._asdict() for name in ("code", "math", "mean")]


STEPS = [step(index) for index in range(1, 61)]
EVALS = evaluation(0, 6.071, None) + evaluation(60, 4.352, 0.5835)


def workdir(tmp_path: Path, *, config=CONFIG, run=RUN, metrics=STEPS, evals=EVALS) -> Path:
    directory = tmp_path / "run-1"
    directory.mkdir(exist_ok=True)
    files.write_json(directory / "config.json", config)
    records.write_run(directory, run)
    for name, rows in (("metrics", metrics), ("evals", evals)):
        if rows is not None:
            files.write_jsonl(directory / f"{name}.jsonl", rows)
    return directory


def page_of(directory: Path) -> str:
    return report.write(directory).read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects tags and attributes, and holds that every tag is closed in its order."""

    VOID = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_tells_the_numbers(tmp_path):
    directory = workdir(tmp_path)
    text = page_of(directory)
    tags = Reader(text).tags
    assert {"html", "style", "svg", "table", "pre"} <= {tag for tag, _ in tags}
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in tags}
    names = {name for _, attributes in tags for name in attributes}
    assert not {"src", "href", "srcset", "xlink:href", "onclick", "onload"} & names
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", text)
    assert "prefers-color-scheme: dark" in text
    assert sorted(p.name for p in directory.iterdir()) == [
        "config.json", "evals.jsonl", "metrics.jsonl", "report.html", "run.json",
    ]  # fmt: skip
    # Charts show values under the pointer.
    text = page_of(workdir(tmp_path))
    lead = re.search(r'<p class="lead">(.*?)</p>', text).group(1)
    for part in (
        *("60 steps", "61.4k tokens", "fell from 6.071 to 4.352", "3.125", "58.4 %", "2.571 to 0.852", "40.0 %"),
    ):
        assert part in lead
    for part in (
        "<th>teacher</th><td>134.5M parameters, 30 layers, smollm2</td>",
        "<th>student</th><td>81.4M parameters (1.65 times fewer), 15 layers",
        *("0, 1, 2", "1 x cpu", "data 1 x model 1", "a2481da", "jax 0.10.0", "vocab is replicated", RUN.command),
        *("3,001", "7,003", "512 tokens per second", "step 0 → step 60", "2,048"),
    ):
        assert part in text
    for title in (
        *("Loss and its terms", "kd by domain", "Learning rate", "Gradient norm", "Speed", "KL(teacher || student)"),
    ):
        assert f"<figcaption>{title}" in text
    assert "ce by domain" not in text  # the metrics have no ce/DOMAIN
    mean = text[text.index("<figcaption>Mean over domains") :].partition("</figure>")[0]
    column = mean[mean.index("step 60") :].partition("</g></g>")[0]
    assert " student: 4.352<" in column
    assert " teacher: 3.125<" in column
    part = text.partition("<h2>Configuration</h2>")[2]
    # Settings that differ from the defaults come first.
    first, every = part.split("<details>")
    assert re.findall(r"<th>(.*?)</th><td>(.*?)</td>", first) == [("student.layers", "15"), ("optim.lr.peak", "0.0003")]
    assert "<th>kd.weight</th><td>0.2</td>" in every


def test_teachers_terms_rises_repeated_steps_and_long_runs(tmp_path):
    teachers = {"big": ModelInfo("a", 300, 3), "small": ModelInfo("b", 200, 2)}
    text = page_of(workdir(tmp_path, run=RUN._replace(teachers=teachers, student=ModelInfo("", 100, 1))))
    assert "<th>teacher big</th><td>300 parameters" in text
    assert "<th>teacher small</th>" in text
    assert "3.00 times fewer" in text
    metrics = [{"step": s, "loss": 3.0, "rkl": 1.0, "ce": 2.0} for s in (1, 2)]
    text = page_of(workdir(tmp_path, config={"objective": {"rkl": 1.0, "hid": 0.1}}, metrics=metrics))
    assert 'aria-label="Loss and its terms: loss, rkl over steps"' in text
    evals = evaluation(0, 4.0, None) + evaluation(60, 5.0, -1.1428)
    text = page_of(workdir(tmp_path, evals=evals))
    assert "rose from 4.000 to 5.000" in text
    assert "−114.3 %" in text
    text = page_of(workdir(tmp_path, evals=EVALS + evaluation(60, 4.111, 0.6)))
    assert "to 4.111" in text
    assert "4.352" not in text
    target = report.write(workdir(tmp_path, metrics=[step(index) for index in range(1, 20_001)]))
    assert target.stat().st_size < 600_000


def test_the_record_of_a_run_is_read_as_it_was_written(tmp_path):
    records.write_run(tmp_path, RUN)
    assert records.read_run(tmp_path) == RUN
    files.write_json(tmp_path / "run.json", {"command": "train", "added_later": 1, "student": {"kept_layers": None}})
    assert records.read_run(tmp_path) == RunInfo("train")  # of another version
    (tmp_path / "run.json").write_text('{"comm')
    with pytest.raises(files.Torn, match=r"run\.json"):
        records.read_run(tmp_path)


def test_text_is_escaped(tmp_path):
    nasty = "<script>alert('x')</script>&\""
    run = RUN._replace(command=nasty, git=nasty, sharding_notes=(nasty,), versions={"jaxkd": nasty})
    run = run._replace(domains=(DomainInfo(nasty),), teachers={nasty: ModelInfo(nasty)}, changed=(f"{nasty}.{nasty}",))
    evals = [row | {"domain": nasty} if row["domain"] == "code" else row for row in EVALS]
    metrics = [row | {f"kd/{nasty}": 1.0} for row in STEPS]
    text = page_of(workdir(tmp_path, config={nasty: {nasty: nasty}, **CONFIG}, run=run, metrics=metrics, evals=evals))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    Reader(text)


@pytest.mark.parametrize("metrics", [None, [], [{"step": 3}], [step(1, loss=None, lr="fast")]])
@pytest.mark.parametrize("evals", [None, [], EVALS[:3], EVALS[:2]])
def test_incomplete_runs_still_make_a_page(tmp_path, metrics, evals):
    directory = workdir(tmp_path, metrics=metrics, evals=evals, config={}, run=RunInfo())
    if metrics is None and evals is None:
        with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
            report.write(directory)
        return
    text = page_of(directory)
    Reader(text)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<style>.*?</style>", "", text, flags=re.S))
    if not metrics:
        assert "No training step was logged" in text
    if not evals or evals == EVALS[:2]:
        assert "no evaluation was recorded" in text
    elif evals == EVALS[:3]:
        assert "At step 0" in text


def test_values_that_are_not_finite_and_odd_charts(tmp_path):
    metrics = [*STEPS[:30], *(step(i, loss=math.nan, grad_norm=math.inf) for i in range(31, 41)), *STEPS[40:]]
    text = page_of(workdir(tmp_path, metrics=metrics))
    assert "10 of 60 logged steps" in text
    assert "first at step 31" in text
    assert re.search(r' d="M[^"]*M', text.split("<figcaption>Loss and its terms")[1].split("</figure>")[0])
    assert "NaN" not in text
    assert "10 of" not in page_of(workdir(tmp_path))
    for metrics, wide in ((STEPS, 1), ([row | {"mfu": 0.5} for row in STEPS], 0)):
        part = page_of(workdir(tmp_path, metrics=metrics)).partition("<h2>Training</h2>")[2].partition("</section>")[0]
        assert part.count('<div class="row">') == part.count('<div class="alone">') == wide
        assert (part.count("<figure") - wide) % 2 == wide
        assert len(set(re.findall(r'<svg viewBox="0 0 (\d+)', part))) == 1 + wide


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_a_missing_or_damaged_file_is_named(tmp_path, name):
    directory = workdir(tmp_path)
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.*jaxkd train") as error:
        report.write(directory)
    assert "\n" not in str(error.value)
    (directory / name).write_text("{")
    with pytest.raises(files.Torn, match=name):
        report.write(directory)
