"""The report: one file that needs nothing else, tells the run's numbers, and survives incomplete runs."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxkd.report import charts
from jaxkd.report import run as report

CONFIG = {
    "student": {"layers": 15},
    "teacher": {"path": "smollm2"},
    "objective": {"kd": {"weight": 0.2}, "ce": {"weight": 1.0}},
    "data": {"domains": ["code", "math"]},
    "optim": {"lr": {"peak": 3e-4}},
    "run": {"steps": 60},
}
RUN = {
    "command": "jaxkd train --config configs/quickstart.py",
    "versions": {"jaxkd": "0.1.0", "python": "3.11.7", "jax": "0.10.0"},
    "devices": "1 x cpu",
    "mesh": {"data": 1, "model": 1},
    "teacher": {"path": "smollm2", "parameters": 134_515_008, "layers": 30},
    "student": {"parameters": 81_400_000, "layers": 15, "kept_layers": [0, 1, 2]},
    "domains": [
        {"name": "code", "train_rows": 3001, "valid_rows": 61, "documents": 512, "duplicates": 7},
        {"name": "math", "train_rows": 4002, "valid_rows": 62, "documents": 513, "duplicates": 8},
    ],
    "sharding_notes": ["vocab is replicated"],
    "git": "a2481da",
}


def step(index: int, **changes) -> dict:
    row = {"step": index, "loss": 5.0 - index / 100, "kd": 2.0 - index / 100, "ce": 4.5 - index / 100}
    row |= {
        "kd/code": 1.5,
        "kd/math": 2.5,
        "grad_norm": 1.25,
        "lr": 3e-4 * index / 60,
        "tokens": 1024 * index,
    }
    return row | {"tokens_per_s": 512.0, "step_s": 2.0} | changes


def evaluation(index: int, student: float, gap: float | None) -> list[dict]:
    numbers = {
        "step": index,
        "student_nats": student,
        "teacher_nats": 3.125,
        "student_bits_per_byte": student / 3,
    }
    numbers |= {"teacher_bits_per_byte": 1.04, "kl": student - 3.5, "agreement": 0.4, "gap_closed": gap}
    return [numbers | {"domain": name, "tokens": 2048} for name in ("code", "math", "mean")]


STEPS = [step(index) for index in range(1, 61)]
EVALS = evaluation(0, 6.071, None) + evaluation(60, 4.352, 0.5835)


def workdir(tmp_path: Path, *, config=CONFIG, run=RUN, metrics=STEPS, evals=EVALS) -> Path:
    place = tmp_path / "run-1"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    (place / "run.json").write_text(json.dumps(run))
    for name, rows in (("metrics", metrics), ("evals", evals)):
        if rows is not None:
            (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def page_of(place: Path) -> str:
    return report.write(place).read_text(encoding="utf-8")


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


def test_page_is_whole_and_needs_nothing_else(tmp_path):
    place = workdir(tmp_path)
    text = page_of(place)
    tags = Reader(text).tags
    assert {"html", "style", "svg", "table", "pre"} <= {tag for tag, _ in tags}
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in tags}
    assert not {"src", "href", "srcset", "xlink:href", "onclick", "onload"} & {a for _, found in tags for a in found}
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", text)
    assert "prefers-color-scheme: dark" in text
    assert sorted(p.name for p in place.iterdir()) == [
        "config.json", "evals.jsonl", "metrics.jsonl", "report.html", "run.json",
    ]  # fmt: skip


def test_numbers_appear(tmp_path):
    text = page_of(workdir(tmp_path))
    lead = re.search(r'<p class="lead">(.*?)</p>', text).group(1)
    for part in (
        "60 steps",
        "61.4k tokens",
        "fell from 6.071 to 4.352",
        "3.125",
        "58.4 %",
        "2.571 to 0.852",
        "40.0 %",
    ):
        assert part in lead
    for part in (
        "134.5M parameters",
        "1.65 times fewer",
        "0, 1, 2",
        "1 x cpu",
        "data 1 x model 1",
        "a2481da",
    ):
        assert part in text
    for part in (
        "jax 0.10.0",
        "vocab is replicated",
        RUN["command"],
        "3,001",
        "7,003",
        "512 tokens per second",
    ):
        assert part in text
    for part in (
        "<th>lr.peak</th><td>0.0003</td>",
        "<th>kd.weight</th><td>0.2</td>",
        "step 0 → step 60",
        "2,048",
    ):
        assert part in text
    for title in (
        "Loss and its terms",
        "kd by domain",
        "Learning rate",
        "Gradient norm",
        "Speed",
        "KL(teacher || student)",
    ):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "ce by domain" not in text  # the metrics have no ce/DOMAIN
    assert "student\nstep 60: 4.352 nats per token</title>" in text


def test_terms_are_those_of_the_objective(tmp_path):
    metrics = [{"step": s, "loss": 3.0, "rkl": 1.0, "ce": 2.0} for s in (1, 2)]
    text = page_of(workdir(tmp_path, config={"objective": {"rkl": 1.0, "hid": 0.1}}, metrics=metrics))
    assert 'aria-label="Loss and its terms: loss, rkl over steps"' in text


def test_a_rise_is_called_a_rise(tmp_path):
    evals = evaluation(0, 4.0, None) + evaluation(60, 5.0, -1.1428)
    text = page_of(workdir(tmp_path, evals=evals))
    assert "rose from 4.000 to 5.000" in text
    assert "−114.3 %" in text


def test_text_is_escaped(tmp_path):
    nasty = "<script>alert('x')</script>&\""
    run = RUN | {"command": nasty, "git": nasty, "sharding_notes": [nasty], "versions": {"jaxkd": nasty}}
    run["domains"] = [{"name": nasty, "train_rows": 1, "valid_rows": 1, "documents": 1, "duplicates": 0}]
    evals = [row | {"domain": nasty} if row["domain"] == "code" else row for row in EVALS]
    metrics = [row | {f"kd/{nasty}": 1.0} for row in STEPS]
    text = page_of(workdir(tmp_path, config={nasty: {nasty: nasty}, **CONFIG}, run=run, metrics=metrics, evals=evals))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    Reader(text)


@pytest.mark.parametrize("metrics", [None, [], STEPS[:1], [{"step": 3}], [step(1, loss=None, lr="fast")]])
@pytest.mark.parametrize("evals", [None, [], EVALS[:3], EVALS[:2]])
def test_incomplete_runs_still_make_a_page(tmp_path, metrics, evals):
    if metrics is None and evals is None:
        return
    text = page_of(workdir(tmp_path, metrics=metrics, evals=evals))
    Reader(text)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<style>.*?</style>", "", text, flags=re.S))
    if not metrics:
        assert "No training step was logged" in text
    if not evals or evals == EVALS[:2]:
        assert "no evaluation was recorded" in text
    elif evals == EVALS[:3]:
        assert "At step 0" in text


def test_bare_run_file(tmp_path):
    Reader(page_of(workdir(tmp_path, config={}, run={})))


def test_values_that_are_not_finite_are_told_and_break_the_curve(tmp_path):
    metrics = [*STEPS[:30], *(step(i, loss=math.nan, grad_norm=math.inf) for i in range(31, 41)), *STEPS[40:]]
    text = page_of(workdir(tmp_path, metrics=metrics))
    assert "10 of 60 logged steps" in text
    assert "first at step 31" in text
    assert re.search(r' d="M[^"]*M', text.split("<figcaption>Loss and its terms")[1].split("</figure>")[0])
    assert "NaN" not in text
    assert "10 of" not in page_of(workdir(tmp_path))


def test_latest_line_of_a_step_counts(tmp_path):
    text = page_of(workdir(tmp_path, evals=EVALS + evaluation(60, 4.111, 0.6)))
    assert "to 4.111" in text
    assert "4.352" not in text


def test_cut_last_line_is_left_out_and_a_broken_one_named(tmp_path):
    place = workdir(tmp_path)
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    report.write(place)
    with (place / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 61"):
        report.write(place)
    (place / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1"):
        report.write(place)


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_missing_file_is_named_with_the_command_that_makes_it(tmp_path, name):
    place = workdir(tmp_path)
    (place / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {name} in .*jaxkd train --config=CONFIG --workdir") as error:
        report.write(place)
    assert "\n" not in str(error.value)
    (place / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        report.write(place)


def test_neither_metrics_nor_evaluations(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        report.write(workdir(tmp_path, metrics=None, evals=None))


def test_long_runs_stay_small(tmp_path):
    target = report.write(workdir(tmp_path, metrics=[step(index) for index in range(1, 20_001)]))
    assert target.stat().st_size < 600_000


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (3.1, 6.05, [3, 4, 5, 6, 7]),
        (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
        (-2.5, 2.5, [-4, -2, 0, 2, 4]),
        (0, 90_000, [0, 25_000, 50_000, 75_000, 100_000]),
    ],
)
def test_ticks(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_ticks_of_steps_are_whole():
    assert charts.ticks(0, 3, 6, whole=True) == [0, 1, 2, 3]


def test_tick_labels_agree_in_decimals():
    assert charts.tick_labels([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert charts.tick_labels([0, 1e-4, 2e-4]) == ["0", "1e-4", "2e-4"]
    assert charts.tick_labels([0, 25_000, 50_000]) == ["0", "25k", "50k"]


@pytest.mark.parametrize(("low", "high"), [(0.7, 45.0), (1.0, 10.0), (1e-3, 1e6), (2.0, 3.0)])
def test_log_ticks_hold_the_range(low, high):
    values = charts.log_ticks(low, high)
    assert values == sorted(values)
    assert values[0] <= low * 1.001
    assert values[-1] >= high * 0.999
    assert 2 <= len(values) <= 10


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1.23456, "1.235"), (134_515_008, "134.5M"), (12_288, "12.29k"), (3e-4, "3e-4"),
        (-0.5, "−0.5000"),
        (2, "2"), (1024, "1024"), (math.nan, "–"), (None, "–"), (-math.inf, "−∞"), (1e20, "1.000e+20"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert charts.number(value) == text


def test_smooth_keeps_the_mean_and_the_gaps():
    assert charts.smooth([2.0] * 9, 5) == pytest.approx([2.0] * 9)
    smoothed = charts.smooth([1.0, math.nan, 3.0], 3)
    assert smoothed[0] == 1.0
    assert math.isnan(smoothed[1])
    assert len(charts.smooth([1.0, 2.0], 10)) == 2
