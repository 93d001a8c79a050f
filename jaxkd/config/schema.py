"""An experiment's six blocks as frozen dataclasses, strict about every key and type.

This is the config once it has passed the door: nothing further in sees `ml_collections`.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

SELF = "self"
"""The `path` of a teacher that is the student itself."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A scalar over the run's steps: `schedule` names a function of `jaxkd/core/schedules.py`."""

    schedule: str
    peak: float
    warmup: int = 0
    end: float = 0.0


@dataclasses.dataclass(frozen=True)
class Member:
    """One of several teachers: a model as the teacher's own block names it, and what it weighs."""

    path: str
    dtype: str = "float32"  # as the only teacher's
    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight: float | Schedule = 1.0
    domains: Mapping[str, float] = dataclasses.field(default_factory=dict)  # factor per domain, 0 for those not named
    sharding: str = "fsdp"  # as the only teacher's
    cache: str = ""  # its hidden states, as `jaxkd cache` wrote them; empty when it is live


@dataclasses.dataclass(frozen=True)
class TeacherBlock:
    """Who teaches, and how much of it reaches the student.

    `path`: a known name, a GGUF file, a Hugging Face directory, "random" with `shape`, or "self" for a running average
    of the student; empty where `members` are several of them. `signal` is a name of `jaxkd/teachers/signals.py`.
    """

    path: str = ""
    dtype: str = "float32"  # or "bfloat16", of weights and activations; "int8": the layers' matrices, beside bfloat16
    sharding: str = "fsdp"  # its parameters split over the mesh's `data` too, or "replicated" over it: never gathered
    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decay: float = 0.999  # of a "self" teacher: 1 is the student as it began, 0 the student as it is
    members: Mapping[str, Member] = dataclasses.field(default_factory=dict)
    average: str = "probabilities"  # of members, or "log_probabilities"
    signal: str = "head"  # or "hidden", "top_k", "sampled", "token"
    entries: int = 64  # a top-k teacher's, or the draws of a sampled one
    temperatures: tuple[float, ...] = (1.0,)  # at which a top-k teacher's tail is known
    cache: str = ""  # a directory that `jaxkd cache` wrote; empty when the teacher is live
    stored: str = ""  # dtype of what is cached; empty for the signal's own
    prompt: int = 32  # tokens of a row that the teacher's own text (signal "token") goes on from

    @property
    def models(self) -> Mapping[str, Any]:
        """The models that teach, by name: "teacher", its members, or none where the student is its own."""
        if self.path == SELF:
            return {}
        return self.members or {"teacher": self}


@dataclasses.dataclass(frozen=True)
class StudentBlock:
    """`path`: "teacher", a checkpoint as the teacher's, or "random" with `shape`.

    Of a teacher or checkpoint, `layers` are kept, or the `keep` whose loss is largest when each is left out.
    """

    path: str = "teacher"
    layers: tuple[int, ...] = ()
    keep: int = 0
    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sharding: str = "fsdp"  # as a teacher's; its moments are split over all that holds the same of them, either way
    frozen: bool = False  # it stands still, and only what the objective itself learns is trained
    objective_from: str = ""  # a run whose last `params["objective"]` this one's terms of the same name begin with


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of the objective, one of two kinds.

    `divergence` is a call of `jaxkd/losses/divergences.py`, such as "forward_kl"; `feature` one of
    `jaxkd/losses/features.py`, such
    as "hidden_mse(layers={2: 4})". `standardize` divides logits by their standard deviation over the vocabulary first.
    """

    weight: float | Schedule
    divergence: str = ""
    feature: str = ""
    temperature: float | Schedule = 1.0
    standardize: bool = False


@dataclasses.dataclass(frozen=True)
class DataBlock:
    """Domains by name, each a source that `jaxkd prepare --help` lists."""

    domains: Mapping[str, str]
    batch: int  # rows in a global batch
    length: int  # tokens in a row
    directory: str = "rows"
    tokenizer: str = "teacher"  # or "bytes", or a directory with tokenizer.json
    text_key: str = "text"
    mixture: str = "natural"  # a call of jaxkd/data/rules.py, such as "ddk(alpha=0.5)", or weights: "code=2,math=1"
    interval: int = 100  # steps in which the counts of the domains match their weights
    train_rows: int = 0  # a domain's limit, 0 for none
    valid_rows: int = 0
    valid_share: float = 0.05


@dataclasses.dataclass(frozen=True)
class OptimBlock:
    """AdamW, its learning rate, clipping and gradient accumulation, and which steps are left out.

    `skip_limit`: steps whose loss or gradient is not finite are left out, and one more than so many stops the run; a
    hundred good steps make up for one. `spike`: a step is left out too whose loss or gradient norm is so many standard
    deviations above the mean of the last 128; 0 for none.
    """

    lr: Schedule
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    micro_batches: int = 1
    skip_limit: int = 3
    spike: float = 0.0


@dataclasses.dataclass(frozen=True)
class MeshBlock:
    """Devices along each mesh axis."""

    data: int = -1  # rows, and the parameters of what is sharded "fsdp"; -1 takes what the others leave
    model: int = 1  # heads, MLP and vocabulary
    replica: int = -1  # rows again: the only axis that goes across slices; -1 is one a slice
    context: int = 1  # tokens of a row
    teacher: int = 1  # rows of the student; to the teacher's layers it is more of `model`


@dataclasses.dataclass(frozen=True)
class RunBlock:
    """How long, how precise, and how often what is written."""

    steps: int
    seed: int = 0
    dtype: str = "float32"
    remat: str = "none"
    mesh: MeshBlock = MeshBlock()
    eval_every: int = 0  # 0: only before and after
    eval_batch: int = 8
    checkpoints: str = ""  # where they are, such as gs://BUCKET/PATH; empty for the workdir
    checkpoint_every: int = 100
    keep_checkpoints: int = 2  # of the latest
    keep_every: int = 0  # and those of every so many steps, for good
    keep_best: int = 1  # and those with the lowest held-out loss, of the ones that were evaluated
    log_every: int = 1
    stall_s: float = 600.0  # a step that takes longer, and ten times the median, ends the process; 0 for never


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The six blocks of every recipe."""

    student: StudentBlock
    teacher: TeacherBlock
    objective: Mapping[str, Term]
    data: DataBlock
    optim: OptimBlock
    run: RunBlock


def plain(e: Experiment) -> dict[str, Any]:
    """The experiment as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(e)))


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= leaves(value, name + ".")
        else:
            found[name] = value
    return found


# ------------------------------------------------------------------------------- from plain values


def experiment(values: Mapping[str, Any]) -> Experiment:
    """The blocks as dataclasses.

    Raises:
        ValueError: an unknown key (with the nearest known ones), a missing one, or a value of another type.
    """
    return from_mapping(Experiment, values, "config")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known ones, or all."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"


def from_mapping(kind: Any, values: Any, where: str) -> Any:
    """A frozen dataclass from a mapping.

    Args:
        kind: the dataclass.
        values: its fields.
        where: the block's name, for messages.

    Raises:
        ValueError: as `experiment`.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a block of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown key {where}.{key}: {nearest(key, hints)}")
    for field in dataclasses.fields(kind):
        default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if default and field.name not in values:
            raise ValueError(f"missing key {where}.{field.name}")
    return kind(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        block, number = (a for a in sorted(typing.get_args(kind), key=lambda a: not dataclasses.is_dataclass(a)))
        return _value(block if isinstance(value, Mapping) else number, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a sequence, got {value!r}")
        return tuple(_value(typing.get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a block of keys, got {value!r}")
        inner = typing.get_args(kind)[1]
        return {k: v if inner is Any else _value(inner, v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}")
    return value
