"""A comparison of runs as one HTML page: tables, and curves with the spread over seeds as a band."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxkd.report.charts import STYLE, Chart, Line, figure, grid, smooth, thin
from jaxkd.report.compare import METRICS, Comparison, Finished, Variant, by_variant, changes, means, note
from jaxkd.report.records import MEAN, value_of
from jaxkd.report.run import value_text
from jaxkd.report.text import document, escape, section, table
from jaxkd.runtime import files

TITLES = {
    "student_nats": "Student, nats per token",
    "kl": "KL(teacher || student), nats",
    "agreement": "Top-1 agreement with the teacher, %",
}
Series = Callable[[Finished], tuple[Sequence[float], Sequence[float]]]  # a run -> steps and values


def write(c: Comparison, target: Path) -> Path:
    """Write the page to `target`, with links to the runs relative to it."""
    files.write_text(target, page(c, target.parent))
    return target


def page(c: Comparison, directory: Path = Path()) -> str:
    """The page as text, for a file in `directory`."""
    runs = sum(len(v.runs) for v in c.variants)
    left_out = "".join(f'<p class="warning">Left out: {escape(line)}.</p>' for line in c.left_out)
    by_domain = (f"<h3>{escape(TITLES[key])}</h3>" + html_table(by_variant(c, c.domains, key)) for key in METRICS)
    settings = [[key, *(value_text(by[v.name]) for v in c.variants)] for key, by in changes(c).items()]
    settings = [["setting", *(v.name for v in c.variants)], *settings] if settings else []
    return document(
        f"{', '.join(v.name for v in c.variants)}: comparison",
        STYLE,
        f'<header><p class="kind">jaxkd comparison</p><h1>{len(c.variants)} variants, {runs} runs</h1>'
        f'<p class="lead">{lead(c)}</p></header>{left_out}'
        + section("What differs", html_table(settings))
        + section("Means over domains", html_table(means(c)), f'<p class="note">{escape(note(c))}</p>')
        + section("By domain", *by_domain)
        + section("Curves", curves(c))
        + section("Runs", links(c, directory)),
    )


def lead(c: Comparison) -> str:
    """In a sentence: which variants differ from the baseline by more than the seeds do."""
    if len(c.variants) == 1:
        return "A single variant: there is nothing to compare it with."
    apart = []
    for v in c.variants:
        d = c.difference(v, MEAN, "student_nats")
        if d is not None and d.beyond_noise:
            apart.append(f"{v.name} ({d.value:+.3f})")
    who = f"{', '.join(apart)} differ{'s' if len(apart) == 1 else ''}" if apart else "None differs"
    return escape(f"{who} from {c.baseline} in mean student nats by more than the noise of seeds.")


def links(c: Comparison, directory: Path) -> str:
    """Variants by row, a link to each run's report, or to its directory where there is none."""

    def link(run: Finished) -> str:
        report = run.workdir / "report.html"
        target = os.path.relpath(report if report.exists() else run.workdir, directory)
        return f'<a href="{escape(Path(target).as_posix())}">seed {run.seed}</a>'

    return table(["variant", "runs"], [[escape(v.name), ", ".join(map(link, v.runs))] for v in c.variants])


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as an HTML table, the first the head; differences beyond noise (`... *`) are bold."""
    shown = [[f"<strong>{t}</strong>" if t.endswith("] *") else t or "–" for t in map(escape, row)] for row in rows]
    return table(shown[0], shown[1:]) if rows else ""


def curves(c: Comparison) -> str:
    """Evaluations and training terms over steps, a line per variant with a band of one standard deviation."""
    styles = {v.name: style for style, v in enumerate(c.variants)}

    def drawn(title: str, series: Series, of: Iterable[Variant] = c.variants, window: int = 1, **options) -> Chart:
        return figure(title, [band(v, styles[v.name], series, window) for v in of], **options)

    charts = [
        drawn(f"{TITLES[key]}, mean over domains", evaluated(MEAN, key, 100.0 if key == "agreement" else 1.0))
        for key in METRICS
    ]
    charts.append(drawn("Perplexity ratio to the teacher, largest over smallest domain", ratios))
    for title, term, variants in logged_terms(c):
        charts.append(drawn(f"{title}, training", logged(term), variants, 9, unit="nats per token"))
    charts += [drawn(f"{d}, student nats", evaluated(d, "student_nats")) for d in c.domains if d != MEAN]
    return grid(charts)


def evaluated(domain: str, key: str, scale: float = 1.0) -> Series:
    """A figure of one domain over the evaluations of a run."""

    def series(run: Finished) -> tuple[list[float], list[float]]:
        rows = run.evals.get(domain, [])
        return [value_of(row, "step") for row in rows], [scale * value_of(row, key) for row in rows]

    return series


def ratios(run: Finished) -> tuple[list[float], list[float]]:
    """The largest perplexity ratio of student to teacher over the smallest, over domains."""
    gaps: dict[float, list[float]] = {}
    for domain, rows in run.evals.items():
        for row in rows if domain != MEAN else ():
            gap = value_of(row, "student_nats") - value_of(row, "teacher_nats")
            gaps.setdefault(value_of(row, "step"), []).append(gap)
    steps = sorted(gaps)
    return steps, [math.exp(max(gaps[s]) - min(gaps[s])) for s in steps]


def logged(term: str) -> Series:
    """A metric over the training steps of a run."""
    return lambda run: (
        [value_of(row, "step") for row in run.metrics if term in row],
        [value_of(row, term) for row in run.metrics if term in row],
    )


def logged_terms(c: Comparison) -> list[tuple[str, str, list[Variant]]]:
    """Title, name and variants of the objective's terms; one entry per definition, whatever the weight.

    Variants may give one name to different losses, such as forward and reverse KL, which belong on different axes.
    """
    groups: dict[str, dict[str, list[Variant]]] = {}
    for variant in c.variants:
        for name, term in (variant.runs[0].config.get("objective") or {}).items():
            if all(any(name in row for row in run.metrics) for run in variant.runs):
                settings = sorted((key, value) for key, value in term.items() if key != "weight" and value)
                definition = ", ".join(str(x) if k in ("divergence", "feature") else f"{k} {x}" for k, x in settings)
                groups.setdefault(name, {}).setdefault(definition, []).append(variant)
    return [
        (f"{name}: {definition}" if len(definitions) > 1 else name, name, variants)
        for name, definitions in sorted(groups.items())
        for definition, variants in definitions.items()
    ]


def band(variant: Variant, style: int, series: Series, window: int) -> Line:
    """The mean over a variant's runs at the steps that all of them have, and one standard deviation around it."""
    tables = [dict(zip(*series(run))) for run in variant.runs]
    steps = sorted(set.intersection(*(set(t) for t in tables)))
    window = window if len(steps) >= 24 else 1
    values = np.asarray([smooth([t[s] for s in steps], window) for t in tables]).reshape(len(tables), len(steps))
    x, mean = thin(steps, values.mean(0).tolist())
    if len(tables) < 2:
        return Line(variant.name, x, mean, style)
    std = thin(steps, values.std(0, ddof=1).tolist())[1]
    edges = [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)]
    return Line(variant.name, x, mean, style, band=edges)
