"""A comparison of runs as one self-contained HTML page: tables, and curves with the spread over seeds as a band."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxkd.report.charts import STYLE, Line, escape, figure, smooth, table, thin
from jaxkd.report.compare import (
    MEAN,
    METRICS,
    Comparison,
    Finished,
    Variant,
    against,
    changes,
    interval,
    note,
    plus_minus,
    spread,
)
from jaxkd.report.run import PANEL, section, value_of
from jaxkd.runtime import files

TITLES = {
    "student_nats": "Student, nats per token",
    "kl": "KL(teacher || student), nats",
    "agreement": "Top-1 agreement with the teacher, %",
}
Series = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""


def write(found: Comparison, target: Path) -> Path:
    """Make the page; a reader sees the old one or the new one."""
    files.write_text(target, page(found))
    return target


def page(found: Comparison) -> str:
    """The whole page as text."""
    runs = sum(len(v.runs) for v in found.variants)
    warnings = "".join(f'<p class="warning">Left out: {escape(line)}.</p>' for line in found.left_out)
    title = f"{', '.join(v.name for v in found.variants)}: comparison"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><p class="kind">jaxkd comparison</p><h1>{len(found.variants)} variants, {runs} runs</h1>'
        f'<p class="lead">{lead(found)}</p></header>{warnings}'
        + section("Means over domains", means(found), f'<p class="note">{escape(note(found))}</p>')
        + section("By domain", *(by_domain(found, key) for key in METRICS))
        + section("Curves", curves(found))
        + section("What differs", differences(found))
        + "</main></body></html>\n"
    )


def lead(found: Comparison) -> str:
    """In a sentence: which variants differ from the one they are held against by more than the seeds do."""
    apart = []
    for v in found.variants:
        d = against(found, v, MEAN, "student_nats")
        if d is not None and d.beyond_noise:
            apart.append(f"{v.name} ({d.value:+.3f})")
    said = f"differ from {found.against} in mean student nats by more than the noise of seeds"
    return escape(f"{', '.join(apart)} {said}." if apart else f"No variant is seen to {said}.")


def means(found: Comparison) -> str:
    """Variants by row: the means of the three figures, losses with their differences."""
    head = ["variant", "runs"]
    for key in METRICS:
        head += [escape(TITLES[key]), *([] if key == "agreement" else [f"over {escape(found.against)}"])]
    rows = []
    for v in found.variants:
        cells = [escape(v.name), str(len(v.runs))]
        for key in METRICS:
            cells.append(plus_minus(spread(v.values(MEAN, key)), key == "agreement"))
            cells += [] if key == "agreement" else [_difference(found, v, MEAN, key)]
        rows.append(cells)
    return table(head, rows)


def _difference(found: Comparison, variant: Variant, domain: str, key: str) -> str:
    d = against(found, variant, domain, key)
    shown = escape(interval(d)) if d is not None else "–"
    return f"<strong>{shown}</strong>" if d is not None and d.beyond_noise else shown


def by_domain(found: Comparison, key: str) -> str:
    """One figure: variants by row, domains by column; a star where the difference is beyond the noise."""
    rows = []
    for v in found.variants:
        cells = [escape(v.name)]
        for domain in found.domains:
            d = against(found, v, domain, key)
            star = " *" if d is not None and d.beyond_noise else ""
            cells.append(plus_minus(spread(v.values(domain, key)), key == "agreement") + star)
        rows.append(cells)
    return f'<h3 style="margin-top: 1.4rem">{escape(TITLES[key])}</h3>' + table(
        ["variant", *map(escape, found.domains)], rows
    )


def differences(found: Comparison) -> str:
    """The keys of the config in which the variants are not alike."""
    rows = [[escape(key), *(escape(by[v.name]) or "–" for v in found.variants)] for key, by in changes(found).items()]
    return table(["key", *(escape(v.name) for v in found.variants)], rows) if rows else ""


# ------------------------------------------------------------------------------------------ curves


def curves(found: Comparison) -> str:
    """Evaluations and training terms over steps, a line a variant, with a band of one standard deviation."""

    def drawn(title: str, series: Callable[[Finished], Series], window: int = 1, **options) -> str:
        lines = [band(v, style, series, window) for style, v in enumerate(found.variants)]
        return figure(title, lines, **options)

    first = [
        drawn(f"{TITLES[key]}, mean over domains", evaluated(MEAN, key, 100.0 if key == "agreement" else 1.0))
        for key in METRICS
    ]
    first.append(drawn("Perplexity ratio to the teacher, largest over smallest domain", ratios))
    for term in common_terms(found):
        first.append(drawn(f"{term}, training", logged(term), 9, unit="nats per token"))
    panels = [
        drawn(f"{domain}, student nats", evaluated(domain, "student_nats"), width=PANEL[0], height=PANEL[1])
        for domain in found.domains
        if domain != MEAN
    ]
    return f'<div class="two">{"".join(first)}</div><div class="three">{"".join(panels)}</div>'


def evaluated(domain: str, key: str, scale: float = 1.0) -> Callable[[Finished], Series]:
    """A figure of one domain over the evaluations of a run."""

    def series(run: Finished) -> Series:
        rows = run.evals.get(domain, [])
        return [value_of(row, "step") for row in rows], [scale * value_of(row, key) for row in rows]

    return series


def ratios(run: Finished) -> Series:
    """How unevenly a student knows its domains: the largest perplexity ratio to the teacher over the smallest."""
    gaps: dict[float, list[float]] = {}
    for domain, rows in run.evals.items():
        for row in rows if domain != MEAN else ():
            gaps.setdefault(value_of(row, "step"), []).append(
                value_of(row, "student_nats") - value_of(row, "teacher_nats")
            )
    steps = sorted(gaps)
    return steps, [math.exp(max(gaps[s]) - min(gaps[s])) for s in steps]


def logged(term: str) -> Callable[[Finished], Series]:
    """A metric over the training steps of a run."""
    return lambda run: (
        [value_of(row, "step") for row in run.metrics if term in row],
        [value_of(row, term) for row in run.metrics if term in row],
    )


def common_terms(found: Comparison) -> list[str]:
    """Terms of the objective that every run logs: losses with other terms are not of one kind."""
    runs = [run for v in found.variants for run in v.runs]
    keys = [{key for row in run.metrics for key in row} & set(run.config.get("objective") or {}) for run in runs]
    return sorted(set.intersection(*keys)) if keys else []


def band(variant: Variant, style: int, series: Callable[[Finished], Series], window: int) -> Line:
    """A variant's mean over its runs, at the steps that all of them have, and one standard deviation around it."""
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
