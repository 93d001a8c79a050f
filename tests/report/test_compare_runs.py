"""Runs side by side: the figures against hand-made ones, and what may not be compared."""

import json
import re
import statistics
from xml.etree import ElementTree

import pytest

from jaxkd.cli.main import main
from jaxkd.report import compare, compare_page


def write_run(workdir, seed, nats, steps=10, reached=None, fingerprint="f", mixture="natural"):
    """A run's files: two domains at `nats` and `nats + 1`, their mean between."""
    workdir.mkdir(parents=True)
    config = {"objective": {"ce": {"weight": 1.0}}, "data": {"mixture": mixture}, "run": {"steps": steps, "seed": seed}}
    (workdir / "config.json").write_text(json.dumps(config))
    run = {"domains": [{"name": name, "fingerprint": fingerprint} for name in ("code", "math")]}
    (workdir / "run.json").write_text(json.dumps(run))
    reached = steps if reached is None else reached
    rows, last = [], nats
    for step, nats in ((0, 6.0), (reached, last)):
        for name, value in (("code", nats), ("math", nats + 1), ("mean", nats + 0.5)):
            rows.append({"step": step, "domain": name, "student_nats": value, "teacher_nats": 3.0})
            rows[-1] |= {"kl": value - 3.25, "agreement": 0.25}
    (workdir / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"step": step, "loss": 5.0 + seed, "ce": 5.0 + seed} for step in range(1, reached + 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return workdir


@pytest.fixture
def swept(tmp_path):
    """Three variants: `far` is below `kd` by more than the seeds differ, `near` is not."""
    for seed, (kd, near, far) in enumerate([(4.0, 4.05, 3.5), (4.1, 4.0, 3.52), (4.2, 4.1, 3.54)]):
        write_run(tmp_path / "kd" / f"seed-{seed}", seed, kd)
        write_run(tmp_path / "near" / f"seed-{seed}", seed, near, mixture="uniform")
        write_run(tmp_path / "far" / f"seed-{seed}", seed, far, mixture="ddk(alpha=0.5)")
    return tmp_path


def test_mean_spread_and_welch(swept):
    """Against numbers worked out by hand: variances 0.01 and 0.0004, three runs each."""
    found = compare.gather([swept], against="kd")
    assert [(v.name, [run.seed for run in v.runs]) for v in found.variants] == [
        ("far", [0, 1, 2]),
        ("kd", [0, 1, 2]),
        ("near", [0, 1, 2]),
    ]
    assert found.domains == ("code", "math", "mean")
    far, kd, near = found.variants
    s = compare.spread(kd.values("mean", "student_nats"))
    assert s == pytest.approx((4.6, 0.1, 3))
    assert compare.spread(far.values("math", "kl")).mean == pytest.approx(3.52 + 1 - 3.25)
    d = compare.against(found, far, "mean", "student_nats")
    # s^2/n: 0.003333 and 0.000133; 2.16 degrees of freedom, t(0.975) = 4.01
    assert d.value == pytest.approx(-0.58)
    assert (d.high - d.low) / 2 == pytest.approx(4.01 * (0.01 / 3 + 0.0004 / 3) ** 0.5, rel=5e-3)
    assert d.beyond_noise
    assert not compare.against(found, near, "mean", "student_nats").beyond_noise
    assert compare.against(found, kd, "mean", "student_nats") is None


def test_one_run_has_no_noise_to_compare_with():
    d = compare.difference([3.0], [4.0, 4.1])
    assert (d.value, d.low, d.high, d.beyond_noise) == (pytest.approx(-1.05), None, None, False)
    assert compare.interval(d) == "-1.050"
    assert compare.spread([3.0]) == (3.0, None, 1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """2,000 experiments of three and four runs without a difference: the star may not shine in more than about 5%."""
    import numpy as np

    rng = np.random.default_rng(0)
    draws = [compare.difference(rng.normal(size=3).tolist(), (3 * rng.normal(size=4)).tolist()) for _ in range(2000)]
    assert 0.02 < statistics.fmean(d.beyond_noise for d in draws) < 0.075


def test_tables(swept):
    text = compare.text(compare.gather([swept], against="kd"))
    lines = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line}
    assert "far 3.520 ± 0.020 * 4.520 ± 0.020 *" in lines["far"]
    assert re.search(r"far\s+3\s+4\.020 ± 0\.020\s+0\.770 ± 0\.020\s+25\.0 ± 0\.0\s+-0\.580 \[.*\] \*", text)
    assert "Nothing is corrected for the 6 differences" in text


def test_what_cannot_be_compared_is_named(swept):
    write_run(swept / "cut" / "seed-0", 0, 5.0, reached=7)
    write_run(swept / "other" / "seed-0", 0, 5.0, fingerprint="g")
    write_run(swept / "copy" / "seed-0", 0, 4.0)
    found = compare.gather([swept])
    assert [v.name for v in found.variants] == ["copy", "far", "near"]
    told = "\n".join(found.left_out)
    assert "cut/seed-0 is not finished: 7 of 10 steps" in told
    assert "other/seed-0 is of other rows than the first run: code, math" in told
    assert re.search(r"kd/seed-0 is \S*copy/seed-0 once more", told)


def test_errors(swept, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*empty"):
        compare.gather([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no finished variant 'x' to compare with: there are far, kd, near"):
        compare.gather([swept], against="x")
    alone = write_run(tmp_path / "half", 0, 5.0, reached=2)
    with pytest.raises(ValueError, match="half is not finished: 2 of 10 steps"):
        compare.gather([alone])


def test_json_and_page(swept, capsys):
    main(["compare", str(swept), "--baseline", "kd", "--json"])
    found = json.loads(capsys.readouterr().out)
    [far] = [v for v in found["variants"] if v["name"] == "far"]
    assert far["domains"]["mean"]["student_nats"]["mean"] == pytest.approx(4.02)
    assert far["domains"]["mean"]["student_nats"]["difference"]["beyond_noise"]
    assert found["differs"] == {"data.mixture": {"far": "ddk(alpha=0.5)", "kd": "natural", "near": "uniform"}}
    page = (swept / "compare.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    drawn = re.findall(r"<svg viewBox.*?</svg>", page, re.S)
    assert len(drawn) == 7  # three figures, the ratios, one term, two domains
    for svg in drawn:
        ElementTree.fromstring(svg)
    assert "far (-0.580)" in page
    assert "near (" not in page.split("</header>")[0]


def test_band_is_one_deviation_around_the_mean(swept):
    kd = next(v for v in compare.gather([swept]).variants if v.name == "kd")
    line = compare_page.band(kd, 0, compare_page.evaluated("code", "student_nats"), 1)
    assert line.x == [0, 10]
    assert line.y == pytest.approx([6.0, 4.1])
    assert line.band[0] == pytest.approx([6.0, 4.0])
    assert line.band[1] == pytest.approx([6.0, 4.2])
