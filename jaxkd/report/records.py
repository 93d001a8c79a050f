"""The files that a run keeps of itself, run.json and the rows of its logs: their fields, writers and readers."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxkd.runtime import files

Row = dict[str, Any]  # a JSON object of one of these files, made by `training`, `Evaluation` or `interval`
METRICS, EVALS, MIXTURE, TASKS = "metrics.jsonl", "evals.jsonl", "mixture.jsonl", "tasks.jsonl"
SAMPLES, DIAGNOSTICS = "samples.jsonl", "diagnostics.jsonl"
MEAN = "mean"  # the domain of evaluation rows that are means over the domains


def training(
    step: int, values: Mapping[str, float], *, tokens: int, tokens_per_s: float, step_s: float, **more: Any
) -> Row:
    """A row of metrics.jsonl: a step's measured values, None where one is not finite, and its times.

    `tokens` counts from the first step. `more`: tflops, mfu, `share/DOMAIN`, rule_s, skipped, rows.
    """
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    times = {"tokens": tokens, "tokens_per_s": tokens_per_s, "step_s": step_s}
    return {"step": step, "loss": None, **finite, **times, **more}


class Evaluation(NamedTuple):
    """A row of evals.jsonl, by `_asdict()`: a step's figures for a domain, or their plain mean over the domains."""

    step: int
    domain: str
    student_nats: float
    teacher_nats: float
    student_bits_per_byte: float
    teacher_bits_per_byte: float
    kl: float
    agreement: float
    student_ece: float
    teacher_ece: float
    gap_closed: float | None  # (start - student) / (start - teacher); None where the student was not behind
    tokens: int


class TaskScore(NamedTuple):
    """A row of tasks.jsonl, by `_asdict()`: a figure of a task, its mean over examples and their 95% interval."""

    step: int | None  # None for a model that is of no run
    model: str
    task: str
    kind: str
    metric: str
    value: float
    low: float
    high: float
    examples: int  # that have a value
    fingerprint: str  # of the task, the weights and the tokenizer


def interval(step: int, number: int, tokens: int, columns: Mapping[str, Mapping[str, Any]], **more: float) -> Row:
    """A row of mixture.jsonl: the interval that begins at a step, with `columns` (share, rows, ...) by domain.

    `more`: rule_s, rule_share.
    """
    by_domain = {f"{key}/{name}": value for key, values in columns.items() for name, value in values.items()}
    return {"step": step, "interval": number, "tokens": tokens, **by_domain, **more}


def sample(step: int, author: str, domain: str, row: int, prompt: str, text: str, tokens: int, ended: bool) -> Row:
    """A row of samples.jsonl: how the student of a step, or the teacher, continues a held-out row's prompt."""
    values = {"author": author, "domain": domain, "row": row, "prompt": prompt, "text": text}
    return {"step": step, **values, "tokens": tokens, "ended": ended}


def diagnostics(step: int, values: Mapping[str, float]) -> Row:
    """A row of diagnostics.jsonl: figures of the student's own text at a step's evaluation."""
    return {"step": step, **{name: value for name, value in values.items() if math.isfinite(value)}}


def rows(workdir: Path, name: str) -> list[Row]:
    """The rows of one of the logs above, [] where there is no such file."""
    return files.read_jsonl(workdir / name)


class ModelInfo(NamedTuple):
    """A teacher or the student."""

    path: str = ""
    parameters: int = 0
    layers: int = 0
    bytes_per_device: int = 0  # of a teacher's weights
    kept_layers: tuple[int, ...] = ()  # of the model that the student is cut from


class DomainInfo(NamedTuple):
    """What was read of a domain."""

    name: str = "?"
    train_rows: int = 0
    whole_rows: int = 0  # of the whole text, which natural shares follow
    valid_rows: int = 0
    documents: int = 0
    duplicates: int = 0
    fingerprint: str = ""


class RunInfo(NamedTuple):
    """How a run was started, on what hardware, with which models, rows and settings."""

    command: str = ""
    versions: Mapping[str, str] = {}
    git: str | None = None
    devices: str = ""
    processes: int = 1
    mesh: Mapping[str, int] = {}
    sharding_notes: tuple[str, ...] = ()
    teachers: Mapping[str, ModelInfo] = {}
    student: ModelInfo = ModelInfo()
    domains: tuple[DomainInfo, ...] = ()
    changed: tuple[str, ...] = ()  # dotted keys of the config whose values differ from the defaults


def write_run(workdir: Path, info: RunInfo) -> None:
    """Write run.json."""
    values = info._asdict() | {
        "teachers": {name: model._asdict() for name, model in info.teachers.items()},
        "student": info.student._asdict(),
        "domains": [domain._asdict() for domain in info.domains],
    }
    files.write_json(workdir / "run.json", values)


def read_run(workdir: Path) -> RunInfo:
    """Read run.json; fields that it does not have keep their defaults, others are ignored. Raises as `read_json`."""

    def record(kind: Any, values: Mapping[str, Any]) -> Any:
        given = {name: values[name] for name in kind._fields if name in values}
        return kind(**{name: tuple(x or ()) if name in sequences else x for name, x in given.items()})

    sequences = ("kept_layers", "sharding_notes", "domains", "changed")
    info = record(RunInfo, read_json(workdir, "run.json"))
    return info._replace(
        teachers={name: record(ModelInfo, model) for name, model in info.teachers.items()},
        student=record(ModelInfo, info.student) if isinstance(info.student, dict) else info.student,
        domains=tuple(record(DomainInfo, domain) for domain in info.domains),
    )


def read_json(workdir: Path, name: str) -> Row:
    """A JSON object of the workdir; raises `missing`, or Torn where the file is damaged."""
    try:
        return files.read_json(workdir / name)
    except FileNotFoundError:
        raise missing(workdir, name) from None


def missing(workdir: Path, name: str) -> FileNotFoundError:
    """The error for a file that is not there; it has the command that makes it."""
    return FileNotFoundError(f"no {name} in {workdir}: `jaxkd train --config=CONFIG --workdir={workdir}` makes it")


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key; empty mappings are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def value_of(row: Row, key: str) -> float:
    """The number under `key`, NaN where there is none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def by_domain(evals: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of evals.jsonl by domain and in the order of steps, the mean last; of equal steps the later row counts."""
    by_step: dict[str, dict[int, Row]] = {}
    for row in evals:
        by_step.setdefault(str(row.get("domain", "?")), {})[int(row["step"])] = row
    names = [*(name for name in by_step if name != MEAN), *(name for name in by_step if name == MEAN)]
    return {name: [by_step[name][step] for step in sorted(by_step[name])] for name in names}
