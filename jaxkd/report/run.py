"""What a run did, as one self-contained HTML file made from the files of its work directory."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxkd.report import goodput
from jaxkd.report import mixture as mixture_page
from jaxkd.report.charts import STYLE, Line, count, escape, figure, fixed, limits, number, percent, smooth, table, thin
from jaxkd.runtime import files

Row = dict[str, Any]
MEAN = "mean"
PANEL = (340, 220)  # the drawing of a chart that stands with two others in a row


def write(workdir: Path) -> Path:
    """Make `WORKDIR/report.html` of config.json, run.json and the .jsonl files; return its path.

    Args: workdir: of one run. metrics.jsonl or evals.jsonl may be missing: the page then says so.
    Errors: FileNotFoundError names the file that is missing, ValueError the line that is not JSON.
    """
    workdir = Path(workdir)
    config, run = read_json(workdir, "config.json"), read_json(workdir, "run.json")
    names = ("metrics.jsonl", "evals.jsonl", "mixture.jsonl", goodput.FILE)
    if not any((workdir / name).exists() for name in names[:2]):
        raise FileNotFoundError(missing(workdir, names[0]))
    rows = [files.read_jsonl(workdir / name) for name in names]
    target = workdir / "report.html"
    files.write_text(target, page(workdir.resolve().name, config, run, *rows))
    return target


def missing(workdir: Path, name: str) -> str:
    """The line that says which command makes a file that is not there."""
    return f"no {name} in {workdir}: `jaxkd train --config=CONFIG --workdir={workdir}` makes it"


def read_json(workdir: Path, name: str) -> Row:
    """One JSON object of the workdir. Errors: FileNotFoundError, ValueError with the file's name."""
    try:
        return files.read_json(workdir / name)
    except FileNotFoundError:
        raise FileNotFoundError(missing(workdir, name)) from None


def value_of(row: Row, key: str) -> float:
    """The number under `key`, NaN where there is none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def by_domain(evals: Iterable[Row]) -> dict[str, list[Row]]:
    """Domain -> its evaluations by step, the mean last; where a step occurs twice, the later line counts."""
    found: dict[str, dict[int, Row]] = {}
    for row in evals:
        found.setdefault(str(row.get("domain", "?")), {})[int(row["step"])] = row
    names = [*(name for name in found if name != MEAN), *(name for name in found if name == MEAN)]
    return {name: [found[name][step] for step in sorted(found[name])] for name in names}


def change(rows: Sequence[Row], key: str, show=fixed) -> str:
    """`before → after` of the first and the last evaluation, or one value when there is one."""
    values = [show(value_of(row, key)) for row in ([rows[0], rows[-1]] if len(rows) > 1 else rows)]
    return ' <span class="to">→</span> '.join(values)


def section(title: str, *parts: str) -> str:
    """A headed part of the page; nothing at all when its parts are empty."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


# --- the parts of the page ---


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
    kl = value_of(first, "kl"), value_of(last, "kl")
    if len(rows) == 1:
        text = (
            f"At step {int(last['step'])} the student's mean validation loss is {fixed(after)} nats per "
            f"token (teacher {fixed(teacher)}), its KL from it {fixed(kl[1])} nats, and the two agree on "
            f"{percent(value_of(last, 'agreement'))} of next tokens; there is no second evaluation yet."
        )
    else:
        closed = f": {percent(gap)} of the gap is closed" if math.isfinite(gap) else ""
        text = (
            f"In {trained} the student's mean validation loss {went(before, after)} from {fixed(before)} "
            f"to {fixed(after)} nats per token, where the teacher stands at {fixed(teacher)}{closed}; its KL "
            f"from the teacher {went(*kl)} from {fixed(kl[0])} to {fixed(kl[1])} nats, and the two agree on "
            f"{percent(value_of(last, 'agreement'))} of next tokens "
            f"({percent(value_of(first, 'agreement'))} at the start)."
        )
    tiles = [
        ("student, nats per token", change(rows, "student_nats")),
        ("teacher, nats per token", fixed(teacher)),
        ("gap closed", percent(gap)),
        ("KL(teacher || student), nats", change(rows, "kl")),
        ("top-1 agreement", change(rows, "agreement", percent)),
    ]
    drawn = "".join(f"<div><dt>{escape(name)}</dt><dd>{shown}</dd></div>" for name, shown in tiles)
    return f'<p class="lead">{text}</p><dl class="tiles">{drawn}</dl>'


def went(before: float, after: float) -> str:
    """The verb that tells the direction."""
    return "fell" if after < before else "rose" if after > before else "went"


def results(domains: dict[str, list[Row]]) -> str:
    """The final table: every domain and their mean, from the first evaluation to the last."""
    if not domains:
        return ""
    head = ["domain", "student nats", "teacher nats", "gap closed", "KL", "agreement", "student bits/byte"]
    rows = [
        [
            escape(name),
            change(found, "student_nats"),
            fixed(value_of(found[-1], "teacher_nats")),
            percent(value_of(found[-1], "gap_closed")),
            change(found, "kl"),
            change(found, "agreement", percent),
            change(found, "student_bits_per_byte"),
            fixed(value_of(found[-1], "teacher_bits_per_byte")),
            count(value_of(found[-1], "tokens")),
        ]
        for name, found in domains.items()
    ]
    steps = sorted({int(row["step"]) for found in domains.values() for row in found})
    span = f"step {steps[0]} → step {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    note = (
        f'<p class="note">{span}, on validation rows. Nats per token and bits per byte: lower is better. KL '
        "is KL(teacher || student) in nats at temperature 1; agreement is how often both put the same token "
        "first. Gap closed is how much of the first distance to the teacher's nats is gone at the end.</p>"
    )
    return table([*head, "teacher bits/byte", "tokens"], rows, last=MEAN in domains) + note


def styles(domains: Iterable[str]) -> dict[str, int]:
    """A domain's colour and marker, the same in every chart; the grey one is kept for the mean."""
    names = [name for name in domains if name != MEAN]
    return {MEAN: 6} | {name: index if index < 6 else index + 1 for index, name in enumerate(names)}


def evaluation_charts(domains: dict[str, list[Row]]) -> str:
    """The mean and the gap closed, a panel per domain with student and teacher, then KL and agreement."""
    if not domains:
        return ""
    style = styles(domains)

    def line(domain: str, key: str, name: str, scale: float = 1.0, dashed: bool = False) -> Line:
        rows = domains[domain]
        y = [scale * value_of(row, key) for row in rows]
        return Line(name, [value_of(row, "step") for row in rows], y, style[domain], dashed)

    def together(title: str, key: str, unit: str, scale: float = 1.0) -> str:
        return figure(title, [line(name, key, name, scale) for name in domains], unit=unit, zero=True)

    pairs = {
        name: [line(name, "student_nats", "student"), line(name, "teacher_nats", "teacher", dashed=True)]
        for name in domains
    }
    shared = limits(v for pair in pairs.values() for one in pair for v in one.y)  # comparable by eye
    mean = pairs.pop(MEAN, None)
    first = figure("Mean over domains", mean, unit="nats per token", y_range=shared) if mean else ""
    panels = [
        figure(name, pair, unit="nats per token", y_range=shared, width=PANEL[0], height=PANEL[1])
        for name, pair in pairs.items()
    ]
    return (
        f'<div class="two">{first}{together("Gap closed", "gap_closed", "%", 100.0)}</div>'
        f'<div class="three">{"".join(panels)}</div><div class="two">'
        + together("KL(teacher || student)", "kl", "nats")
        + together("Top-1 agreement with the teacher", "agreement", "%", 100.0)
        + "</div>"
    )


def series(metrics: Sequence[Row], key: str, name: str, style: int, *, gaps: bool = True) -> Line:
    """One metric over the logged steps, smoothed when there are many; rows without the key are left out."""
    rows = [row for row in metrics if key in row and (gaps or math.isfinite(value_of(row, key)))]
    x, y = thin([value_of(row, "step") for row in rows], [value_of(row, key) for row in rows])
    if len(x) < 24:
        return Line(name, x, y, style)
    return Line(name, x, [float(v) for v in smooth(y, max(5, len(x) // 20))], style, raw=y)


def training_charts(config: Row, metrics: Sequence[Row], domains: Iterable[str]) -> str:
    """Loss and its terms, each term by domain, learning rate, gradient norm and speed."""
    if not metrics:
        return '<p class="note">No training step was logged.</p>'
    objective = config.get("objective")
    keys = {key for row in metrics for key in row}
    terms = [key for key in (objective if isinstance(objective, dict) else {}) if key in keys]
    loss = [series(metrics, key, key, style) for style, key in enumerate(["loss", *terms]) if key in keys]
    charts = [figure("Loss and its terms", loss, unit="nats per token")]
    style = styles(domains)
    for term in terms:
        names = [name for name in style if f"{term}/{name}" in keys]
        lines = [series(metrics, f"{term}/{name}", name, style[name], gaps=False) for name in names]
        bare = [line._replace(raw=None) for line in lines]  # the faint values of six domains hide the curves
        charts += [figure(f"{term} by domain", bare, unit="nats per token")] if bare else []
    rate = series(metrics, "lr", "learning rate", 0)
    norm = series(metrics, "grad_norm", "gradient norm", 1)
    speed = series(metrics, "tokens_per_s", "speed", 2)
    # a schedule is exact: not smoothed
    charts.append(figure("Learning rate", [rate._replace(y=rate.raw or rate.y, raw=None)], zero=True))
    charts.append(figure("Gradient norm", [norm], zero=True, log=True))
    charts.append(figure("Speed", [speed], unit="tokens per second", zero=True))
    charts += [figure("MFU", [series(metrics, "mfu", "MFU", 3)], zero=True)] if "mfu" in keys else []
    note = '<p class="note">Bold lines are moving averages, faint ones the logged values.</p>'
    shown = note if any(line.raw for line in loss) else ""
    return f'{broken(metrics, ["loss", *terms, "grad_norm"])}<div class="two">{"".join(charts)}</div>{shown}'


def broken(metrics: Sequence[Row], keys: Sequence[str]) -> str:
    """A warning that counts the steps with a value that is not a finite number, and those that were left out."""
    steps = [int(r["step"]) for r in metrics if any(k in r and not math.isfinite(value_of(r, k)) for k in keys)]
    left = [int(r["step"]) for r in metrics if "skipped" in r]
    said = ""
    if steps:
        said += (
            f"{len(steps)} of {len(metrics)} logged steps have a loss, term or gradient norm that is not a finite "
            f"number, first at step {steps[0]}; the curves break there. "
        )
    if left:
        said += f"{len(left)} updates were left out, first at step {left[0]}; metrics.jsonl has their rows."
    return f'<p class="warning">{said.strip()}</p>' if said else ""


def domains_table(run: Row) -> str:
    """What the run read: rows, documents and duplicates by domain, and their sum."""
    found = run.get("domains") or []
    columns = ("train_rows", "valid_rows", "documents", "duplicates")
    rows = [[escape(d.get("name", "?")), *(count(value_of(d, key)) for key in columns)] for d in found]
    if len(rows) > 1:
        sums = (sum(v for d in found if math.isfinite(v := value_of(d, key))) for key in columns)
        rows.append(["total", *(count(value) for value in sums)])
    head = ["domain", "training rows", "validation rows", "documents", "duplicates removed"]
    return table(head, rows, last=len(rows) > 1) if rows else ""


def facts(run: Row, metrics: Sequence[Row]) -> str:
    """The command in one piece to copy, and what it ran on and with."""
    teacher, student = run.get("teacher") or {}, run.get("student") or {}
    parameters = value_of(teacher, "parameters"), value_of(student, "parameters")
    smaller = f" ({parameters[0] / parameters[1]:.2f} times fewer)" if parameters[1] > 0 < parameters[0] else ""
    mesh = run.get("mesh") or {}
    rows = {
        "teacher": f"{number(parameters[0])} parameters, {teacher.get('layers', '–')} layers, "
        f"{teacher.get('path', '')}",
        "student": f"{number(parameters[1])} parameters{smaller}, {student.get('layers', '–')} layers",
        "kept layers": ", ".join(str(layer) for layer in student.get("kept_layers") or []),
        "devices": run.get("devices") or "–",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.items()),
        "speed": pace(metrics),
        "commit": run.get("git") or "",
        "versions": ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items()),
    }
    cells = [[escape(name), escape(value)] for name, value in rows.items() if value]
    cells += [
        ["sharding" if not index else "", escape(note)] for index, note in enumerate(run.get("sharding_notes") or [])
    ]
    body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
    command = f'<pre title="one click selects all">{escape(run.get("command", ""))}</pre>' if run.get("command") else ""
    return f'{command}<table class="facts"><tbody>{body}</tbody></table>'


def pace(metrics: Sequence[Row]) -> str:
    """The median speed, which neither compilation nor an evaluation between two steps moves."""

    def median(key: str) -> float:
        seen = [v for row in metrics if math.isfinite(v := value_of(row, key))]
        return statistics.median(seen) if seen else math.nan

    speed, seconds, mfu = median("tokens_per_s"), median("step_s"), median("mfu")
    shown = [f"{number(speed, 3)} tokens per second"] if math.isfinite(speed) else []
    shown += [f"{number(seconds, 3)} s per step"] if math.isfinite(seconds) else []
    shown += [f"MFU {percent(mfu)}"] if math.isfinite(mfu) else []
    return ", ".join(shown) + " (medians)" if shown else ""


def leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Dotted names and JSON texts of a nested dict's leaves."""
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in leaves(inner, f"{name}.{key}" if name else str(key))]
    return [(name, value if isinstance(value, str) and value else json.dumps(value))]


def config_cards(config: Row) -> str:
    """One card per block of the config."""
    cards = []
    for block, value in config.items():
        rows = "".join(
            f"<tr><th>{escape(name or block)}</th><td>{escape(shown)}</td></tr>" for name, shown in leaves(value)
        )
        cards.append(
            f'<div class="card"><h3>{escape(block)}</h3><table class="facts"><tbody>{rows}</tbody></table></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def page(
    title: str,
    config: Row,
    run: Row,
    metrics: Sequence[Row],
    evals: Sequence[Row],
    mixture: Sequence[Row] = (),
    clock: Sequence[Row] = (),
) -> str:
    """The whole page as text.

    Args: title: the run's name. config, run, metrics, evals, mixture, clock: what the files hold.
    """
    domains = by_domain(evals)
    drawn = dict.fromkeys([*domains, *(str(d.get("name", "?")) for d in run.get("domains") or [])])
    last = max((int(row["step"]) for row in [*metrics, *evals]), default=0)
    version = escape((run.get("versions") or {}).get("jaxkd", ""))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: distillation report</title><style>{STYLE}</style></head><body><main>"
        f'<header><p class="kind">jaxkd {version} distillation report</p><h1>{escape(title)}</h1>'
        f"{summary(metrics, domains)}</header>"
        + section("Results", results(domains))
        + section("Evaluation", evaluation_charts(domains))
        + section("Mixture", mixture_page.charts(mixture, evals, last, styles(drawn)))
        + section("Training", training_charts(config, metrics, drawn))
        + section("Wall clock", goodput.page(clock))
        + section("Data", domains_table(run))
        + section("Run", facts(run, metrics))
        + section("Configuration", config_cards(config))
        + "</main></body></html>\n"
    )
