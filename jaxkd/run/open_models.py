"""Opening the models that an experiment names: headers, shapes and tokenizers, and that they belong together."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from jaxkd.config.schema import Experiment, from_mapping
from jaxkd.data import tokenize
from jaxkd.models import weights
from jaxkd.models.transformer import Config
from jaxkd.runtime import multihost

_SPARE_IDS = 1024  # families pad their embeddings by at most a few hundred rows


Side = tuple[weights.Checkpoint | None, Config]
"""Where a model's weights are, None for random ones or a shape alone, and its config."""


def called(name: str) -> str:
    """A teacher in messages."""
    return name if name == "teacher" else f"teacher '{name}'"


def teachers(e: Experiment, shapes: Mapping[str, Config]) -> dict[str, Side]:
    """Each teacher's checkpoint, None for one that has only a shape, and its config; `shapes` of those not to open."""
    where = lambda name: "teacher" if name == "teacher" else f"teacher.members.{name}"
    return {
        name: _open(member.path, member.shape, where(name), shapes, e.data.length)
        for name, member in e.teacher.models.items()
    }


def student(e: Experiment, teachers: Mapping[str, tuple], shapes: Mapping[str, Config]) -> Side:
    """The same of the student, or of the teacher that it is cut from."""
    if e.student.path != "teacher":
        return _open(e.student.path, e.student.shape, "student", shapes, e.data.length)
    if not teachers:
        raise ValueError("student.path is 'teacher', but the student is its own teacher: name the student's weights")
    return next(iter(teachers.values()))


def _open(path: str, shape: Mapping[str, Any], where: str, shapes: Mapping[str, Config], length: int) -> Side:
    if path in shapes:
        return None, shapes[path]
    if path != "random":
        checkpoint = weights.open_checkpoint(path, length=length)
        for note in checkpoint.notes if multihost.is_main() else ():
            print(f"jaxkd: {where} {path}: {note}", file=sys.stderr)
        return checkpoint, checkpoint.config
    if not shape:
        raise ValueError(f"{where}.path is 'random', so {where}.shape must say how large: " + ", ".join(_sizes()))
    config = from_mapping(Config, shape, f"{where}.shape")
    if config.heads % config.kv_heads:
        raise ValueError(f"{where}.shape: heads={config.heads} is not a multiple of kv_heads={config.kv_heads}")
    return None, config


def _sizes() -> list[str]:
    return [f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING]


def tokenizers(
    e: Experiment, known: Mapping[str, Side], shapes: Mapping[str, Config]
) -> tuple[tokenize.Tokenizer, dict[str, tokenize.Tokenizer]]:
    """The data's tokenizer, and those that models bring with them, by side.

    Args:
        e: the experiment.
        known: every model's checkpoint and config, the first teacher first.
        shapes: of models that are not opened; a tokenizer of theirs is a size.

    Raises:
        ValueError: when a model's ids are not the tokenizer's, or its context is shorter than a row.
    """
    if e.data.tokenizer == "teacher" and next(iter(e.teacher.models.values()), e.student).path in shapes:
        data = tokenize.of_size(min(config.vocab for _, config in known.values()))
    else:
        data = _tokenizer(e.data.tokenizer, next(iter(known.values()))[0])
    own: dict[str, tokenize.Tokenizer] = {}
    for side, (checkpoint, config) in known.items():
        _check_vocabulary(data, side, config)
        if checkpoint is not None and checkpoint.has_tokenizer:
            own[side] = _tokenizer("teacher", checkpoint)
            _check_same_tokenizer(data, own[side], side)
        if e.data.length > config.max_length:
            raise ValueError(
                f"data.length={e.data.length} is beyond the {side}'s context of {config.max_length} tokens"
            )
    return data, own


def _tokenizer(name: str, checkpoint: weights.Checkpoint | None) -> tokenize.Tokenizer:
    """The tokenizer that `data.tokenizer` names; "teacher" is the checkpoint's own."""
    if name == "bytes":
        return tokenize.byte_tokenizer()
    if name != "teacher":
        return tokenize.from_directory(name)
    if checkpoint is None:
        raise ValueError("data.tokenizer is 'teacher', but a random model has none: give 'bytes' or a directory")
    if checkpoint.tokenizer_dir is not None:
        return tokenize.from_directory(checkpoint.tokenizer_dir)
    return tokenize.from_gguf(checkpoint.tokenizer_fields or {})


def _check_vocabulary(tokenizer: tokenize.Tokenizer, side: str, config: Config) -> None:
    if not tokenizer.vocab <= config.vocab <= tokenizer.vocab + _SPARE_IDS:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab} ids but the {side}'s weights have {config.vocab}: they do not "
            "belong together; give data.tokenizer the directory of the model's own tokenizer"
        )


def _check_same_tokenizer(data: tokenize.Tokenizer, model: tokenize.Tokenizer, side: str) -> None:
    if data.fingerprint == model.fingerprint:
        return
    ours, theirs = (t.tokenizer.get_vocab(with_added_tokens=True) for t in (data, model))
    differ = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differ:
        raise ValueError(
            f"the data's tokenizer and the {side}'s own have different vocabularies: {len(differ)} tokens have other "
            f"ids, such as {differ[0]!r} ({ours.get(differ[0])} and {theirs.get(differ[0])})"
        )
