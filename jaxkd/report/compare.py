"""Finished runs side by side: mean and spread over seeds, and which differences exceed that spread."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.special import stdtrit

from jaxkd.report import records
from jaxkd.report.records import MEAN, Row, by_domain, leaves, missing, read_json, read_run, value_of
from jaxkd.report.text import aligned
from jaxkd.runtime import files

METRICS = ("student_nats", "kl", "agreement")
SHORT = {"student_nats": "student nats", "kl": "KL", "agreement": "agreement, %"}
CONFIDENCE = 0.95


class Finished(NamedTuple):
    """A run that reached its last step."""

    workdir: Path
    seed: int
    config: Row
    evals: dict[str, list[Row]]  # by domain, in the order of steps
    metrics: list[Row]


class Variant(NamedTuple):
    """Runs whose configs differ in the seed alone."""

    name: str
    runs: tuple[Finished, ...]

    def values(self, domain: str, key: str) -> list[float]:
        """A figure of the last evaluation of each run, NaN where there is none."""
        return [value_of(run.evals.get(domain, [{}])[-1], key) for run in self.runs]


class Comparison(NamedTuple):
    """Variants on the same rows, the one that the others are compared with, and why runs were left out."""

    variants: tuple[Variant, ...]
    baseline: str
    domains: tuple[str, ...]  # the mean is the last
    left_out: tuple[str, ...]  # a sentence each

    def difference(self, variant: Variant, domain: str, key: str) -> "Difference | None":
        """A variant's difference from the baseline; None for the baseline itself."""
        baseline = next(v for v in self.variants if v.name == self.baseline)
        return None if variant is baseline else difference(variant.values(domain, key), baseline.values(domain, key))


def gather(directories: Sequence[Path], baseline: str | None = None) -> Comparison:
    """Runs, or those inside a directory such as a sweep's, as variants; the first is the baseline unless it is named.

    A directory without runs is a FileNotFoundError; no finished run, or an unknown baseline, a ValueError.
    """
    workdirs: list[Path] = []
    for directory in directories:  # a run's, or one with runs up to two levels below it
        nested = (path.parent for depth in ("*", "*/*") for path in directory.glob(f"{depth}/config.json"))
        runs = [directory] if (directory / "config.json").is_file() else sorted(nested)
        if not runs:
            raise missing(directory, "config.json")
        workdirs += runs
    groups: dict[str, list[Finished]] = {}
    names: dict[str, str] = {}
    left_out, rows = [], None
    for workdir in workdirs:
        try:
            config, info = read_json(workdir, "config.json"), read_run(workdir)
            evals, metrics = records.rows(workdir, records.EVALS), records.rows(workdir, records.METRICS)
        except (FileNotFoundError, files.Torn) as error:
            left_out.append(str(error))
            continue
        steps, seed = int(config["run"]["steps"]), int(config["run"]["seed"])
        evaluated = max((int(row["step"]) for row in evals if row.get("domain") == MEAN), default=-1)
        if evaluated < steps:
            reached = max([evaluated, *(int(row["step"]) for row in metrics)], default=0)
            left_out.append(f"{workdir} is not finished: {max(reached, 0)} of {steps} steps")
            continue
        fingerprints = {domain.name: domain.fingerprint for domain in info.domains}
        rows = rows or fingerprints
        if fingerprints != rows:
            other = ", ".join(n for n in {**rows, **fingerprints} if rows.get(n) != fingerprints.get(n))
            left_out.append(f"{workdir} is of other rows than the first run: {other}")
            continue
        key = json.dumps({**config, "run": {**config["run"], "seed": 0}}, sort_keys=True)
        if same := [other for other in groups.get(key, ()) if other.seed == seed]:
            left_out.append(f"{workdir} has the config and seed of {same[0].workdir}")
            continue
        groups.setdefault(key, []).append(Finished(workdir, seed, config, by_domain(evals), metrics))
        resolved = workdir.resolve()  # of a sweep: VARIANT/seed-N
        names.setdefault(key, resolved.parent.name if re.fullmatch(r"seed-\d+", resolved.name) else resolved.name)
    if not groups:
        raise ValueError("; ".join(left_out) or "no run is finished")
    counts = Counter(names.values())
    unique = {k: name if counts[name] == 1 else str(groups[k][0].workdir) for k, name in names.items()}
    variants = tuple(Variant(unique[k], tuple(sorted(runs, key=lambda r: r.seed))) for k, runs in groups.items())
    if baseline is not None and baseline not in unique.values():
        raise ValueError(f"there is no finished variant '{baseline}': there are {', '.join(unique.values())}")
    domains = tuple(variants[0].runs[0].evals)
    return Comparison(variants, baseline or variants[0].name, domains, tuple(left_out))


class Spread(NamedTuple):
    """A figure over seeds."""

    mean: float
    std: float | None  # of the sample, None for a single run
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and number of values."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


class Difference(NamedTuple):
    """A difference of two means and its 95% confidence interval."""

    value: float
    low: float | None  # None where a side has a single run
    high: float | None

    @property
    def beyond_noise(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Welch's interval of mean(values) - mean(reference).

        d +- t(nu) sqrt(s1^2/n1 + s2^2/n2),  nu = (s1^2/n1 + s2^2/n2)^2 / (s1^4/(n1^2 (n1-1)) + s2^4/(n2^2 (n2-1)))

    Unequal variances; runs are taken as independent, not paired by seed. Source: Welch 1947, Biometrika 34.
    """
    value = statistics.fmean(values) - statistics.fmean(reference)
    if min(len(values), len(reference)) < 2:
        return Difference(value, None, None)
    parts = [(statistics.variance(side) / len(side), len(side) - 1) for side in (values, reference)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Difference(value, value, value)
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return Difference(value, value - half, value + half)


def changes(c: Comparison) -> dict[str, dict[str, Any]]:
    """Values by variant of the config's keys in which variants differ; "" where a config does not have the key."""
    tables = {v.name: leaves(v.runs[0].config) for v in c.variants}
    keys = dict.fromkeys(key for table in tables.values() for key in table if key != "run.seed")
    values = {key: {name: table.get(key, "") for name, table in tables.items()} for key in keys}
    return {key: by for key, by in values.items() if any(value != by[c.baseline] for value in by.values())}


def plus_minus(s: Spread, key: str) -> str:
    """`mean ± std` of a metric, or the mean alone of a single run; agreement in percent."""
    scale, digits = (100, 1) if key == "agreement" else (1, 3)
    return f"{scale * s.mean:.{digits}f}" + ("" if s.std is None else f" ± {scale * s.std:.{digits}f}")


def interval(d: Difference | None, key: str) -> str:
    """`-0.031 [-0.050, -0.012] *`, the star where the interval excludes zero; agreement in percentage points."""
    if d is None:
        return ""
    scale, digits = (100, 1) if key == "agreement" else (1, 3)
    value, *ends = (f"{scale * x:+.{digits}f}" for x in (d.value, d.low, d.high) if x is not None)
    return f"{value} [{', '.join(ends)}]{' *' if d.beyond_noise else ''}" if ends else value


def means(c: Comparison) -> list[list[str]]:
    """A table: of each variant the means over domains and, with several, their differences from the baseline."""
    several = len(c.variants) > 1
    rows = [["variant", "runs"], *([v.name, str(len(v.runs))] for v in c.variants)]
    for key in METRICS:
        rows[0] += [SHORT[key], f"over {c.baseline}"] if several else [SHORT[key]]
        for v, row in zip(c.variants, rows[1:]):
            row += [plus_minus(spread(v.values(MEAN, key)), key)]
            row += [interval(c.difference(v, MEAN, key), key)] if several else []
    return rows


def by_variant(c: Comparison, domains: Sequence[str], key: str) -> list[list[str]]:
    """A table: `mean ± std (difference *)` of each variant (rows) in each domain (columns)."""

    def cell(variant: Variant, domain: str) -> str:
        difference = re.sub(r" \[.*\]", "", interval(c.difference(variant, domain, key), key))
        return plus_minus(spread(variant.values(domain, key)), key) + (f" ({difference})" if difference else "")

    return [["variant", *domains], *([v.name, *(cell(v, domain) for domain in domains)] for v in c.variants)]


def text(c: Comparison) -> str:
    """What differs, a table of means and one of domains, and what the marks mean."""
    differing = [["setting", *(v.name for v in c.variants)]]
    differing += [[key, *(str(by[v.name]) for v in c.variants)] for key, by in changes(c).items()]
    parts = [aligned(differing)] if len(differing) > 1 else []
    domains = aligned(by_variant(c, c.domains[:-1], "student_nats"))
    parts += [aligned(means(c)), "student nats by domain:", domains, note(c)]
    return "\n\n".join([*parts, *(f"left out: {line}" for line in c.left_out)])


def note(c: Comparison) -> str:
    """What the figures are, and what a star does not say."""
    compared = len(c.domains) * (len(c.variants) - 1)
    text = "Mean ± standard deviation over seeds, last evaluation."
    if compared:
        text += (
            f" A star: the {CONFIDENCE:.0%} Welch interval of the difference from {c.baseline} excludes zero, without "
            f"a correction for the {compared} differences per figure. Seeds change the order of rows, not the held-out "
            "ones, so this is the noise of training alone."
        )
    return text


def as_json(c: Comparison) -> dict[str, Any]:
    """Every figure of every domain."""

    def figures(variant: Variant, domain: str, key: str) -> dict[str, Any]:
        values: dict[str, Any] = spread(variant.values(domain, key))._asdict()
        d = c.difference(variant, domain, key)
        return values if d is None else values | {"difference": d._asdict() | {"beyond_noise": d.beyond_noise}}

    return {
        "baseline": c.baseline,
        "confidence": CONFIDENCE,
        "differs": changes(c),
        "variants": [
            {
                "name": v.name,
                "seeds": [run.seed for run in v.runs],
                "runs": [str(run.workdir) for run in v.runs],
                "domains": {d: {key: figures(v, d, key) for key in METRICS} for d in c.domains},
            }
            for v in c.variants
        ],
        "left_out": list(c.left_out),
    }
