"""The models that an experiment names, opened but not loaded: configs, abstract parameters, shardings, tokenizers."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxkd.config import validate
from jaxkd.config.schema import Experiment, from_mapping
from jaxkd.core import sharding
from jaxkd.core.types import Forward, PyTree
from jaxkd.data import tokenize, vocabulary
from jaxkd.models import quantized, transformer, weights
from jaxkd.models.transformer import Config
from jaxkd.runtime import multihost
from jaxkd.teachers import online

VOCAB_MULTIPLE = 128


class Model(NamedTuple):
    """A teacher or the student, without its arrays."""

    config: Config
    forward: Forward
    shapes: PyTree  # ShapeDtypeStruct leaves
    axes: PyTree  # logical axis names
    shardings: PyTree
    checkpoint: weights.Checkpoint | None = None  # None: random weights
    source_layers: int = 0  # of the model that it is cut from
    seed: int = 0  # of random weights
    tokenizer: tokenize.Tokenizer | None = None  # the checkpoint's own
    rules: sharding.Rules = sharding.RULES
    dtype: Any = jnp.float32  # of activations
    quantized: bool = False  # matrices stored as int8
    cache: str = ""  # directory of a teacher's stored signal; empty: the model itself runs
    notes: tuple[str, ...] = ()  # axes that the mesh does not divide

    @property
    def abstract(self) -> PyTree:
        leaf = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(leaf, self.shapes, self.shardings)


class Models(NamedTuple):
    """Both sides of the distillation."""

    student: Model
    teachers: Mapping[str, Model]  # "teacher", or the members by name
    tokenizer: tokenize.Tokenizer  # of the data
    vocab: int  # true vocabulary size: ids from it on are in no loss
    is_self: bool = False  # the student is its own teacher, and `teachers` holds the student's model

    @property
    def teacher(self) -> Model:
        """The only teacher, or the first of several."""
        return next(iter(self.teachers.values()))

    @property
    def notes(self) -> list[str]:
        return sorted({note for model in (self.student, *self.teachers.values()) for note in model.notes})


Source = tuple[weights.Checkpoint | None, Config]  # None for random weights or a shape alone; the whole model's config


def open_models(e: Experiment, mesh: Mesh, shapes: Mapping[str, Config]) -> Models:
    """Read headers and tokenizers, check that they belong together, and describe every model on the mesh.

    `shapes` has configs by path of models that are not on this machine; their tokenizer is only a size. ValueError
    where models and tokenizer do not fit together, FileNotFoundError for a missing path.
    """
    sources = teacher_sources(e, shapes)
    if e.student.path != "teacher":
        source = _open(e.student.path, e.student.shape, "student", shapes, e.data.length)
    elif sources:
        source = next(iter(sources.values()))
    else:
        raise ValueError("student.path is 'teacher', but the student is its own teacher: name the student's weights")
    side = lambda name: name if name == "teacher" else f"teacher '{name}'"
    by_side = {side(name): opened for name, opened in sources.items()} | {"student": source}
    tokenizer, own, vocab = _tokenizers(e, by_side, shapes)

    # All heads get the same number of columns, a multiple that the mesh divides.
    multiple = math.lcm(VOCAB_MULTIPLE, mesh.shape["model"])
    columns = -(-max(config.vocab for _, config in by_side.values()) // multiple) * multiple
    student = student_model(e, source, mesh, columns)._replace(tokenizer=own.get("student"))
    if not sources:
        return Models(student, {"teacher": student._replace(checkpoint=None)}, tokenizer, vocab, is_self=True)
    teachers = teacher_models(e, sources, mesh, columns)
    return Models(student, {n: t._replace(tokenizer=own.get(side(n))) for n, t in teachers.items()}, tokenizer, vocab)


def teacher_sources(e: Experiment, shapes: Mapping[str, Config]) -> dict[str, Source]:
    """Open each teacher's checkpoint; what the loader ignores in it is printed on stderr."""
    key = lambda name: "teacher" if name == "teacher" else f"teacher.members.{name}"
    return {n: _open(m.path, m.shape, key(n), shapes, e.data.length) for n, m in e.teacher.models.items()}


def _open(path: str, shape: Mapping[str, Any], key: str, shapes: Mapping[str, Config], length: int) -> Source:
    if path in shapes:
        return None, shapes[path]
    if path == "random":
        sizes = [f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING]
        if not shape:
            raise ValueError(f"{key}.path is 'random', so {key}.shape must give the sizes: " + ", ".join(sizes))
        config = from_mapping(Config, shape, f"{key}.shape")
        if small := [name for name in (*sizes, "max_length", "vocab_multiple") if getattr(config, name) < 1]:
            raise ValueError(f"{key}.shape.{small[0]} must be at least 1, got {getattr(config, small[0])}")
        if config.heads % config.kv_heads:
            raise ValueError(f"{key}.shape: heads={config.heads} is not a multiple of kv_heads={config.kv_heads}")
        return None, config
    checkpoint = weights.open_checkpoint(path, length=length)
    for note in checkpoint.notes if multihost.is_main() else ():
        print(f"jaxkd: {key} {path}: {note}", file=sys.stderr)
    return checkpoint, checkpoint.config


def _tokenizers(
    e: Experiment, by_side: Mapping[str, Source], shapes: Mapping[str, Config]
) -> tuple[tokenize.Tokenizer, dict[str, tokenize.Tokenizer], int]:
    """The data's tokenizer, the checkpoints' own by side, and how many ids the loss covers.

    `by_side` has the first teacher first. What the loss leaves out is printed on stderr. ValueError where a text has
    other ids in a model, or a model's context is shorter than a row.
    """
    for side, (_, config) in by_side.items():
        if e.data.length > config.max_length:
            raise ValueError(f"data.length={e.data.length} exceeds the {side}'s context of {config.max_length} tokens")
        if e.data.length + e.data.context > config.max_length and (side != "student" or e.teacher.is_self):
            raise ValueError(
                f"data.length={e.data.length} and data.context={e.data.context} together exceed the {side}'s context "
                f"of {config.max_length} tokens"
            )
    name, checkpoint = e.data.tokenizer, next(iter(by_side.values()))[0]
    if name == "bytes":
        data = tokenize.byte_tokenizer()
    elif name != "teacher":
        data = tokenize.from_directory(name)
    elif next(iter(e.teacher.models.values()), e.student).path in shapes:
        data = tokenize.of_size(min(config.vocab for _, config in by_side.values()))
    elif checkpoint is not None:
        data = tokenize.of_checkpoint(checkpoint)
    else:
        raise ValueError("data.tokenizer is 'teacher', but a random model has none: give 'bytes' or a directory")
    own = {
        side: tokenize.of_checkpoint(checkpoint)
        for side, (checkpoint, _) in by_side.items()
        if checkpoint is not None and checkpoint.has_tokenizer
    }
    data = vocabulary.common_text(data, list(own.values()))
    covered = vocabulary.coverage(data, own, {side: config.vocab for side, (_, config) in by_side.items()})
    for note in covered.notes if multihost.is_main() else ():
        print(f"jaxkd: {note}", file=sys.stderr)
    return data, own, covered.size


def student_model(e: Experiment, source: Source, mesh: Mesh, columns: int, cut: bool = True) -> Model:
    """The student on the mesh, its head `columns` wide; `cut` leaves out the layers that the recipe does."""
    layers, chosen, keep = source[1].layers, e.student.layers, e.student.keep
    if cut:
        if chosen and (list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < layers):
            raise ValueError(f"student.layers {chosen} must be different and rising, from 0 to {layers - 1}")
        if keep and not 1 <= keep <= layers:
            raise ValueError(f"student.keep is {keep}, but the model it is cut from has {layers} layers")
        layers = len(chosen) or keep or layers
    rules, dtype = sharding.TABLES[e.student.sharding], validate.DTYPES[e.run.dtype]
    return _model(source, mesh, columns, rules, "float32", dtype, layers, e.run.remat)._replace(seed=e.run.seed + 1)


def teacher_models(e: Experiment, sources: Mapping[str, Source], mesh: Mesh, columns: int) -> dict[str, Model]:
    """The teachers on the mesh, their heads `columns` wide."""
    teachers = {}
    for number, (name, source) in enumerate(sources.items()):
        block = e.teacher.models[name]
        rules = sharding.of_teacher(sharding.TABLES[block.sharding])
        dtype = validate.DTYPES[validate.STORED[block.dtype]]
        teacher = _model(source, mesh, columns, rules, block.dtype, dtype, source[1].layers)
        if mesh.shape["teacher"] > 1:
            teacher = teacher._replace(forward=online.within(rules, teacher.forward))
        seed = e.run.seed + number + (number > 0)  # the one after the first teacher's is the student's
        teachers[name] = teacher._replace(seed=seed, cache=block.cache)
    return teachers


def _model(
    source: Source,
    mesh: Mesh,
    columns: int,
    rules: sharding.Rules,
    stored: str,
    dtype: Any,
    layers: int,
    remat: str = "none",
) -> Model:
    """A model on the mesh: `stored` is the dtype of its parameters, `dtype` of its activations."""
    checkpoint, whole = source
    config = dataclasses.replace(whole, layers=layers, vocab_multiple=columns)
    if checkpoint is not None:
        # A student cut from the file is loaded whole, and cut then.
        checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(whole, vocab_multiple=columns))
    shapes, axes = transformer.abstract(config)
    if stored == "int8":
        shapes, axes = quantized.abstract(shapes, axes)
    else:
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, validate.DTYPES[stored]), shapes)
    return Model(
        config,
        partial(transformer.forward, config, dtype=dtype, remat=remat),
        shapes,
        axes,
        sharding.shardings(axes, shapes, mesh, rules),
        checkpoint,
        whole.layers,
        rules=rules,
        dtype=dtype,
        quantized=stored == "int8",
        notes=tuple(sharding.replicated_axes(axes, shapes, mesh, rules)),
    )
