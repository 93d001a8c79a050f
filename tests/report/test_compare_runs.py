"""Runs side by side: the figures against hand-made ones, and what may not be compared."""

import json
import re
import statistics
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxkd.cli.main import main
from jaxkd.report import compare, compare_page, records
from jaxkd.report.records import DomainInfo, RunInfo
from jaxkd.runtime import files


def write_run(workdir, seed, nats, steps=10, reached=None, fingerprint="f", mixture="natural", kl="forward_kl"):
    """A run's files: two domains at `nats` and `nats + 1`, their mean between."""
    workdir.mkdir(parents=True)
    objective = {"ce": {"weight": 1.0, "divergence": "next_token"}, "kd": {"weight": 0.2, "divergence": kl}}
    config = {"objective": objective, "data": {"mixture": mixture}, "run": {"steps": steps, "seed": seed}}
    files.write_json(workdir / "config.json", config)
    domains = tuple(DomainInfo(name, fingerprint=fingerprint) for name in ("code", "math"))
    records.write_run(workdir, RunInfo(domains=domains))
    reached = steps if reached is None else reached
    rows, last = [], nats
    for step, nats in ((0, 6.0), (reached, last)):
        for name, value in (("code", nats), ("math", nats + 1), ("mean", nats + 0.5)):
            figures = (value, 3.0, value, 3.0, value - 3.25, 0.25, 0.05, 0.04, None, 2048)
            rows.append(records.Evaluation(step, name, *figures)._asdict())
    files.write_jsonl(workdir / "evals.jsonl", rows)
    values, times = {"loss": 5.0 + seed, "ce": 5.0 + seed, "kd": 1.0}, {"tokens_per_s": 512.0, "step_s": 2.0}
    metrics = [records.training(step, values, tokens=1024 * step, **times) for step in range(1, reached + 1)]
    files.write_jsonl(workdir / "metrics.jsonl", metrics)
    return workdir


@pytest.fixture
def swept(tmp_path):
    """Three variants: `far` is below `kd` by more than the seeds differ, `near` is not."""
    for seed, (kd, near, far) in enumerate([(4.0, 4.05, 3.5), (4.1, 4.0, 3.52), (4.2, 4.1, 3.54)]):
        write_run(tmp_path / "kd" / f"seed-{seed}", seed, kd)
        write_run(tmp_path / "near" / f"seed-{seed}", seed, near, mixture="uniform")
        write_run(tmp_path / "far" / f"seed-{seed}", seed, far, mixture="ddk(alpha=0.5)")
    return tmp_path


def test_mean_spread_welch_and_bands(swept):
    """Against numbers worked out by hand: variances 0.01 and 0.0004, three runs each."""
    comparison = compare.gather([swept], "kd")
    assert [(v.name, [run.seed for run in v.runs]) for v in comparison.variants] == [
        ("far", [0, 1, 2]),
        ("kd", [0, 1, 2]),
        ("near", [0, 1, 2]),
    ]
    assert comparison.domains == ("code", "math", "mean")
    far, kd, near = comparison.variants
    s = compare.spread(kd.values("mean", "student_nats"))
    assert s == pytest.approx((4.6, 0.1, 3))
    assert compare.spread(far.values("math", "kl")).mean == pytest.approx(3.52 + 1 - 3.25)
    d = comparison.difference(far, "mean", "student_nats")
    # s^2/n: 0.003333 and 0.000133; 2.16 degrees of freedom, t(0.975) = 4.01
    assert d.value == pytest.approx(-0.58)
    assert (d.high - d.low) / 2 == pytest.approx(4.01 * (0.01 / 3 + 0.0004 / 3) ** 0.5, rel=5e-3)
    assert d.beyond_noise
    assert not comparison.difference(near, "mean", "student_nats").beyond_noise
    assert comparison.difference(kd, "mean", "student_nats") is None
    # One run has no noise to compare with.
    d = compare.difference([3.0], [4.0, 4.1])
    assert (d.value, d.low, d.high, d.beyond_noise) == (pytest.approx(-1.05), None, None, False)
    assert compare.interval(d, "kl") == "-1.050"
    assert compare.spread([3.0]) == (3.0, None, 1)
    # A band is one deviation around the mean.
    kd = next(v for v in compare.gather([swept]).variants if v.name == "kd")
    line = compare_page.band(kd, 0, compare_page.evaluated("code", "student_nats"), 1)
    assert line.x == [0, 10]
    assert line.y == pytest.approx([6.0, 4.1])
    assert line.band[0] == pytest.approx([6.0, 4.0])
    assert line.band[1] == pytest.approx([6.0, 4.2])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """2,000 experiments of three and four runs without a difference: the star may not shine in more than about 5%."""
    rng = np.random.default_rng(0)
    draws = [compare.difference(rng.normal(size=3).tolist(), (3 * rng.normal(size=4)).tolist()) for _ in range(2000)]
    assert 0.02 < statistics.fmean(d.beyond_noise for d in draws) < 0.075


def test_console_tables_json_and_page(swept, capsys):
    text = compare.text(compare.gather([swept], "kd"))
    differing, means, _, domains, note = (" ".join(part.split()) for part in text.split("\n\n"))
    assert differing.endswith("data.mixture ddk(alpha=0.5) natural uniform")
    assert re.search(r"far 3 4\.020 ± 0\.020 -0\.580 \[\S+, \S+\] \* 0\.770 ± 0\.020 -0\.580 .* \* 25\.0 ± 0\.0", means)
    assert "far 3.520 ± 0.020 (-0.580 *) 4.520 ± 0.020 (-0.580 *)" in domains
    assert "6 differences" in note
    one = compare.gather([swept / "kd"])
    assert "differences" not in compare.text(one)
    assert "nothing to compare" in compare_page.page(one)
    # JSON and page.
    (swept / "far" / "seed-0" / "report.html").write_text("")
    main(["compare", str(swept), "--baseline", "kd", "--json"])
    values = json.loads(capsys.readouterr().out)
    [far] = [v for v in values["variants"] if v["name"] == "far"]
    assert far["domains"]["mean"]["student_nats"]["mean"] == pytest.approx(4.02)
    assert far["domains"]["mean"]["student_nats"]["difference"]["beyond_noise"]
    assert values["differs"] == {"data.mixture": {"far": "ddk(alpha=0.5)", "kd": "natural", "near": "uniform"}}
    page = (swept / "compare.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    drawn = re.findall(r"<svg viewBox.*?</svg>", page, re.S)
    assert len(drawn) == 8  # three figures, the ratios, two terms, two domains
    for svg in drawn:
        ElementTree.fromstring(svg)
    assert "far (-0.580) differs" in page
    assert "near (" not in page.split("</header>")[0]
    assert re.findall("<h2>(.*?)</h2>", page)[0] == "What differs"
    links = re.findall(r'<a href="(.*?)">', page)
    assert links[0] == "far/seed-0/report.html"
    assert all((swept / link).exists() for link in links)
    assert len(links) == 9


def test_what_cannot_be_compared_is_named(swept, tmp_path):
    write_run(swept / "cut" / "seed-0", 0, 5.0, reached=7)
    write_run(swept / "other" / "seed-0", 0, 5.0, fingerprint="g")
    write_run(swept / "copy" / "seed-0", 0, 4.0)
    (write_run(swept / "torn" / "seed-0", 0, 4.0) / "run.json").write_text("")
    comparison = compare.gather([swept])
    assert [v.name for v in comparison.variants] == ["copy", "far", "near"]
    left_out = "\n".join(comparison.left_out)
    assert re.search(r"cut/seed-0 .* 7 of 10 steps", left_out)
    assert re.search(r"other/seed-0 .*: code, math", left_out)
    assert re.search(r"kd/seed-0 .* \S*copy/seed-0", left_out)
    assert "torn/seed-0/run.json" in left_out
    with pytest.raises(FileNotFoundError, match=r"config\.json in .*empty"):
        compare.gather([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"'x'.* copy, far, near"):
        compare.gather([swept], "x")
    alone = write_run(tmp_path / "half", 0, 5.0, reached=2)
    with pytest.raises(ValueError, match=r"half.* 2 of 10 steps"):
        compare.gather([alone])


def test_a_term_that_is_another_loss_has_its_own_axis(tmp_path):
    for name, kl in (("a", "forward_kl"), ("b", "reverse_kl"), ("c", "forward_kl")):
        write_run(tmp_path / name, 0, 4.0, kl=kl, mixture=name)
    terms = compare_page.logged_terms(compare.gather([tmp_path]))
    assert [(title, [v.name for v in variants]) for title, _, variants in terms] == [
        ("ce", ["a", "b", "c"]),
        ("kd: forward_kl", ["a", "c"]),
        ("kd: reverse_kl", ["b"]),
    ]
