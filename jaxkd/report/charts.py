"""Line charts as inline SVG without scripts, and the style sheet of their pages."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from jaxkd.report.text import escape, number

COLORS = 7
MARKED_POINTS = 24  # a line with more points has no markers
HOVER_COLUMNS = 48  # places of a chart that show their values
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 36  # margins, in the units of the drawing
NARROW, WIDE, HEIGHT = 440, 908, 250
Chart = Callable[[int], str]  # width -> an HTML <figure>; `grid` draws one chart at two widths

STYLE = """
:root { --back: #fff; --panel: #f6f7f9; --ink: #1b1f24; --soft: #5b6570; --edge: #d9dee4; --warn: #fff4e0;
  --shade: #0003; --c0: #0072b2; --c1: #d55e00; --c2: #00875f; --c3: #b5548c; --c4: #b07800; --c5: #3a9fd8;
  --c6: #4d4d4d; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #14171b; --panel: #1d2127; --ink: #e6e9ed;
  --soft: #9aa5b1; --edge: #333a43; --warn: #3a2e14; --shade: #000a; --c0: #5ab4f0; --c1: #ff8a4c; --c2: #2fc597;
  --c3: #e28fc0; --c4: #e8b13a; --c5: #9bd4f7; --c6: #c3c8ce; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); print-color-adjust: exact;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 2.2rem 1.6rem 4rem; }
a { color: var(--c0); }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .9rem; padding: 0 0 .3rem; border-bottom: 1px solid var(--edge); }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
.kind { margin: 0; color: var(--soft); font-size: .85rem; }
.lead { max-width: 78ch; margin: 0; font-size: 1.05rem; }
.note { color: var(--soft); font-size: .85rem; max-width: 96ch; margin: .6rem 0 0; }
.warning { background: var(--warn); border-left: 4px solid var(--c4); padding: .5rem .8rem; margin: 0 0 1em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); gap: .7rem; margin: 1.3rem 0 0; }
.tiles div, .chart, .card, pre { background: var(--panel); border: 1px solid var(--edge); border-radius: 8px;
  padding: .7rem .85rem; break-inside: avoid; min-width: 0; }
.tiles dt { color: var(--soft); font-size: .8rem; }
.tiles dd { margin: .15rem 0 0; font-size: 1.2rem; font-weight: 600; white-space: nowrap; }
.scroll { overflow-x: auto; background:
  linear-gradient(90deg, var(--back) 40%, transparent) 0 0 / 48px 100% no-repeat local,
  linear-gradient(270deg, var(--back) 40%, transparent) 100% 0 / 48px 100% no-repeat local,
  linear-gradient(90deg, var(--shade), transparent) 0 0 / 16px 100% no-repeat,
  linear-gradient(270deg, var(--shade), transparent) 100% 0 / 16px 100% no-repeat; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .6rem; border-bottom: 1px solid var(--edge); text-align: right; white-space: nowrap; }
.sample { white-space: pre-wrap; text-align: left; overflow-wrap: anywhere; min-width: 14rem; max-width: 26rem;
  margin: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
.total td { font-weight: 650; border-top: 2px solid var(--soft); border-bottom: 0; }
.to { color: var(--soft); }
.facts th { font-weight: 400; color: var(--soft); width: 1%; }
.facts th, .facts td { text-align: left; vertical-align: top; padding-left: 0; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.facts tr:last-child > * { border-bottom: 0; }
.cards { columns: 330px; column-gap: .8rem; margin-top: .8rem; }
.card { margin: 0 0 .8rem; } .card h3 { margin-top: 0; } .card th { width: auto; }
.card td { text-align: right; padding-right: 0; }
summary { cursor: pointer; color: var(--c0); }
pre { margin: 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all;
  -webkit-user-select: all; font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.charts { display: grid; gap: .8rem; grid-template-columns: 1fr 1fr; }
.row { grid-column: 1 / -1; } .alone { display: none; }
.chart { margin: 0; }
.chart > svg { display: block; width: 100%; height: auto; overflow: visible; }
figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .3rem; }
figcaption span { font-weight: 400; color: var(--soft); font-size: .85rem; }
.empty { color: var(--soft); padding: 2rem 0; text-align: center; margin: 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: .4rem 0 0; padding: 0; }
.legend li { display: flex; align-items: center; gap: .35rem; font-size: .8rem; }
.tick { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--edge); } .rule { stroke: var(--soft); }
.line { fill: none; stroke: currentColor; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; opacity: .3; } .band { fill: currentColor; opacity: .16; } .dashed { stroke-dasharray: 5 5; }
.mark { fill: currentColor; } .hollow { fill: var(--panel); stroke: currentColor; stroke-width: 1.6; }
.area { fill: currentColor; fill-opacity: .78; shape-rendering: crispEdges; }
.at > rect { fill: transparent; }
.tip { visibility: hidden; pointer-events: none; font-size: 11px; } .at:hover .tip { visibility: visible; }
.tip rect { fill: var(--back); stroke: var(--edge); } .tip text { fill: var(--ink); }
.tip tspan[class] { fill: currentColor; }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); } .s3 { color: var(--c3); }
.s4 { color: var(--c4); } .s5 { color: var(--c5); } .s6 { color: var(--c6); }
@media screen and (max-width: 760px) {
  main { padding: 1.2rem .8rem 3rem; } .charts { grid-template-columns: 1fr; } .row { display: none; }
  .alone { display: block; } .chart { padding: .6rem .5rem; } .tick { font-size: 13px; } .tip { font-size: 12px; } }
@media print {
  body { font-size: 11px; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  .tiles { grid-template-columns: repeat(5, 1fr); } .tiles dd { font-size: .8rem; } td { padding: .25rem; }
  .scroll { overflow: visible; } .scroll table { font-size: .62rem; } .lead, .note { max-width: none; } }
"""


class Line(NamedTuple):
    """One curve. `style` picks colour and marker; a value that is not finite breaks the curve there."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    dashed: bool = False  # a reference without markers; a single point is drawn over the whole width
    raw: Sequence[float] | None = None  # the values before smoothing, drawn faintly
    band: tuple[Sequence[float], Sequence[float]] | None = None  # lower and upper edge


class Axis(NamedTuple):
    """Maps values [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten apart) that span [low, high], or integers."""
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(1.0, step if step != 2.5 else 2.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high], with their 2 and 5 over at most three decades."""
    first = math.floor(math.log10(low) + 1e-9)
    last = max(math.ceil(math.log10(high) - 1e-9), first + 1)
    if last - first > 3:
        step = math.ceil((last - first) / 6)
        return [10.0**power for power in range(first, last + step, step)]
    values = [m * 10.0**power for power in range(first, last) for m in (1, 2, 5)] + [10.0**last]
    below, above = max(v for v in values if v <= low * 1.001), min(v for v in values if v >= high * 0.999)
    return [v for v in values if below <= v <= above]


def tick_labels(values: Sequence[float]) -> list[str]:
    """One text per tick, all with as many decimals as the finest of them needs."""
    step = min(np.diff(values), default=1.0)
    largest = max(abs(v) for v in values)
    if largest >= 1e4 or largest < 1e-2 or (step > 0 and largest / step > 1e4):
        return [number(v, 3) for v in values]
    decimals = next((d for d in range(6) if all(abs(v - round(v, d)) < step * 1e-3 for v in values)), 6)
    return [f"{v:.{decimals}f}".replace("-", "−") for v in values]


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average over `window` values; non-finite ones stay and do not enter it."""
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    box = np.ones(max(1, min(window, len(array))))
    total = np.convolve(np.where(finite, array, 0.0), box, "same")
    count = np.convolve(finite.astype(float), box, "same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def thin(x: Sequence[float], y: Sequence[float], most: int = 400) -> tuple[list[float], list[float]]:
    """At most `most` points, means of neighbours; a group with a non-finite value is not finite."""
    if len(x) <= most:
        return list(x), list(y)
    parts = np.array_split(np.arange(len(x)), most)
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    return [float(xs[part[-1]]) for part in parts], [float(ys[part].mean()) for part in parts]


def limits(values: Iterable[float], zero: bool = False) -> tuple[float, float] | None:
    """The range of the finite values, widened where it is a single point; None without any."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    return low, high


def marker(style: int, x: float, y: float, r: float = 3.2) -> str:
    """A point: circle, square, triangle or diamond, then the same hollow."""
    attributes = f'class="{"hollow " if style // 4 % 2 else ""}mark s{style % COLORS}"'
    if style % 4 == 0:
        return f'<circle {attributes} cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"/>'
    corners = (
        ((-r, -r), (r, -r), (r, r), (-r, r)),
        ((0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)),
        ((0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)),
    )[style % 4 - 1]
    return f'<polygon {attributes} points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}"/>'


def path(points: Iterable[tuple[float, float] | None]) -> str:
    """The `d` of an SVG path through the points, broken at each None; a lone point is a dot."""
    parts, pen = [], "M"
    for point in points:
        if point is not None:
            parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}" + ("h.01" if pen == "M" else ""))
        pen = "M" if point is None else "L"
    return "".join(parts)


def curve(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    """One line: its band, faint raw values, the curve and its markers."""

    def pixels(values: Sequence[float]) -> list[tuple[float, float] | None]:
        drawn = (math.isfinite(v) and (v > 0 or not y_axis.log) for v in values)
        return [(x_axis.at(a), y_axis.at(b)) if ok else None for a, b, ok in zip(line.x, values, drawn)]

    points, color, out = pixels(line.y), f"s{line.style % COLORS}", []
    if line.band is not None:
        lower, upper = map(pixels, line.band)
        outline = [point for point in [*lower, *reversed(upper)] if point is not None]
        out.append(f'<path class="band {color}" d="{path(outline)}Z"/>')
    if line.raw is not None:
        out.append(f'<path class="line faint {color}" d="{path(pixels(line.raw))}"/>')
    if line.dashed and len(points) == 1 and points[0] is not None:
        return f'<path class="line {color} dashed" d="M{x_axis.start} {points[0][1]:.1f}H{x_axis.end}"/>'
    out.append(f'<path class="line {color}{" dashed" if line.dashed else ""}" d="{path(points)}"/>')
    if len(points) <= MARKED_POINTS and not line.dashed:
        out += [marker(line.style, *point) for point in points if point is not None]
    return "".join(out)


def hover(lines: Sequence[Line], x_axis: Axis, y_axis: Axis, unit: str) -> str:
    """Columns over the whole plot that show, under the pointer, the values of all lines at their step."""
    steps = sorted({x for line in lines for x in line.x if x_axis.low <= x <= x_axis.high})
    if len(steps) > HOVER_COLUMNS:
        steps = [steps[round(i * (len(steps) - 1) / (HOVER_COLUMNS - 1))] for i in range(HOVER_COLUMNS)]
    pixels = [x_axis.at(step) for step in steps]
    edges = [x_axis.start, *((a + b) / 2 for a, b in pairwise(pixels)), x_axis.end]
    out = []
    for step, x, left, right in zip(steps, pixels, edges, edges[1:]):
        rows = [f"step {number(step, 6)}"]
        spans = [f"<tspan>{rows[0]}</tspan>"]
        for line in lines:
            index = bisect_left(line.x, step)  # thinned lines may have no point there: the next one
            if index == len(line.x) or not math.isfinite(line.y[index]):
                continue
            value = f"{line.name}: {number(line.y[index])}{unit and ' '}{unit}"
            value += f" (raw {number(line.raw[index])})" if line.raw is not None else ""
            rows.append(f"■ {value}")
            spans.append(f'<tspan class="s{line.style % COLORS}">■</tspan><tspan> {escape(value)}</tspan>')
        width, height = 6.4 * max(map(len, rows)) + 12, 15 * len(rows) + 8
        box = x + 8 if x < (x_axis.start + x_axis.end) / 2 else x - 8 - width
        text = "".join(
            f'<text x="{box + 6:.1f}" y="{y_axis.end + 15 * i + 15:.1f}">{span}</text>' for i, span in enumerate(spans)
        )
        top, size = y_axis.end, y_axis.start - y_axis.end
        out.append(
            f'<g class="at"><rect x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{size}"/><g class="tip">'
            f'<path class="rule" d="M{x:.1f} {top}v{size}"/>'
            f'<rect x="{box:.1f}" y="{top}" width="{width:.0f}" height="{height}" rx="4"/>{text}</g></g>'
        )
    return "".join(out)


def frame(x_axis: Axis, y_axis: Axis) -> str:
    """Grid lines, tick labels and the name of the x axis."""
    out = []
    for value, text in zip(y_axis.ticks, tick_labels(y_axis.ticks)):
        y = y_axis.at(value)
        out.append(f'<path class="grid" d="M{x_axis.start:.1f} {y:.1f}H{x_axis.end:.1f}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>')
    for value, text in zip(x_axis.ticks, tick_labels(x_axis.ticks)):
        x = x_axis.at(value)
        out.append(f'<path class="rule" d="M{x:.1f} {y_axis.start:.1f}v4"/>')
        out.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{y_axis.start + 17:.1f}">{text}</text>')
    out.append(f'<path class="rule" d="M{x_axis.start:.1f} {y_axis.start:.1f}H{x_axis.end:.1f}"/>')
    middle = (x_axis.start + x_axis.end) / 2
    out.append(f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{y_axis.start + 32:.1f}">step</text>')
    return "".join(out)


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """A list of SVG swatches (26 by 12) and names that wraps."""
    svg = '<svg width="26" height="12" aria-hidden="true">'
    items = (f"<li>{svg}{drawing}</svg>{escape(name)}</li>" for drawing, name in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def panel(title: str, unit: str, names: Iterable[str], drawing: str, width: int, below: str = "") -> str:
    """The `<figure>` around a drawing of the standard height."""
    label = escape(f"{title}: {', '.join(names)} over steps")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{unit and f" <span>{escape(unit)}</span>"}</figcaption>'
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">{drawing}</svg>{below}</figure>'
    )


def x_axis_of(low: float, high: float, width: int) -> Axis:
    """Steps over the width of a drawing, with ticks at whole ones."""
    inside = [v for v in ticks(low, high, 6 if width == NARROW else 10, whole=True) if low - 1e-9 <= v <= high + 1e-9]
    return Axis(low, high, LEFT, width - RIGHT, [v for v in inside if v >= 0])


def figure(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    zero: bool = False,
    log: bool = False,
    y_range: tuple[float, float] | None = None,
) -> Chart:
    """A chart of lines over steps; it says so in words when there is nothing to draw.

    With `zero` the axis includes 0; with `log` it is logarithmic where positive values span more than a factor of 50.
    """
    values = [v for line in lines for v in (*line.y, *(line.raw or ()), *(v for edge in line.band or () for v in edge))]
    positive = [v for v in values if math.isfinite(v) and v > 0]
    log = log and len(positive) > 1 and max(positive) > 50 * min(positive)
    span = y_range or limits(positive if log else values, zero and not log)
    steps = limits(x for line in lines for x in line.x)
    if span is None or steps is None:
        return lambda width: (
            f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="empty">No values.</p></figure>'
        )
    y_ticks = log_ticks(*span) if log else ticks(*span)
    y_axis = Axis(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, y_ticks, log)
    low, high = steps
    single = {x for line in lines for x in line.x}
    if len(single) == 1:
        low, high = min(single) - 1, max(single) + 1  # a single step stands in the middle
    elif 0 < low < 0.1 * high:
        low = 0.0
    shown_unit = f"{unit}, log scale".strip(", ") if log else unit

    def swatch(line: Line) -> str:
        dashes = " dashed" if line.dashed else ""
        dot = "" if line.dashed or len(line.x) > MARKED_POINTS else marker(line.style, 13, 6)
        return f'<path class="line s{line.style % COLORS}{dashes}" d="M1 6H25"/>{dot}'

    def draw(width: int) -> str:
        x_axis = x_axis_of(low, high, width)
        curves = "".join(curve(line, x_axis, y_axis) for line in lines)
        drawing = frame(x_axis, y_axis) + curves + hover(lines, x_axis, y_axis, unit if len(unit) < 3 else "")
        below = legend((swatch(line), line.name) for line in lines) if len(lines) > 1 else ""
        return panel(title, shown_unit, [line.name for line in lines], drawing, width, below)

    return draw


def grid(charts: Sequence[Chart]) -> str:
    """Charts in two columns; of an odd number the first fills a row, and is drawn again for a single column."""
    if not charts:
        return ""
    out = [chart(NARROW) for chart in charts]
    if len(charts) % 2:
        out[0] = f'<div class="row">{charts[0](WIDE)}</div><div class="alone">{out[0]}</div>'
    return f'<div class="charts">{"".join(out)}</div>'
