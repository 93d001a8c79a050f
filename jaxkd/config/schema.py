"""The six blocks of an experiment: every key's type, default and meaning, from which docs/config.md is rendered."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

SELF = "self"  # `teacher.path` when the teacher is a running average of the student

Path = Annotated[str, "a known name, a GGUF file, a Hugging Face directory, or `random` with `shape`"]
Factors = Annotated[Mapping[str, float], "factor on `weight` per domain; 0 for domains not listed, unless none is"]
Shape = Annotated[Mapping[str, Any], "sizes of a `random` model: fields of `jaxkd.models.transformer.Config`"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A scalar that depends on the step."""

    schedule: Annotated[str, "a function of `jaxkd/core/schedules.py`: `constant`, `cosine` or `linear`"]
    peak: Annotated[float, "the value after warm-up"]
    warmup: Annotated[int, "steps of a linear rise from 0 to `peak`"] = 0
    end: Annotated[float, "the value at the last step (not of `constant`)"] = 0.0


@dataclasses.dataclass(frozen=True)
class Member:
    """One of several teachers."""

    path: Path
    dtype: Annotated[str, "as `teacher.dtype`"] = "float32"
    shape: Shape = dataclasses.field(default_factory=dict)
    weight: Annotated[float | Schedule, "of its distribution in the average, relative to the other members'"] = 1.0
    domains: Factors = dataclasses.field(default_factory=dict)
    sharding: Annotated[str, "as `teacher.sharding`"] = "fsdp"
    cache: Annotated[str, "directory of its hidden states, written by `jaxkd cache`; empty: computed online"] = ""


@dataclasses.dataclass(frozen=True)
class TeacherBlock:
    """The teacher, and which signal the student gets from it."""

    path: Annotated[str, "as a member's, or `self`: a running average of the student; empty with `members`"] = ""
    dtype: Annotated[
        str, "of weights and activations: `float32`, `bfloat16`, or `int8` (quantized matrices, bfloat16 activations)"
    ] = "float32"
    sharding: Annotated[str, "`fsdp` splits parameters over `data` and `model`, `replicated` over `model` only"] = (
        "fsdp"
    )
    shape: Shape = dataclasses.field(default_factory=dict)
    decay: Annotated[float, "of a `self` teacher's average per step: 1 keeps the first student, 0 the current"] = 0.999
    members: Annotated[Mapping[str, Member], "several teachers by name, instead of `path`"] = dataclasses.field(
        default_factory=dict
    )
    average: Annotated[str, "of members: of their `probabilities` or `log_probabilities`"] = "probabilities"
    signal: Annotated[
        str, "`head` (the whole distribution), `hidden` (the same, cached), `top_k`, `sampled`, `token` (its own text)"
    ] = "head"
    entries: Annotated[int, "K of a `top_k` signal, or draws per token of a `sampled` one"] = 64
    temperatures: Annotated[tuple[float, ...], "at which `top_k` tails are stored, or `token` text is drawn"] = (1.0,)
    cache: Annotated[str, "directory written by `jaxkd cache`; empty: computed online"] = ""
    stored: Annotated[str, "dtype in the cache; empty: the signal's default"] = ""
    prompt: Annotated[int, "tokens of a row that `token` text continues"] = 32

    @property
    def is_self(self) -> bool:
        return self.path == SELF

    @property
    def models(self) -> Mapping[str, Any]:
        """The teacher models by name: "teacher", the members, or none for a `self` teacher."""
        if self.is_self:
            return {}
        return self.members or {"teacher": self}


@dataclasses.dataclass(frozen=True)
class StudentBlock:
    """The student: cut from the teacher, read from a checkpoint, or random."""

    path: Annotated[str, "`teacher`, or as a teacher's"] = "teacher"
    layers: Annotated[tuple[int, ...], "layers to keep of the model at `path`, from 0; empty: all"] = ()
    keep: Annotated[int, "how many to keep instead: those whose removal raises the loss most; 0: all"] = 0
    shape: Shape = dataclasses.field(default_factory=dict)
    sharding: Annotated[str, "as `teacher.sharding`; optimiser moments are split over all axes either way"] = "fsdp"
    frozen: Annotated[bool, "train only the objective's own parameters"] = False
    objective_from: Annotated[str, "a run whose last objective parameters initialise the terms of the same name"] = ""


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of the objective: either a divergence or a feature or policy loss."""

    weight: Annotated[float | Schedule, "factor on the term's value"]
    divergence: Annotated[str, "such as `reverse_kl()` of `jaxkd/losses/divergences.py`, or `MODULE:CALL`"] = ""
    feature: Annotated[str, "such as `hidden_mse({2: 4})` or `minillm()` of `losses/features.py`, or `MODULE:CALL`"] = (
        ""
    )
    temperature: Annotated[float | Schedule, "T of a divergence; its value is multiplied by T^2"] = 1.0
    standardize: Annotated[bool, "divide logits by their standard deviation over the vocabulary first"] = False
    token_weights: Annotated[str, "such as `prefix(share=0.3)` of `losses/token_weights.py`, or `MODULE:CALL`"] = ""


@dataclasses.dataclass(frozen=True)
class Domain:
    """The text of a domain."""

    source: Annotated[str, "file, folder, glob, `builtin:NAME` or `tfds:NAME`: see `jaxkd prepare --help`"]
    field: Annotated[str, "field of a record that holds the text, such as `data.text`; empty: `data.text_key`"] = ""
    validation: Annotated[str, "source of held-out rows; empty: the split in file names, or `data.valid_share`"] = ""


@dataclasses.dataclass(frozen=True)
class RolloutBlock:
    """Rows whose text a model writes before each step: on-policy distillation."""

    student: Annotated[float | Schedule, "share of rows that the student continues (GKD's lambda)"] = 0.0
    teacher: Annotated[float | Schedule, "share of rows that the teacher continues"] = 0.0
    prompt: Annotated[
        int, "tokens of a row that are continued; 0: up to its first token with a weight, as in conversations"
    ] = 0
    length: Annotated[int, "most new tokens; 0: up to the row's end"] = 0
    temperature: Annotated[float, "of the draws; 0 takes the most probable token"] = 1.0
    top_k: Annotated[int, "draw from so many most probable tokens; 0: all"] = 0
    top_p: Annotated[float, "draw from the most probable tokens that hold this mass"] = 1.0
    min_p: Annotated[float, "draw from tokens with this share of the largest probability"] = 0.0
    mix: Annotated[float, "alpha of student's text that is drawn from alpha p + (1 - alpha) q (MiniLLM)"] = 0.0
    proposals: Annotated[
        int, "K of speculative text: tokens of the student outside the teacher's top K are drawn by the teacher; 0: off"
    ] = 0
    int8: Annotated[
        bool, "the student writes with int8 matrices; `old_logprob` is then that model's (`policy_gradient`)"
    ] = False
    buffer: Annotated[int, "rows of student's text to train on again (DistiLLM's replay); 0: none"] = 0
    adaptive: Annotated[
        float, "with a buffer: rise of the share `student` at an evaluation whose loss is 0.1 nats worse than the best"
    ] = 0.0
    context: Annotated[str, "text that only the teacher reads: its system prompt, or what stands before a text"] = ""


@dataclasses.dataclass(frozen=True)
class DataBlock:
    """Text, rows and the mixture of domains."""

    domains: Annotated[Mapping[str, str | Domain], "per domain its source, `SOURCE` or `SOURCE::FIELD`, or a block"]
    batch: Annotated[int, "rows in a global batch"]
    length: Annotated[int, "tokens in a row"]
    directory: Annotated[str, "where prepared rows are kept"] = "rows"
    tokenizer: Annotated[str, "`teacher`, `bytes`, or a directory with tokenizer.json"] = "teacher"
    text_key: Annotated[str, "field of a record that holds the text"] = "text"
    mixture: Annotated[str, "a call of `jaxkd/data/rules.py`, `MODULE:CALL`, or shares `code=2,math=1`"] = "natural"
    interval: Annotated[int, "steps in which the domains' row counts match their shares"] = 100
    train_rows: Annotated[int, "limit of training rows per domain; 0: none"] = 0
    valid_rows: Annotated[int, "limit of held-out rows per domain; 0: none"] = 0
    valid_share: Annotated[float, "share of the text that is held out"] = 0.05
    bad_records: Annotated[float, "share of a domain's records that may be bad or null, counted and left out"] = 0.05
    packs: Annotated[bool, "several documents in a row; false: one each, as short prompts of rollouts want"] = True
    context: Annotated[
        int,
        "tokens for the teacher's own prompt, with a conversation's `teacher_context`; one conversation a row; 0: none",
    ] = 0
    rollout: RolloutBlock = RolloutBlock()

    @property
    def sources(self) -> Mapping[str, Domain]:
        """The domains, each as a block."""
        return {name: d if isinstance(d, Domain) else Domain(d) for name, d in self.domains.items()}


@dataclasses.dataclass(frozen=True)
class OptimBlock:
    """AdamW, gradient clipping and accumulation, and which steps are skipped."""

    lr: Annotated[Schedule, "learning rate"]
    b1: Annotated[float, "decay of the first moment"] = 0.9
    b2: Annotated[float, "decay of the second moment"] = 0.95
    eps: Annotated[float, "added to the root of the second moment"] = 1e-8
    weight_decay: Annotated[float, "of matrices; norms, biases and the objective's parameters do not decay"] = 0.1
    clip: Annotated[float, "limit of the gradient's global norm; 0: none"] = 1.0
    micro_batches: Annotated[int, "parts of a batch whose gradients are accumulated"] = 1
    skip_limit: Annotated[int, "steps with a non-finite loss or gradient to skip; 100 good steps cancel one"] = 3
    spike: Annotated[
        float, "also skip steps with a loss or gradient norm so many standard deviations above the last 128; 0: never"
    ] = 0.0


@dataclasses.dataclass(frozen=True)
class MeshBlock:
    """Devices along each mesh axis."""

    data: Annotated[int, "rows, and parameters sharded `fsdp`; -1: all devices that the other axes leave"] = -1
    model: Annotated[int, "heads, MLP and vocabulary"] = 1
    replica: Annotated[int, "rows, across slices; -1: one per slice"] = -1
    context: Annotated[int, "tokens of a row"] = 1
    teacher: Annotated[int, "rows of the student; the teacher's layers use it as part of `model`"] = 1


@dataclasses.dataclass(frozen=True)
class RunBlock:
    """Steps, precision, devices, and how often evaluations, checkpoints and logs are written."""

    steps: Annotated[int, "optimiser steps"]
    seed: Annotated[int, "of random weights, row order, splits and sampling"] = 0
    dtype: Annotated[str, "of the student's activations, `float32` or `bfloat16`; parameters are float32"] = "float32"
    remat: Annotated[str, "what the backward pass recomputes: `none` or `layer`"] = "none"
    mesh: MeshBlock = MeshBlock()
    rollout_every: Annotated[int, "steps whose rollouts are written at once, by the first one's student"] = 1
    eval_every: Annotated[int, "steps between evaluations; 0: only before and after training"] = 0
    eval_batch: Annotated[int, "rows in an evaluation batch"] = 8
    samples: Annotated[
        int, "held-out prompts that are continued at every evaluation, for the report; -1: 8 where the student writes"
    ] = -1
    checkpoints: Annotated[str, "absolute path or gs://BUCKET/PATH; empty: in the workdir"] = ""
    checkpoint_every: Annotated[int, "steps between checkpoints"] = 100
    keep_checkpoints: Annotated[int, "latest checkpoints to keep"] = 2
    keep_every: Annotated[int, "also keep those of every so many steps; 0: none"] = 0
    keep_best: Annotated[int, "also keep so many with the lowest held-out loss, of those evaluated"] = 1
    log_every: Annotated[int, "steps between logged metrics"] = 1
    stall_s: Annotated[
        float, "seconds after which a step that also takes 10 times the median ends the process; 0: never"
    ] = 600.0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The six blocks of a recipe."""

    student: StudentBlock
    teacher: TeacherBlock
    objective: Mapping[str, Term]
    data: DataBlock
    optim: OptimBlock
    run: RunBlock


def plain(e: Experiment) -> dict[str, Any]:
    """The experiment as JSON values, every key resolved."""
    return json.loads(json.dumps(dataclasses.asdict(e)))


def changed(block: Any, prefix: str = "") -> list[str]:
    """Dotted keys of a dataclass and the blocks inside whose values differ from their defaults."""
    keys = []
    for field in dataclasses.fields(block):
        value, name = getattr(block, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            keys += changed(value, f"{name}.")
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                inside = dataclasses.is_dataclass(inner)
                keys += changed(inner, f"{name}.{key}.") if inside else [f"{name}.{key}"]
        elif value != field.default:
            keys.append(name)
    return keys


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_BITS = {int: 63, float: 1000}  # of integers: what int64 and, after conversion, a float holds


def experiment(values: Mapping[str, Any]) -> Experiment:
    """Dataclasses of a recipe's values; ValueError names a key that is unknown, missing or of another type."""
    return from_mapping(Experiment, values, "config")


def nearest(name: str, choices: Iterable[str], otherwise: str = "") -> str:
    """A hint for a misspelt name: the nearest of the choices; where none is near, `otherwise` or all of them."""
    choices = list(dict.fromkeys(choices))
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else otherwise or f"known: {', '.join(sorted(choices))}"


def from_mapping(kind: Any, values: Any, where: str) -> Any:
    """An instance of the dataclass `kind`; `where` is its dotted key, for messages."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a block of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown key {where}.{key}: {nearest(key, hints)}")
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"missing key {where}.{field.name}")
    return kind(**{key: typed(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def typed(kind: Any, value: Any, where: str) -> Any:
    """A value of the schema's type `kind`: an int becomes a float, a list a tuple, a mapping a dataclass."""
    if scalars := scalars_of(kind):
        kind = block_of(kind) if isinstance(value, Mapping) else scalars[0]
    if dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, where)
    if entry := entry_of(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a block of keys, got {value!r}")
        return {k: v if entry is Any else typed(entry, v, f"{where}.{k}") for k, v in value.items()}
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a sequence, got {value!r}")
        return tuple(typed(typing.get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if type(value) is int and value.bit_length() > (bits := _BITS.get(kind, math.inf)):
        raise ValueError(f"{where} must be {_NAMES[kind]} of at most {bits} bits, got one of {value.bit_length():,}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {_NAMES.get(kind, kind.__name__)}, got {value!r}")
    return value


def scalars_of(kind: Any) -> tuple[Any, ...]:
    """The choices of a union that are no dataclass; of any other type none."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return tuple(k for k in typing.get_args(kind) if not dataclasses.is_dataclass(k)) if union else ()


def block_of(kind: Any) -> Any:
    """The dataclass that a type is or may be, or None."""
    choices = typing.get_args(kind) if scalars_of(kind) else (kind,)
    return next((k for k in choices if dataclasses.is_dataclass(k)), None)


def entry_of(kind: Any) -> Any:
    """The type of a mapping's values, or None for other types."""
    return typing.get_args(kind)[1] if typing.get_origin(kind) is Mapping else None
