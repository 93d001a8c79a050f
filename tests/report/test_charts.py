"""Numbers, tables and the geometry of charts."""

import itertools
import math
import re

import pytest

from jaxkd.report import charts, text


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
    assert charts.ticks(0, 3, 6, whole=True) == [0, 1, 2, 3]


@pytest.mark.parametrize(("low", "high"), [(0.7, 45.0), (1.0, 10.0), (1e-3, 1e6), (2.0, 3.0)])
def test_log_ticks_hold_the_range(low, high):
    values = charts.log_ticks(low, high)
    assert values == sorted(values)
    assert values[0] <= low * 1.001
    assert values[-1] >= high * 0.999
    assert 2 <= len(values) <= 10


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (1.23456, "1.235"), (134_515_008, "134.5M"), (12_288, "12.29k"), (3e-4, "3e-4"),
        (-0.5, "−0.5000"),
        (2, "2"), (1024, "1024"), (math.nan, "–"), (None, "–"), (-math.inf, "−∞"), (1e20, "1.000e+20"),
    ],
)  # fmt: skip
def test_number(value, expected):
    assert text.number(value) == expected


def test_alignment_smoothing_and_tick_labels():
    assert text.aligned([["name", "n"], ["a", "1,000"]]) == "name      n\n-----------\na     1,000"
    assert charts.smooth([2.0] * 9, 5) == pytest.approx([2.0] * 9)
    smoothed = charts.smooth([1.0, math.nan, 3.0], 3)
    assert smoothed[0] == 1.0
    assert math.isnan(smoothed[1])
    assert len(charts.smooth([1.0, 2.0], 10)) == 2
    assert charts.tick_labels([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert charts.tick_labels([0, 1e-4, 2e-4]) == ["0", "1e-4", "2e-4"]
    assert charts.tick_labels([0, 25_000, 50_000]) == ["0", "25k", "50k"]


def test_hover_columns_cover_the_plot_without_overlap():
    """However many steps: at most so many columns, edge to edge, each with the value of every line."""
    x = list(range(1000))
    lines = [charts.Line("a", x, [2.0 * v for v in x]), charts.Line("b", x[::10], [0.5] * 100, 1)]
    drawing = charts.figure("t", lines)(charts.NARROW)
    columns = [
        tuple(map(float, c)) for c in re.findall(r'<g class="at"><rect x="([\d.]+)" y="10" width="([\d.]+)"', drawing)
    ]
    assert len(columns) == charts.HOVER_COLUMNS
    assert columns[0][0] == charts.LEFT
    for (left, width), (following, _) in itertools.pairwise(columns):
        assert left + width == pytest.approx(following, abs=0.11)
    assert sum(columns[-1]) == pytest.approx(charts.NARROW - charts.RIGHT, abs=0.11)
    assert drawing.count(" a: ") == drawing.count(" b: ") + 1 == charts.HOVER_COLUMNS  # b ends before the last column
