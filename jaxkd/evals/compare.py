"""Student and teacher on held-out rows: loss, bits per byte, KL, agreement and calibration, per domain."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.sharding import constrain
from jaxkd.core.types import Batch, Divergence, Forward, Output, PyTree
from jaxkd.kernels.api import RANKED, linear_comparison, linear_divergence
from jaxkd.losses.divergences import forward_kl, next_token
from jaxkd.report.records import MEAN, Evaluation, Row
from jaxkd.report.text import aligned

MEANS = ("student_nats", "teacher_nats", "kl", "agreement")
BINS = 15
"""Number of bins of the calibration error (Guo et al. 2017)."""


class Sums(NamedTuple):
    """Sums over weighted tokens; calibration per bin of the top probability, [BINS]."""

    student_nats: Any
    teacher_nats: Any
    kl: Any
    agreement: Any
    student_calibration: Any  # of (correct - confidence)
    teacher_calibration: Any
    tokens: Any


def make_comparison(student: Forward, teacher: Callable[[PyTree, Batch], Any], vocab: int) -> Callable[..., Sums]:
    """`comparison(student_params, teacher_state, batch) -> Sums`, at temperature 1, to be jitted.

    `teacher(state, batch)` returns an `Output` or an `Ensemble`.
    """
    teacher_nats = Divergence(lambda lp, lq, side: (jnp.where(side.is_target, -lp, 0.0),))
    terms = (next_token(), teacher_nats, forward_kl())

    def comparison(student_params: PyTree, teacher_state: PyTree, batch: Batch) -> Sums:
        q, signal = student(student_params, batch).head, teacher(teacher_state, batch)
        p = signal.head if isinstance(signal, Output) else signal
        rows = linear_comparison(terms, q, p, batch.targets, vocab=vocab)
        weights, live = batch.weights, batch.weights != 0
        fields = dict(zip(("student_nats", "teacher_nats", "kl", *RANKED), rows, strict=True))
        total = lambda row: jnp.where(live, row * weights, 0.0).sum()
        return Sums(
            **{name: total(fields[name]) for name in MEANS},
            student_calibration=_calibration(fields["student_top"], fields["student_right"], weights),
            teacher_calibration=_calibration(fields["teacher_top"], fields["teacher_right"], weights),
            tokens=weights.sum(),
        )

    return comparison


def make_scoring(student: Forward, vocab: int) -> Callable[[PyTree, Batch], tuple[jax.Array, jax.Array]]:
    """`scoring(student_params, batch) -> (nats, tokens)`, sums for the student alone, to be jitted."""

    def scoring(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        head, weights = student(params, batch).head, batch.weights
        value, _ = linear_divergence((next_token(),), head, None, batch.targets, weights[None], (1.0,), vocab=vocab)
        return value, weights.sum()

    return scoring


def _calibration(top: jax.Array, correct: jax.Array, weights: jax.Array) -> jax.Array:
    """[BINS]: sum of weight (correct - confidence) over the tokens of each bin of confidence."""
    live = weights != 0
    bins = jnp.clip((jnp.where(live, top, 0.0) * BINS).astype(jnp.int32), 0, BINS - 1)
    sums = jnp.zeros(BINS).at[bins].add(jnp.where(live, weights * (correct - top), 0.0))
    return constrain(sums, None)  # replicated: every process reads it


def evaluate(
    comparison: Callable[[Batch], Sums],
    domains: Mapping[str, Iterable[tuple[Batch, np.ndarray]]],
    step: int,
    start: Mapping[str, float] | None = None,
) -> list[Row]:
    """One row per domain and one for their unweighted mean, as in `evals.jsonl`.

    Args:
        comparison: the sums of a batch.
        domains: name -> batches of its held-out rows, each with the number of bytes of its rows' targets.
        step: of the student.
        start: the student's nats per token by domain at step 0, empty if unknown; None if this is step 0.

    Raises ValueError: a domain has no token to score, or a figure is not finite.
    """
    rows: list[Row] = []
    for name, batches in domains.items():
        parts, size = [], 0
        for batch, length in batches:
            parts.append(comparison(batch))
            size += int(np.sum(length))
        total = Sums(*(_sum(column) for column in zip(*jax.device_get(parts), strict=True)))
        if not total.tokens:
            raise ValueError(f"the held-out rows of domain '{name}' have no token to score")
        means = {field: getattr(total, field) / total.tokens for field in MEANS}
        for field, mean in means.items():
            if not math.isfinite(mean):
                raise ValueError(
                    f"{field} of domain '{name}' is {mean} at step {step}: check the weights of that model"
                )
        bits = total.tokens / math.log(2) / max(size, 1)
        evaluation = Evaluation(
            step,
            name,
            means["student_nats"],
            means["teacher_nats"],
            means["student_nats"] * bits,
            means["teacher_nats"] * bits,
            means["kl"],
            means["agreement"],
            float(np.abs(total.student_calibration).sum() / total.tokens),
            float(np.abs(total.teacher_calibration).sum() / total.tokens),
            _closed(means["student_nats"], means["teacher_nats"], start, name),
            int(total.tokens),
        )
        rows.append(evaluation._asdict())
    rows.append(_mean(rows, start, step)._asdict())
    return rows


def _sum(parts: Sequence[Any]) -> Any:
    """Sum of scalars (exactly rounded) or of arrays (in float64)."""
    if np.ndim(parts[0]):
        return np.sum(np.asarray(parts, np.float64), 0)
    return math.fsum(float(x) for x in parts)


def _closed(student: float, teacher: float, start: Mapping[str, float] | None, name: str) -> float | None:
    """(start - student) / (start - teacher): 0 at the start, 1 at the teacher's loss.

    None if the student started no worse than the teacher, or its start is unknown.
    """
    before = student if start is None else start.get(name)
    return (before - student) / (before - teacher) if before is not None and before > teacher else None


def _mean(rows: list[Row], start: Mapping[str, float] | None, step: int) -> Evaluation:
    skip = ("step", "domain", "gap_closed", "tokens")
    means = {k: math.fsum(row[k] for row in rows) / len(rows) for k in Evaluation._fields if k not in skip}
    closed = _closed(means["student_nats"], means["teacher_nats"], start, MEAN)
    return Evaluation(step, MEAN, **means, gap_closed=closed, tokens=sum(row["tokens"] for row in rows))


def table(rows: list[Row], before: dict[str, float] | None = None) -> str:
    """The rows of one evaluation as aligned text, "-" for missing values; `before` has the nats by domain at step 0."""
    columns = {
        "student_nats": ("student", ".3f"),
        "gap_closed": ("gap closed", ".1%"),
        "kl": ("KL", ".3f"),
        "agreement": ("agree", ".1%"),
        "student_ece": ("ECE", ".1%"),
        "student_bits_per_byte": ("bits/byte", ".3f"),
    }
    text = lambda value, form: "-" if value is None else format(value, form)
    lines = [["domain", "tokens", "teacher", "start", *(title for title, _ in columns.values())]]
    for row in rows:
        start = (before or {}).get(row["domain"])
        cells = [row["domain"], f"{row['tokens']:,}", text(row.get("teacher_nats"), ".3f"), text(start, ".3f")]
        lines.append([*cells, *(text(row.get(key), form) for key, (_, form) in columns.items())])
    return aligned(lines)
