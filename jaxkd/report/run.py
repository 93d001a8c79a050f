"""What a run did, as one self-contained HTML file made from the files of its workdir."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkd.report import charts, goodput, mixture, samples
from jaxkd.report.charts import Line, figure, limits, smooth, thin
from jaxkd.report.records import (
    DIAGNOSTICS,
    EVALS,
    MEAN,
    METRICS,
    MIXTURE,
    SAMPLES,
    ModelInfo,
    Row,
    RunInfo,
    by_domain,
    leaves,
    missing,
    read_json,
    read_run,
    value_of,
)
from jaxkd.report.text import count, document, escape, fixed, number, percent, section, table
from jaxkd.runtime import files
from jaxkd.runtime.goodput import FILE


def write(workdir: Path) -> Path:
    """Write WORKDIR/report.html and return its path. Of metrics.jsonl and evals.jsonl one may be missing.

    FileNotFoundError and Torn name the file that is missing or damaged.
    """
    config, info = read_json(workdir, "config.json"), read_run(workdir)
    names = (METRICS, EVALS, MIXTURE, FILE, DIAGNOSTICS, SAMPLES)
    if not any((workdir / name).exists() for name in names[:2]):
        raise missing(workdir, names[0])
    rows = [files.read_jsonl(workdir / name) for name in names]
    target = workdir / "report.html"
    files.write_text(target, page(workdir.resolve().name, config, info, *rows))
    return target


def page(
    title: str,
    config: Row,
    info: RunInfo,
    metrics: Sequence[Row],
    evals: Sequence[Row],
    mixture_rows: Sequence[Row] = (),
    goodput_rows: Sequence[Row] = (),
    diagnostics: Sequence[Row] = (),
    sample_rows: Sequence[Row] = (),
) -> str:
    """The page as text, from the contents of the files."""
    domains = by_domain(evals)
    style = styles(dict.fromkeys([*domains, *(domain.name for domain in info.domains)]))
    last = max((int(row["step"]) for row in [*metrics, *evals]), default=0)
    kind = f"jaxkd {info.versions.get('jaxkd', '')} distillation report"
    return document(
        f"{title}: distillation report",
        charts.STYLE,
        f'<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1>{summary(metrics, domains)}</header>'
        + section("Results", results(domains))
        + section("Evaluation", evaluation_charts(domains))
        + section("Mixture", mixture.section(mixture_rows, evals, last, style))
        + section("The student's own text", samples.page(diagnostics, sample_rows))
        + section("Training", training_charts(config, metrics, style))
        + section("Wall clock", goodput.page(goodput_rows))
        + section("Data", domains_table(info))
        + section("Run", facts(info, metrics))
        + section("Configuration", configuration(config, info.changed)),
    )


def change(rows: Sequence[Row], key: str, show=fixed) -> str:
    """`before → after` of the first and the last evaluation, or one value when there is one."""
    values = [show(value_of(row, key)) for row in ([rows[0], rows[-1]] if len(rows) > 1 else rows)]
    return ' <span class="to">→</span> '.join(values)


def summary(metrics: Sequence[Row], domains: dict[str, list[Row]]) -> str:
    """The key result in one sentence, and the same numbers as tiles."""
    rows = domains.get(MEAN, [])
    steps = max((int(row["step"]) for row in [*metrics, *rows]), default=0)
    tokens = max((value_of(row, "tokens") for row in metrics if "tokens" in row), default=math.nan)
    trained = f"{steps:,} steps" + (f" and {number(tokens, 3)} tokens" if math.isfinite(tokens) else "")
    if not rows:
        return f'<p class="lead">{trained} of training; no evaluation was recorded.</p>'
    first, last = rows[0], rows[-1]
    before, after = value_of(first, "student_nats"), value_of(last, "student_nats")
    teacher, gap = value_of(last, "teacher_nats"), value_of(last, "gap_closed")
    kl, agreement = (value_of(first, "kl"), value_of(last, "kl")), percent(value_of(last, "agreement"))
    if len(rows) == 1:
        text = (
            f"At step {int(last['step'])} the student's mean validation loss is {fixed(after)} nats per "
            f"token (teacher {fixed(teacher)}), its KL from it {fixed(kl[1])} nats, and the two agree on "
            f"{agreement} of next tokens; there is no second evaluation yet."
        )
    else:
        verb = lambda a, b: "fell" if b < a else "rose" if b > a else "went"
        closed = f": {percent(gap)} of the gap is closed" if math.isfinite(gap) else ""
        text = (
            f"In {trained} the student's mean validation loss {verb(before, after)} from {fixed(before)} "
            f"to {fixed(after)} nats per token, where the teacher stands at {fixed(teacher)}{closed}; its KL "
            f"from the teacher {verb(*kl)} from {fixed(kl[0])} to {fixed(kl[1])} nats, and the two agree on "
            f"{agreement} of next tokens ({percent(value_of(first, 'agreement'))} at the start)."
        )
    tiles = {
        "student, nats per token": change(rows, "student_nats"),
        "teacher, nats per token": fixed(teacher),
        "gap closed": percent(gap),
        "KL(teacher || student), nats": change(rows, "kl"),
        "top-1 agreement": change(rows, "agreement", percent),
    }
    drawn = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in tiles.items())
    return f'<p class="lead">{text}</p><dl class="tiles">{drawn}</dl>'


def results(domains: dict[str, list[Row]]) -> str:
    """The table of every domain and their mean, from the first evaluation to the last."""
    if not domains:
        return ""
    columns = {
        "student nats": lambda evals: change(evals, "student_nats"),
        "teacher nats": lambda evals: fixed(value_of(evals[-1], "teacher_nats")),
        "gap closed": lambda evals: percent(value_of(evals[-1], "gap_closed")),
        "KL": lambda evals: change(evals, "kl"),
        "agreement": lambda evals: change(evals, "agreement", percent),
        "student bits/byte": lambda evals: change(evals, "student_bits_per_byte"),
        "teacher bits/byte": lambda evals: fixed(value_of(evals[-1], "teacher_bits_per_byte")),
        "tokens": lambda evals: count(value_of(evals[-1], "tokens")),
    }
    rows = [[escape(name), *(show(evals) for show in columns.values())] for name, evals in domains.items()]
    steps = sorted({int(row["step"]) for evals in domains.values() for row in evals})
    span = f"step {steps[0]} → step {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    note = (
        f'<p class="note">{span}, on validation rows. Nats per token and bits per byte: lower is better. KL '
        "is KL(teacher || student) in nats at temperature 1; agreement is how often both put the same token "
        "first. Gap closed is the share of the student's first distance to the teacher, in nats, that is gone.</p>"
    )
    return table(["domain", *columns], rows, last=MEAN in domains) + note


def styles(domains: Iterable[str]) -> dict[str, int]:
    """A domain's colour and marker, the same in every chart; the grey one is the mean's."""
    names = [name for name in domains if name != MEAN]
    return {MEAN: 6} | {name: index if index < 6 else index + 1 for index, name in enumerate(names)}


def evaluation_charts(domains: dict[str, list[Row]]) -> str:
    """The mean and every domain with student and teacher; then gap closed, KL and agreement."""
    if not domains:
        return ""
    style = styles(domains)

    def line(domain: str, key: str, name: str, scale: float = 1.0, dashed: bool = False) -> Line:
        rows = domains[domain]
        y = [scale * value_of(row, key) for row in rows]
        return Line(name, [value_of(row, "step") for row in rows], y, style[domain], dashed)

    pairs = {
        name: [line(name, "student_nats", "student"), line(name, "teacher_nats", "teacher", dashed=True)]
        for name in domains
    }
    shared = limits(v for pair in pairs.values() for one in pair for v in one.y)  # comparable by eye
    drawn = [
        figure("Mean over domains" if name == MEAN else name, pairs[name], unit="nats per token", y_range=shared)
        for name in sorted(pairs, key=lambda name: name != MEAN)
    ]
    for title, key, unit, scale in (
        ("Gap closed", "gap_closed", "%", 100.0),
        ("KL(teacher || student)", "kl", "nats", 1.0),
        ("Top-1 agreement with the teacher", "agreement", "%", 100.0),
    ):
        drawn.append(figure(title, [line(name, key, name, scale) for name in domains], unit=unit, zero=True))
    return charts.grid(drawn)


def series(metrics: Sequence[Row], key: str, name: str, style: int, *, gaps: bool = True) -> Line:
    """One metric over the logged steps, smoothed when there are many; rows without the key are left out."""
    rows = [row for row in metrics if key in row and (gaps or math.isfinite(value_of(row, key)))]
    x, y = thin([value_of(row, "step") for row in rows], [value_of(row, key) for row in rows])
    if len(x) < 24:
        return Line(name, x, y, style)
    return Line(name, x, [float(v) for v in smooth(y, max(5, len(x) // 20))], style, raw=y)


def training_charts(config: Row, metrics: Sequence[Row], style: Mapping[str, int]) -> str:
    """Loss and its terms, each term by domain, learning rate, gradient norm, speed and MFU."""
    if not metrics:
        return '<p class="note">No training step was logged.</p>'
    objective = config.get("objective")
    keys = {key for row in metrics for key in row}
    terms = [key for key in (objective if isinstance(objective, dict) else {}) if key in keys]
    loss = [series(metrics, key, key, style) for style, key in enumerate(["loss", *terms]) if key in keys]
    drawn = [figure("Loss and its terms", loss, unit="nats per token")]
    for term in terms:
        names = [name for name in style if f"{term}/{name}" in keys]
        lines = [series(metrics, f"{term}/{name}", name, style[name], gaps=False) for name in names]
        lines = [line._replace(raw=None) for line in lines]  # faint raw values of many domains hide the curves
        drawn += [figure(f"{term} by domain", lines, unit="nats per token")] if lines else []
    rate = series(metrics, "lr", "learning rate", 0)
    # A schedule is exact: not smoothed.
    drawn.append(figure("Learning rate", [rate._replace(y=rate.raw or rate.y, raw=None)], zero=True))
    drawn.append(figure("Gradient norm", [series(metrics, "grad_norm", "gradient norm", 1)], zero=True, log=True))
    drawn.append(figure("Speed", [series(metrics, "tokens_per_s", "speed", 2)], unit="tokens per second", zero=True))
    drawn += [figure("MFU", [series(metrics, "mfu", "MFU", 3)], zero=True)] if "mfu" in keys else []
    note = '<p class="note">Bold lines are moving averages, faint ones the logged values.</p>'
    warning = broken(metrics, ["loss", *terms, "grad_norm"])
    return warning + charts.grid(drawn) + (note if any(line.raw for line in loss) else "")


def broken(metrics: Sequence[Row], keys: Sequence[str]) -> str:
    """A warning that counts rows with values that are not finite, and skipped updates."""
    steps = [int(r["step"]) for r in metrics if any(k in r and not math.isfinite(value_of(r, k)) for k in keys)]
    skipped = [int(r["step"]) for r in metrics if "skipped" in r]
    text = ""
    if steps:
        text += (
            f"{len(steps)} of {len(metrics)} logged steps have a loss, term or gradient norm that is not a finite "
            f"number, first at step {steps[0]}; the curves break there. "
        )
    if skipped:
        text += f"{len(skipped)} updates were skipped, first at step {skipped[0]}; metrics.jsonl has their rows."
    return f'<p class="warning">{text.strip()}</p>' if text else ""


def domains_table(info: RunInfo) -> str:
    """Rows, documents and duplicates by domain, and their sum."""
    keys = ("train_rows", "valid_rows", "documents", "duplicates")
    rows = [[escape(d.name), *(count(getattr(d, key)) for key in keys)] for d in info.domains]
    if len(rows) > 1:
        rows.append(["total", *(count(sum(getattr(d, key) for d in info.domains)) for key in keys)])
    head = ["domain", "training rows", "validation rows", "documents", "duplicates removed"]
    return table(head, rows, last=len(rows) > 1) if rows else ""


def facts(info: RunInfo, metrics: Sequence[Row]) -> str:
    """The command to copy, the models, and what the run used."""

    def model(m: ModelInfo, more: str = "") -> str:
        return f"{number(m.parameters)} parameters{more}, {m.layers} layers{m.path and ', '}{m.path}"

    student = info.student
    largest = max((m.parameters for m in info.teachers.values()), default=0)
    smaller = f" ({largest / student.parameters:.2f} times fewer)" if largest > student.parameters > 0 else ""
    rows = [
        *((n if n == "teacher" else f"teacher {n}", model(teacher)) for n, teacher in info.teachers.items()),
        ("student", model(student, smaller) if student.parameters else ""),
        ("kept layers", ", ".join(map(str, student.kept_layers))),
        ("devices", info.devices),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in info.mesh.items())),
        ("speed", pace(metrics)),
        ("commit", info.git or ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in info.versions.items())),
        *(("sharding" if not index else "", note) for index, note in enumerate(info.sharding_notes)),
    ]
    command = f'<pre title="one click selects all">{escape(info.command)}</pre>' if info.command else ""
    return command + key_values((name, value) for name, value in rows if value)


def key_values(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>' if body else ""


def pace(metrics: Sequence[Row]) -> str:
    """Median speed, which compilation and evaluations between steps do not move."""

    parts = []
    for key, show in (
        ("tokens_per_s", lambda speed: f"{number(speed, 3)} tokens per second"),
        ("step_s", lambda seconds: f"{number(seconds, 3)} s per step"),
        ("mfu", lambda mfu: f"MFU {percent(mfu)}"),
    ):
        if values := [v for row in metrics if math.isfinite(v := value_of(row, key))]:
            parts.append(show(statistics.median(values)))
    return ", ".join(parts) + " (medians)" if parts else ""


def value_text(value: Any) -> str:
    """A setting's value as it is read back."""
    return value if isinstance(value, str) and value else json.dumps(value)


def configuration(config: Row, changed: Sequence[str]) -> str:
    """The settings that differ from the defaults, then all of them, a card per block."""
    flat = leaves(config)
    differing = key_values((key, value_text(flat[key])) for key in changed if key in flat)
    cards = []
    for block, value in config.items():
        rows = leaves(value) if isinstance(value, Mapping) else {block: value}
        body = key_values((name, value_text(inner)) for name, inner in rows.items())
        cards.append(f'<div class="card"><h3>{escape(block)}</h3>{body}</div>' if body else "")
    every = f'<div class="cards">{"".join(cards)}</div>' if any(cards) else ""
    if not differing or not every:
        return every
    return f"<h3>Differs from the defaults</h3>{differing}<details><summary>All settings</summary>{every}</details>"
