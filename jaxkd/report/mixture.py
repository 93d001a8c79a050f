"""The report's part on the mixture: shares as a stacked area, perplexity ratios, epochs and weights by domain."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxkd.report.charts import (
    BOTTOM,
    COLORS,
    LEFT,
    MARKED_POINTS,
    RIGHT,
    TOP,
    Axis,
    Line,
    escape,
    figure,
    frame,
    number,
    percent,
    thin,
    ticks,
)

Row = dict[str, Any]
SPANS = 150  # intervals that are drawn one by one; neighbours are averaged beyond
SIZE = (520, 270)


def cost(lines: Sequence[Row]) -> str:
    """A sentence on what the rule's measurements cost, empty where it makes none.

    Args: lines: of `mixture.jsonl`.
    """
    seconds = [row["rule_s"] for row in lines if "rule_s" in row]
    shares = [row["rule_share"] for row in lines if "rule_share" in row]
    if not seconds:
        return ""
    part = f", {percent(statistics.median(shares))} of the time of training" if shares else ""
    return f"The rule measured {len(seconds)} times, in {number(statistics.median(seconds), 3)} s (median){part}."


def columns(lines: Sequence[Row], key: str, names: Sequence[str]) -> dict[str, list[float]]:
    """Name -> its values over the lines, NaN where there is none; names without any are left out."""
    found = {name: [float(row.get(f"{key}/{name}", math.nan)) for row in lines] for name in names}
    return {name: values for name, values in found.items() if not all(map(math.isnan, values))}


def ratios(evals: Sequence[Row], names: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> steps and exp(student's - teacher's nats per token) of the evaluations."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for name in names:
        rows = {int(row["step"]): row for row in evals if row.get("domain") == name and "teacher_nats" in row}
        if rows:
            gaps = [rows[step]["student_nats"] - rows[step]["teacher_nats"] for step in sorted(rows)]
            found[name] = [float(step) for step in sorted(rows)], [math.exp(min(gap, 700.0)) for gap in gaps]
    return found


def charts(lines: Sequence[Row], evals: Sequence[Row], last: int, style: Mapping[str, int]) -> str:
    """The section's charts; nothing where no interval was recorded.

    Args: lines: of mixture.jsonl. evals: of evals.jsonl. last: the run's last step. style: colour by domain.
    """
    lines = list({int(row["step"]): row for row in lines}.values())
    if not lines:
        return ""
    names = [name for name in style if f"share/{name}" in lines[0]]
    steps = [float(row["step"]) for row in lines]

    def curves(found: Mapping[str, Sequence[float]]) -> list[Line]:
        # Colours repeat after so many: the markers that then tell lines apart are drawn where points are few.
        most = MARKED_POINTS if len(names) > COLORS else 400
        return [Line(name, *thin(steps, values, most), style[name]) for name, values in found.items()]

    measured = columns(lines, "ratio", names)
    if measured:
        ratio = curves(measured)
    else:
        ratio = [Line(name, x, y, style[name]) for name, (x, y) in ratios(evals, names).items()]
    drawn = [stack("Shares that rows are drawn with", lines, names, max(float(last), steps[-1] + 1), style)]
    if ratio:
        drawn.append(figure("Perplexity of the student over the teacher's", ratio, unit="ratio", log=True))
    for key, title in (("weight", "Weights in the loss"), ("average", "Weights, averaged over the steps so far")):
        if found := columns(lines, key, names):
            drawn.append(figure(title, curves(found), zero=True))
    if len(lines) > 1:
        drawn.append(figure("Epochs before each interval", curves(columns(lines, "epochs", names)), zero=True))
    note = f'<p class="note">{escape(cost(lines))}</p>' if cost(lines) else ""
    return f'<div class="two">{"".join(drawn)}</div>{note}'


def _spans(lines: Sequence[Row], names: Sequence[str], end: float) -> list[tuple[float, float, list[float]]]:
    """Begin, end and shares of what is drawn as one column."""
    begins = [float(row["step"]) for row in lines]
    ends = [*begins[1:], end]
    shares = np.asarray([[float(row.get(f"share/{name}", 0.0)) for name in names] for row in lines])
    return [
        (begins[part[0]], ends[part[-1]], shares[part].mean(0).tolist())
        for part in np.array_split(np.arange(len(lines)), min(len(lines), SPANS))
    ]


def stack(title: str, lines: Sequence[Row], names: Sequence[str], end: float, style: Mapping[str, int]) -> str:
    """Shares over steps as bands on top of each other, the first domain at the bottom, as an HTML `<figure>`.

    Args: lines: of mixture.jsonl. names: the domains. end: the last step drawn. style: colour by domain.
    """
    width, height = SIZE
    begin = float(lines[0]["step"])
    x_ticks = [v for v in ticks(begin, end, 6, whole=True) if begin <= v <= end]
    x_axis = Axis(begin, end, LEFT, width - RIGHT, x_ticks)
    y_axis = Axis(0.0, 100.0, height - BOTTOM, TOP, [0.0, 25.0, 50.0, 75.0, 100.0])
    out, spans = [], _spans(lines, names, end)
    for left, right, shares in spans:
        below = 0.0
        for name, share in zip(names, shares, strict=True):
            # Edges are rounded, not sizes: what touches must leave no seam.
            x, end_x = round(x_axis.at(left), 1), round(x_axis.at(right), 1)
            high, low = round(y_axis.at(100 * (below + share)), 1), round(y_axis.at(100 * below), 1)
            below += share
            said = f"{name}\nsteps {number(left, 6)} to {number(right, 6)}: {percent(share)}"
            out.append(
                f'<rect class="area s{style[name] % COLORS}" x="{x:.1f}" y="{high:.1f}" '
                f'width="{end_x - x:.1f}" height="{max(low - high, 0):.1f}">'
                f"<title>{escape(said)}</title></rect>"
            )
    below = 0.0
    for name, share in zip(names, spans[-1][2], strict=True):
        middle = y_axis.at(100 * (below + share / 2))
        below += share
        if abs(y_axis.at(0.0) - y_axis.at(100 * share)) > 14:  # room for a line of text
            out.append(
                f'<text class="inside" text-anchor="end" x="{width - RIGHT - 6}" y="{middle + 4:.1f}">'
                f"{escape(name)}</text>"
            )
    items = "".join(
        f'<li><svg width="14" height="12" aria-hidden="true"><rect class="area s{style[name] % COLORS}" width="14" '
        f'height="12"/></svg>{escape(name)}</li>'
        for name in names
    )
    label = escape(f"{title}: {', '.join(names)} over steps")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(out)}'
        f'{frame(x_axis, y_axis, "step", "%")}</svg><ul class="legend">{items}</ul></figure>'
    )
