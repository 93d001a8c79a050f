"""The report's part on the mixture: what is drawn is what was recorded."""

import re

import pytest
from test_report import EVALS, page_of, workdir

from jaxkd.report import mixture, records
from jaxkd.runtime import files

NAMES = ("code", "math")


def lines(count=3, measured=True):
    rows = []
    for i in range(count):
        columns = {"share": (0.75 - 0.1 * i, 0.25 + 0.1 * i), "rows": (100, 100), "drawn": (100 * i,) * 2}
        columns |= {"epochs": (0.5 * i,) * 2} | ({"ratio": (1.5, 1.25)} if measured else {})
        by_domain = {key: dict(zip(NAMES, values, strict=True)) for key, values in columns.items()}
        times = {"rule_s": 0.25, "rule_share": 0.0123 * i} if measured and i else {}
        rows.append(records.interval(20 * i, i, 20480 * i, by_domain, **times))
    return rows


def write(directory, rows):
    files.write_jsonl(directory / "mixture.jsonl", rows)
    return directory


def test_the_bands_are_the_shares(tmp_path):
    """Every interval is as wide as its steps, and its bands fill the height in proportion to the shares."""
    page = page_of(write(workdir(tmp_path), lines()))
    chart = page[page.index("Shares that rows are drawn with") :].partition("</svg>")[0]
    bands = re.findall(r'<rect class="area s(\d)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', chart)
    assert len(bands) == 6
    columns = [bands[i : i + 2] for i in (0, 2, 4)]
    height = sum(float(band[4]) for band in columns[0])
    for i, (code, math) in enumerate(columns):
        assert float(code[4]) / height == pytest.approx(0.75 - 0.1 * i, abs=0.002)
        assert float(code[2]) == pytest.approx(float(math[2]) + float(math[4]), abs=0.11)  # stacked
        assert code[0] != math[0]
    widths = [float(band[3]) for column in columns for band in column]
    assert max(widths) - min(widths) < 0.11  # 60 steps in three intervals
    for following, column in zip(columns[1:], columns):
        assert float(column[0][1]) + float(column[0][3]) == pytest.approx(float(following[0][1]), abs=0.01)
    column = page[page.index("step 20<") :].partition("</g></g>")[0]
    assert " code: 65%<" in column.replace(" %", "%").replace("65.00", "65")
    ratio = page[page.index("Perplexity of the student over") :].partition("</figure>")[0]
    assert " code: 1.500<" in ratio[ratio.index("step 40<") :]
    epochs = page[page.index("Epochs before each interval") :].partition("</figure>")[0]
    assert " math: 1<" in epochs[epochs.index("step 40<") :]
    assert "measured 2 times, in 0.250 s (median), 1.8 %" in page
    assert "Weights in the loss" not in page
    # A rule that measures nothing has the ratios of its evaluations.
    page = page_of(write(workdir(tmp_path), lines(measured=False)))
    first = 6.071 - 3.125
    assert f" code: {2.718281828**first:.2f}<" in page
    assert "rule measured" not in page
    assert mixture.cost(lines(measured=False)) == ""
    # Weights in the loss are drawn with their average.
    rows = [row | {f"{key}/{n}": 0.5 for key in ("weight", "average") for n in NAMES} for row in lines(measured=False)]
    page = page_of(write(workdir(tmp_path), rows))
    assert "Weights in the loss" in page
    assert "Weights, averaged over the steps so far" in page


def test_many_intervals_stay_a_small_page_and_none_is_no_section(tmp_path):
    page = page_of(write(workdir(tmp_path), [row | {"step": i} for i, row in enumerate(lines(1, False) * 2000)]))
    assert page.count('<rect class="area') <= 2 * (2 * mixture.SPANS + 2)  # drawn for both widths
    (tmp_path / "run-1" / "mixture.jsonl").unlink()
    assert "<h2>Mixture" not in page_of(workdir(tmp_path))
    assert mixture.section([], EVALS, 60, {"code": 0}) == ""
