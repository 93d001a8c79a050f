"""Numbers and tables for readers: on the console, and as HTML."""

import html
import math
from collections.abc import Sequence


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant ones, 12.5k and 135M for large values, 3e-4 for tiny ones; a dash for None and NaN."""
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
    elif size < 1e15:
        power, suffix = next((p, s) for p, s in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if size >= p)
        text = f"{value / power:.{digits}g}{suffix}"
    else:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", "−", 1) if value < 0 else text


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with one decimal; a dash for None and NaN."""
    if fraction is None or not math.isfinite(fraction):
        return "–"
    return f"{100 * fraction:.1f} %".replace("-", "−")


def fixed(value: float) -> str:
    """Three decimals, so that nats and bits align in a column."""
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else number(value)


def count(value: float) -> str:
    """An integer with thousands separators."""
    return f"{int(value):,}" if math.isfinite(value) else "–"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as plain text, the first one the head: first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *map(str.rstrip, lines[1:])])


def escape(value: object) -> str:
    """Any value as text that is safe inside HTML and its attributes."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, last: bool = False) -> str:
    """An HTML table that scrolls sideways; cells are HTML. `last`: the last row is a total."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        ('<tr class="total">' if last and index == len(rows) - 1 else "<tr>")
        + "".join(f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, *parts: str) -> str:
    """A part of the page under a heading; nothing when all of it is empty."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def document(title: str, style: str, body: str) -> str:
    """A whole HTML page that refers to nothing outside of it."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def amount(value: float) -> str:
    """An integer with thousands separators from 100 on, else three significant digits: no small amount is 0."""
    return f"{value:,.0f}" if value >= 100 else number(value, 3)
