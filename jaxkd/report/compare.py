"""Finished runs side by side: mean and spread over seeds, and which differences are more than that spread."""

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.special import stdtrit

from jaxkd.report.run import MEAN, Row, by_domain, leaves, missing, read_json, value_of
from jaxkd.runtime import files

METRICS = ("student_nats", "kl", "agreement")
CONFIDENCE = 0.95


class Finished(NamedTuple):
    """A run that reached its last step."""

    workdir: Path
    seed: int
    config: Row
    evals: dict[str, list[Row]]  # by domain, in the order of steps
    metrics: list[Row]

    def last(self, domain: str, key: str) -> float:
        """A figure of the last evaluation, NaN where there is none."""
        rows = self.evals.get(domain)
        return value_of(rows[-1], key) if rows else math.nan


class Variant(NamedTuple):
    """Runs whose configs differ in the seed alone."""

    name: str
    runs: tuple[Finished, ...]

    def values(self, domain: str, key: str) -> list[float]:
        """A figure of the last evaluation, a run each."""
        return [run.last(domain, key) for run in self.runs]


class Comparison(NamedTuple):
    """What can be held against each other, and what was left out of it."""

    variants: tuple[Variant, ...]
    against: str
    domains: tuple[str, ...]  # the mean is the last
    left_out: tuple[str, ...]  # a sentence each


def gather(places: Sequence[Path], against: str | None = None) -> Comparison:
    """Runs of several places as variants.

    Args:
        places: run directories, and directories that hold some, such as a sweep's.
        against: the variant that the others are held against; the first one when None.

    Raises:
        FileNotFoundError: a place holds no run.
        ValueError: no run is finished, or there is no such variant.
    """
    groups: dict[str, list[Finished]] = {}
    names: dict[str, str] = {}
    left_out, rows = [], None
    for workdir in (run for place in places for run in _runs(Path(place))):
        config, evals = read_json(workdir, "config.json"), files.read_jsonl(workdir / "evals.jsonl")
        steps, seed = int(config["run"]["steps"]), int(config["run"]["seed"])
        reached = max((int(row["step"]) for row in evals if row.get("domain") == MEAN), default=None)
        if reached is None or reached < steps:
            left_out.append(f"{workdir} is not finished: {_where(workdir, reached)} of {steps} steps")
            continue
        found = {d["name"]: d.get("fingerprint") for d in read_json(workdir, "run.json")["domains"]}
        rows = rows or found
        if found != rows:
            other = ", ".join(name for name in {**rows, **found} if rows.get(name) != found.get(name))
            left_out.append(f"{workdir} is of other rows than the first run: {other}")
            continue
        key = json.dumps({**config, "run": {**config["run"], "seed": 0}}, sort_keys=True)
        run = Finished(workdir, seed, config, by_domain(evals), files.read_jsonl(workdir / "metrics.jsonl"))
        same = [other for other in groups.get(key, ()) if other.seed == seed]
        if same:
            left_out.append(f"{workdir} is {same[0].workdir} once more: the same config and seed")
            continue
        groups.setdefault(key, []).append(run)
        names.setdefault(key, _name(workdir))
    if not groups:
        raise ValueError("; ".join(left_out) or "no run is finished")
    taken = list(names.values())
    named = {k: name if taken.count(name) == 1 else str(groups[k][0].workdir) for k, name in names.items()}
    variants = tuple(Variant(named[k], tuple(sorted(runs, key=lambda r: r.seed))) for k, runs in groups.items())
    known = [variant.name for variant in variants]
    if against is not None and against not in known:
        raise ValueError(f"there is no finished variant '{against}' to compare with: there are {', '.join(known)}")
    domains = tuple(variants[0].runs[0].evals)
    return Comparison(variants, against or known[0], domains, tuple(left_out))


def _runs(place: Path) -> Iterator[Path]:
    """Run directories at a place or up to two levels below it, by name."""
    found = [place] if (place / "config.json").is_file() else []
    found = found or sorted(p.parent for depth in ("*", "*/*") for p in place.glob(f"{depth}/config.json"))
    if not found:
        raise FileNotFoundError(missing(place, "config.json"))
    yield from found


def _name(workdir: Path) -> str:
    """What a sweep called the variant, or the directory's own name."""
    resolved = workdir.resolve()
    return resolved.parent.name if re.fullmatch(r"seed-\d+", resolved.name) else resolved.name


def _where(workdir: Path, evaluated: int | None) -> str:
    steps = [int(row["step"]) for row in files.read_jsonl(workdir / "metrics.jsonl")]
    return str(max([evaluated or 0, *steps]))


# -------------------------------------------------------------------------------------- statistics


class Spread(NamedTuple):
    """A figure over seeds."""

    mean: float
    std: float | None  # of the sample, None for a single run
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


class Difference(NamedTuple):
    """Of two means, with the interval that holds the true one in 95 of 100 experiments like this."""

    value: float
    low: float | None  # None where a side has a single run: nothing is known of the spread
    high: float | None

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves zero out."""
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


def against(found: Comparison, variant: Variant, domain: str, key: str) -> Difference | None:
    """A variant's difference from the one that all are held against; None for that one itself."""
    reference = next(v for v in found.variants if v.name == found.against)
    if variant is reference:
        return None
    return difference(variant.values(domain, key), reference.values(domain, key))


def changes(found: Comparison) -> dict[str, dict[str, str]]:
    """Keys of the config in which variants differ -> variant -> value."""
    tables = {v.name: dict(leaves(v.runs[0].config)) for v in found.variants}
    keys = dict.fromkeys(key for table in tables.values() for key in table if key != "run.seed")
    values = {key: {name: table.get(key, "") for name, table in tables.items()} for key in keys}
    return {key: by for key, by in values.items() if len(set(by.values())) > 1}


# ------------------------------------------------------------------------------------ as text, as JSON


def plus_minus(s: Spread, percent: bool = False) -> str:
    """`mean ± std`, or the mean alone where there is one run."""
    scale, digits = (100, 1) if percent else (1, 3)
    return f"{scale * s.mean:.{digits}f}" + ("" if s.std is None else f" ± {scale * s.std:.{digits}f}")


def interval(d: Difference | None) -> str:
    """`-0.031 [-0.050, -0.012] *`, the star where zero is outside."""
    if d is None:
        return ""
    if d.low is None or d.high is None:
        return f"{d.value:+.3f}"
    return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" + (" *" if d.beyond_noise else "")


def text(found: Comparison) -> str:
    """Two aligned tables, of the means and of the domains, and what the marks mean."""
    head = ["variant", "runs", "student nats", "KL", "agreement %", f"nats over {found.against}"]
    main = [
        [
            v.name,
            str(len(v.runs)),
            *(plus_minus(spread(v.values(MEAN, key)), key == "agreement") for key in METRICS),
            interval(against(found, v, MEAN, "student_nats")),
        ]
        for v in found.variants
    ]
    domains = [
        [v.name, *(_marked(found, v, domain) for domain in found.domains if domain != MEAN)] for v in found.variants
    ]
    parts = [_aligned([head, *main]), "student nats by domain:", _aligned([["variant", *found.domains[:-1]], *domains])]
    return "\n\n".join([*parts, note(found), *(f"left out: {line}" for line in found.left_out)])


def _marked(found: Comparison, variant: Variant, domain: str) -> str:
    d = against(found, variant, domain, "student_nats")
    star = " *" if d is not None and d.beyond_noise else ""
    return plus_minus(spread(variant.values(domain, "student_nats"))) + star


def note(found: Comparison) -> str:
    """What the figures are, and what a star does not say."""
    count = len(found.domains) * (len(found.variants) - 1)
    return (
        f"Mean ± standard deviation over seeds, last evaluation. A star: the {CONFIDENCE:.0%} Welch interval of the "
        f"difference from {found.against} leaves zero out. Nothing is corrected for the {count} differences looked at; "
        "seeds change the order of rows, not the held-out ones, so this is the noise of training alone."
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    fill = lambda row: "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
    return "\n".join([fill(rows[0]), "-" * len(fill(rows[0])), *map(fill, rows[1:])])


def as_json(found: Comparison) -> dict[str, Any]:
    """Every figure of every domain."""

    def figures(variant: Variant, domain: str, key: str) -> dict[str, Any]:
        facts: dict[str, Any] = spread(variant.values(domain, key))._asdict()
        d = against(found, variant, domain, key)
        return facts if d is None else facts | {"difference": d._asdict() | {"beyond_noise": d.beyond_noise}}

    return {
        "against": found.against,
        "confidence": CONFIDENCE,
        "differs": changes(found),
        "variants": [
            {
                "name": v.name,
                "seeds": [run.seed for run in v.runs],
                "runs": [str(run.workdir) for run in v.runs],
                "domains": {d: {key: figures(v, d, key) for key in METRICS} for d in found.domains},
            }
            for v in found.variants
        ],
        "left_out": list(found.left_out),
    }
