"""Line charts as inline SVG: axes, sensible ticks, a legend and tooltips; and the style sheet of their page.

Colours are CSS variables (`--c0` to `--c6`), so that one drawing serves light, dark and paper. They repeat
after seven lines; the marker's shape does not repeat with them, and tells the lines apart for readers who do
not see the colours.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

COLORS = 7
HOVER_POINTS = 120  # more tooltips than this on a line lie on top of each other
MARKED_POINTS = 24  # up to so many points every one is drawn; beyond, the line is enough
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 36  # the margins of a chart, in its own units

STYLE = """
:root { --back: #fff; --panel: #f6f7f9; --ink: #1b1f24; --soft: #5b6570; --edge: #d9dee4; --warn: #fff4e0;
  --c0: #0072b2; --c1: #d55e00; --c2: #00875f; --c3: #b5548c; --c4: #b07800; --c5: #3a9fd8; --c6: #4d4d4d; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #14171b; --panel: #1d2127; --ink: #e6e9ed;
  --soft: #9aa5b1; --edge: #333a43; --warn: #3a2e14;
  --c0: #5ab4f0; --c1: #ff8a4c; --c2: #2fc597; --c3: #e28fc0; --c4: #e8b13a; --c5: #9bd4f7; --c6: #c3c8ce; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); print-color-adjust: exact;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 2.2rem 1.6rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .9rem; padding: 0 0 .3rem; border-bottom: 1px solid var(--edge); }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
.kind { margin: 0; color: var(--soft); font-size: .85rem; }
.lead { max-width: 78ch; margin: 0; font-size: 1.05rem; }
.note { color: var(--soft); font-size: .85rem; max-width: 96ch; margin: .6rem 0 0; }
.warning { background: var(--warn); border-left: 4px solid var(--c4); padding: .5rem .8rem; margin: 0 0 1em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: .7rem; }
.tiles { margin: 1.3rem 0 0; }
.tiles div, .chart, .card, pre { background: var(--panel); border: 1px solid var(--edge); border-radius: 8px;
  padding: .7rem .85rem; break-inside: avoid; min-width: 0; }
.tiles dt { color: var(--soft); font-size: .8rem; }
.tiles dd { margin: .15rem 0 0; font-size: 1.2rem; font-weight: 600; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .6rem; border-bottom: 1px solid var(--edge); text-align: right; }
th, td { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
.total td { font-weight: 650; border-top: 2px solid var(--soft); border-bottom: 0; }
.to { color: var(--soft); }
.facts th { font-weight: 400; color: var(--soft); width: 1%; }
.facts th, .facts td { text-align: left; vertical-align: top; padding-left: 0; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.facts tr:last-child > * { border-bottom: 0; }
.cards { columns: 330px; column-gap: .8rem; }
.card { margin: 0 0 .8rem; }
.card th { width: auto; }
.card td { text-align: right; padding-right: 0; }
pre { margin: 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all;
  -webkit-user-select: all; font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.two, .three { display: grid; gap: .8rem; margin-bottom: .8rem; }
.two { grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); }
.three { grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.chart { margin: 0; }
.chart > svg { display: block; width: 100%; height: auto; overflow: visible; }
figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .3rem; }
.empty { color: var(--soft); padding: 2rem 0; text-align: center; margin: 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: .4rem 0 0; padding: 0; }
.legend li { display: flex; align-items: center; gap: .35rem; font-size: .8rem; }
.tick, .name { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--edge); }
.rule { stroke: var(--soft); }
.line { fill: none; stroke: currentColor; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; opacity: .3; }
.band { fill: currentColor; opacity: .16; }
.dashed { stroke-dasharray: 5 5; }
.mark { fill: currentColor; }
.hollow { fill: var(--panel); stroke: currentColor; stroke-width: 1.6; }
.area { fill: currentColor; fill-opacity: .78; shape-rendering: crispEdges; }
.area:hover { fill-opacity: 1; }
.inside { fill: var(--back); font-size: 11px; font-weight: 600; pointer-events: none; }
.hit { fill: transparent; }
.hit:hover { fill: currentColor; fill-opacity: .35; }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); } .s3 { color: var(--c3); }
@media print {
  body { font-size: 11px; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  .tiles { grid-template-columns: repeat(5, 1fr); } .tiles dd { font-size: .8rem; } td { padding: .25rem; }
  .wide { overflow: visible; } .wide table { font-size: .62rem; } .lead, .note { max-width: none; }
  .two { grid-template-columns: 1fr 1fr; } .three { grid-template-columns: 1fr 1fr 1fr; } }
.s4 { color: var(--c4); } .s5 { color: var(--c5); } .s6 { color: var(--c6); }
"""


class Line(NamedTuple):
    """One curve. `style` picks colour and marker; a value that is not finite breaks the curve there."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    dashed: bool = False
    raw: Sequence[float] | None = None  # the same before smoothing, drawn faintly behind and told by the tooltip
    band: tuple[Sequence[float], Sequence[float]] | None = None  # from, to: how far several runs spread


class Axis(NamedTuple):
    """A range of values laid on a range of pixels, with the ticks it shows."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def number(value: float | None, digits: int = 4) -> str:
    """`value` for a reader: `digits` significant ones, 12.5k and 135M for large, 3e-4 for tiny values.

    Args: value: any number; None and NaN give a dash. digits: significant digits kept.
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        text = f"{mantissa}e{int(exponent)}"
    elif size < 1e4:
        text = f"{value:.{max(digits - 1 - math.floor(math.log10(size)), 0)}f}"
        if "." in text and (size >= 1000 or float(text) == int(float(text))):
            text = text.rstrip("0").rstrip(".")
    else:
        power, suffix = next((p, s) for p, s in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if size >= p)
        text = f"{value / power:.{digits}g}" if size < 1e15 else f"{value:.{digits - 1}e}"
        text += suffix if size < 1e15 else ""
    return text.replace("-", "−", 1) if value < 0 else text


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with one decimal; a dash for None and NaN."""
    if fraction is None or not math.isfinite(fraction):
        return "–"
    return f"{100 * fraction:.1f} %".replace("-", "−")


def fixed(value: float) -> str:
    """Nats and bits for a table: three decimals, so that the digits stand below each other."""
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else number(value)


def count(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{int(value):,}" if math.isfinite(value) else "–"


def escape(value: object) -> str:
    """Any value as text that is safe inside HTML, also inside an attribute's quotes."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, last: bool = False) -> str:
    """An HTML table of cells that are HTML already; the first column is text, the others are figures."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    total = len(rows) - 1 if last else -1
    body = "".join(
        ('<tr class="total">' if index == total else "<tr>") + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) that span `[low, high]`, its ends included.

    Args: low, high: the range, `low < high`. count: about how many. whole: integers only.
    """
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(1.0, step if step != 2.5 else 2.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around `[low, high]`, with their 2 and 5 where there are at most three decades."""
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
    """At most `most` points: neighbours are averaged, and a group that holds a non-finite value keeps it."""
    if len(x) <= most:
        return list(x), list(y)
    parts = np.array_split(np.arange(len(x)), most)
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    return [float(xs[part[-1]]) for part in parts], [float(ys[part].mean()) for part in parts]


def limits(values: Iterable[float], zero: bool = False) -> tuple[float, float] | None:
    """The range of the finite values, widened where it is a single point; None when there is none."""
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


def marker(style: int, x: float, y: float, radius: float = 3.2) -> str:
    """The SVG of one drawn point: circle, square, triangle, diamond, then the same again, hollow."""
    shape, hollow = style % 4, "hollow " if style // 4 % 2 else ""
    attributes = f'class="{hollow}mark s{style % COLORS}"'
    r = radius
    if shape == 0:
        return f'<circle {attributes} cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"/>'
    corners = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
        3: [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
    }[shape]
    return f'<polygon {attributes} points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}"/>'


def path(points: Iterable[tuple[float, float] | None]) -> str:
    """The `d` of an SVG path through the points, broken where one is None; a lone point is a dot."""
    parts, pen = [], "M"
    for point in points:
        if point is not None:
            parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}" + ("h.01" if pen == "M" else ""))
        pen = "M" if point is None else "L"
    return "".join(parts)


def curve(line: Line, x_axis: Axis, y_axis: Axis, unit: str) -> str:
    """The SVG of one line: faint raw values, the curve, its markers, and tooltips on large targets."""

    def place(values: Sequence[float]) -> list[tuple[float, float] | None]:
        seen = (math.isfinite(v) and (v > 0 or not y_axis.log) for v in values)
        return [(x_axis.at(a), y_axis.at(b)) if ok else None for a, b, ok in zip(line.x, values, seen)]

    points = place(line.y)
    color, dashes = f"s{line.style % COLORS}", " dashed" if line.dashed else ""
    out = []
    if line.band is not None:
        low, high = (place(edge) for edge in line.band)
        around = [point for point in [*low, *reversed(high)] if point is not None]
        out.append(f'<path class="band {color}" d="{path(around)}Z"/>')
    if line.raw is not None:
        out.append(f'<path class="line faint {color}" d="{path(place(line.raw))}"/>')
    out.append(f'<path class="line {color}{dashes}" d="{path(points)}"/>')
    if line.dashed:  # a reference line: the curve it belongs to carries the points
        level = points[0] if len(points) == 1 else None
        if level is not None:
            out = [f'<path class="line {color}{dashes}" d="M{x_axis.start} {level[1]:.1f}H{x_axis.end}"/>']
        return "".join(out)
    if len(points) <= MARKED_POINTS:
        out += [marker(line.style, *point) for point in points if point is not None]
    stride = max(1, math.ceil(len(points) / HOVER_POINTS))
    shown = sorted({*range(0, len(points), stride), len(points) - 1})
    for index in shown:
        point = points[index] if points else None
        if point is None:
            continue
        text = f"{line.name}\nstep {number(line.x[index], 6)}: {number(line.y[index])} {unit}".rstrip()
        if line.raw is not None:
            text += f" (before smoothing {number(line.raw[index])})"
        out.append(
            f'<circle class="hit {color}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="6">'
            f"<title>{escape(text)}</title></circle>"
        )
    return "".join(out)


def frame(x_axis: Axis, y_axis: Axis, x_name: str, y_name: str) -> str:
    """The SVG of grid lines, tick labels and the axes' names."""
    out = []
    for value, text in zip(y_axis.ticks, tick_labels(y_axis.ticks)):
        y = y_axis.at(value)
        out.append(f'<path class="grid" d="M{x_axis.start:.1f} {y:.1f}H{x_axis.end:.1f}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y + 3.5:.1f}">{text}</text>')
    for value, text in zip(x_axis.ticks, tick_labels(x_axis.ticks)):
        x = x_axis.at(value)
        out.append(f'<path class="rule" d="M{x:.1f} {y_axis.start:.1f}v4"/>')
        out.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{y_axis.start + 16:.1f}">{text}</text>')
    out.append(f'<path class="rule" d="M{x_axis.start:.1f} {y_axis.start:.1f}H{x_axis.end:.1f}"/>')
    middle = (y_axis.start + y_axis.end) / 2
    out.append(
        f'<text class="name" text-anchor="middle" x="{(x_axis.start + x_axis.end) / 2:.1f}" '
        f'y="{y_axis.start + 31:.1f}">{escape(x_name)}</text>'
        f'<text class="name" text-anchor="middle" transform="translate(11 {middle:.1f}) rotate(-90)">'
        f"{escape(y_name)}</text>"
    )
    return "".join(out)


def legend(lines: Sequence[Line]) -> str:
    """One entry per line with its stroke and marker, as an HTML list that wraps."""
    items = []
    for line in lines:
        dashes = " dashed" if line.dashed else ""
        dot = "" if line.dashed or len(line.x) > MARKED_POINTS else marker(line.style, 13, 6)
        items.append(
            f'<li><svg width="26" height="12" aria-hidden="true">'
            f'<path class="line s{line.style % COLORS}{dashes}" d="M1 6H25"/>{dot}</svg>'
            f"{escape(line.name)}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    zero: bool = False,
    log: bool = False,
    y_range: tuple[float, float] | None = None,
    width: int = 520,
    height: int = 270,
) -> str:
    """One chart over steps as an HTML `<figure>`; says so in words when nothing can be drawn.

    Args: lines: the curves. unit: of the values. zero: the axis includes 0. log: logarithmic where the values
    allow it. y_range: shared by several charts. width, height: of the drawing, in its own units.
    """
    head = f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
    every = [v for line in lines for v in (*line.y, *(line.raw or ()), *(v for edge in line.band or () for v in edge))]
    positive = [v for v in every if math.isfinite(v) and v > 0]
    log = log and len(positive) > 1 and max(positive) > 50 * min(positive)
    span = y_range or limits(positive if log else every, zero and not log)
    steps = limits(x for line in lines for x in line.x)
    if span is None or steps is None:
        return head + '<p class="empty">No values to draw.</p></figure>'
    y_ticks = log_ticks(*span) if log else ticks(*span)
    x_low, x_high = steps
    alone = {x for line in lines for x in line.x}
    if len(alone) == 1:
        x_low, x_high = min(alone) - 1, max(alone) + 1  # a single step stands in the middle
    elif 0 < x_low < 0.1 * x_high:
        x_low = 0.0
    x_ticks = [v for v in ticks(x_low, x_high, 6, whole=True) if x_low - 1e-9 <= v <= x_high + 1e-9 and v >= 0]
    x_axis = Axis(x_low, x_high, LEFT, width - RIGHT, x_ticks)
    y_axis = Axis(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP, y_ticks, log)
    drawn = "".join(curve(line, x_axis, y_axis, unit) for line in lines)
    axes = frame(x_axis, y_axis, "step", f"{unit}, log scale".strip(", ") if log else unit)
    label = escape(f"{title}: {', '.join(line.name for line in lines)} over steps")
    below = legend(lines) if len(lines) > 1 else ""
    canvas = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    return f"{head}{canvas}{axes}{drawn}</svg>{below}</figure>"
