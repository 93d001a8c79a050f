"""The report's section on the mixture: shares as stacked areas, perplexity ratios, epochs and weights by domain."""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from jaxkd.report import charts
from jaxkd.report.charts import BOTTOM, COLORS, HEIGHT, TOP, Axis, Chart, Line, figure, thin
from jaxkd.report.records import Row
from jaxkd.report.text import escape, number, percent

SPANS = 150  # intervals that are drawn one by one; neighbours are averaged beyond


def cost(rows: Sequence[Row]) -> str:
    """A sentence on the time of the rule's measurements, from rows of mixture.jsonl; empty without any."""
    seconds = [row["rule_s"] for row in rows if "rule_s" in row]
    shares = [row["rule_share"] for row in rows if "rule_share" in row]
    if not seconds:
        return ""
    part = f", {percent(statistics.median(shares))} of the training time" if shares else ""
    median = number(statistics.median(seconds), 3)
    return f"The mixture rule measured {len(seconds)} times, in {median} s (median){part}."


def columns(rows: Sequence[Row], key: str, names: Sequence[str]) -> dict[str, list[float]]:
    """Values of `key/NAME` by name, NaN where a row has none; names without any are left out."""
    by_name = {name: [float(row.get(f"{key}/{name}", math.nan)) for row in rows] for name in names}
    return {name: values for name, values in by_name.items() if not all(map(math.isnan, values))}


def ratios(evals: Sequence[Row], names: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and perplexity ratios, exp(student nats - teacher nats), of the evaluations by name."""
    by_name: dict[str, tuple[list[float], list[float]]] = {}
    for name in names:
        rows = {int(row["step"]): row for row in evals if row.get("domain") == name and "teacher_nats" in row}
        if rows:
            gaps = [rows[step]["student_nats"] - rows[step]["teacher_nats"] for step in sorted(rows)]
            by_name[name] = [float(step) for step in sorted(rows)], [math.exp(min(gap, 700.0)) for gap in gaps]
    return by_name


def section(rows: Sequence[Row], evals: Sequence[Row], last: int, style: Mapping[str, int]) -> str:
    """The charts and a note, from rows of mixture.jsonl and evals.jsonl; empty without. `style`: colours by domain."""
    rows = list({int(row["step"]): row for row in rows}.values())
    if not rows:
        return ""
    names = [name for name in style if f"share/{name}" in rows[0]]
    steps = [float(row["step"]) for row in rows]

    def lines(by_name: Mapping[str, Sequence[float]]) -> list[Line]:
        # Where colours repeat, few enough points that markers are drawn.
        most = charts.MARKED_POINTS if len(names) > COLORS else 400
        return [Line(name, *thin(steps, values, most), style[name]) for name, values in by_name.items()]

    ratio = lines(columns(rows, "ratio", names))
    ratio = ratio or [Line(name, x, y, style[name]) for name, (x, y) in ratios(evals, names).items()]
    drawn = [shares(rows, names, max(float(last), steps[-1] + 1), style)]
    if ratio:
        drawn.append(figure("Perplexity of the student over the teacher's", ratio, unit="ratio", log=True))
    for key, title in (("weight", "Weights in the loss"), ("average", "Weights, averaged over the steps so far")):
        if by_name := columns(rows, key, names):
            drawn.append(figure(title, lines(by_name), zero=True))
    if len(rows) > 1:
        drawn.append(figure("Epochs before each interval", lines(columns(rows, "epochs", names)), zero=True))
    return charts.grid(drawn) + (f'<p class="note">{escape(cost(rows))}</p>' if cost(rows) else "")


def shares(rows: Sequence[Row], names: Sequence[str], end: float, style: Mapping[str, int]) -> Chart:
    """Stacked shares of the domains over steps up to `end`, the first domain at the bottom."""
    starts = [*(float(row["step"]) for row in rows), end]
    values = np.asarray([[float(row.get(f"share/{name}", 0.0)) for name in names] for row in rows])
    parts = np.array_split(np.arange(len(rows)), min(len(rows), SPANS))  # the intervals drawn as one column
    spans = [(starts[part[0]], starts[part[-1] + 1], values[part].mean(0).tolist()) for part in parts]
    y_axis = Axis(0.0, 100.0, HEIGHT - BOTTOM, TOP, [0.0, 25.0, 50.0, 75.0, 100.0])
    begins = [begin for begin, _, _ in spans]
    lines = [Line(n, begins, [100 * s[i] for *_, s in spans], style[n]) for i, n in enumerate(names)]

    def draw(width: int) -> str:
        x_axis, out = charts.x_axis_of(begins[0], end, width), []
        for begin, stop, values in spans:
            below = 0.0
            for name, share in zip(names, values, strict=True):
                # Edges are rounded, not sizes, so that neighbours leave no seam.
                left, right = round(x_axis.at(begin), 1), round(x_axis.at(stop), 1)
                high, low = round(y_axis.at(100 * (below + share)), 1), round(y_axis.at(100 * below), 1)
                below += share
                out.append(
                    f'<rect class="area s{style[name] % COLORS}" x="{left:.1f}" y="{high:.1f}" '
                    f'width="{right - left:.1f}" height="{max(low - high, 0):.1f}"/>'
                )
        swatches = (
            (f'<rect class="area s{style[n] % COLORS}" x="6" width="14" height="12"/>', n) for n in reversed(names)
        )
        drawing = "".join(out) + charts.frame(x_axis, y_axis) + charts.hover(lines, x_axis, y_axis, "%")
        return charts.panel("Shares that rows are drawn with", "%", names, drawing, width, charts.legend(swatches))

    return draw
