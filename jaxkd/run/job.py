"""What follows from an experiment without loading a weight or a row.

`build` turns the config's blocks into forward functions, an objective, an optimiser, abstract trees and their
shardings: all that compiling the step needs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkd.config import objective as terms
from jaxkd.config import validate
from jaxkd.config.schema import SELF, Experiment, MeshBlock, RunBlock, nearest
from jaxkd.core import schedules, sharding
from jaxkd.core.types import Batch, Forward, Head, Output, PyTree, Sampled, Scalar, TopK
from jaxkd.data import rules, tokenize
from jaxkd.losses import group_dro
from jaxkd.losses import objective as objectives
from jaxkd.losses.objective import Objective
from jaxkd.models import quantized, transformer, weights
from jaxkd.models.transformer import Config
from jaxkd.run import open_models
from jaxkd.teachers import ensemble, online
from jaxkd.train import guard, optim
from jaxkd.train.state import TRAINED, TrainState, init_state, trainable

VOCAB_MULTIPLE = 128


class Model(NamedTuple):
    """One side of the distillation, abstractly."""

    config: Config
    forward: Forward
    shapes: PyTree  # ShapeDtypeStruct leaves
    axes: PyTree  # logical names
    shardings: PyTree
    checkpoint: weights.Checkpoint | None  # where its weights are, None for random ones
    whole_layers: int  # of the model that it is cut from; its own when it is whole
    tokenizer: tokenize.Tokenizer | None = None  # its own, where it comes with one
    rules: sharding.Rules = sharding.RULES  # where its axes live
    dtype: Any = jnp.float32  # of its activations
    quantized: bool = False  # whether its matrices are int8


class Job(NamedTuple):
    """Everything about a run but its arrays."""

    experiment: Experiment
    mesh: Mesh
    tokenizer: tokenize.Tokenizer
    teachers: Mapping[str, Model]  # "teacher", or the members by name; a "self" teacher is the student's model
    student: Model
    objective: Objective
    objective_init: Callable[[jax.Array], PyTree]  # key -> params["objective"]
    tx: optax.GradientTransformation
    lr: Scalar
    state: TrainState  # ShapeDtypeStruct leaves with shardings
    notes: tuple[str, ...]  # what the mesh could not shard

    @property
    def teacher(self) -> Model:
        """The only teacher, or the first of several."""
        return next(iter(self.teachers.values()))

    @property
    def own(self) -> bool:
        """Whether the student is its own teacher."""
        return self.experiment.teacher.path == SELF

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the data domains, in their order."""
        return tuple(self.experiment.data.domains)


def elsewhere(e: Experiment) -> Experiment:
    """The experiment for verbs that do not train: on one device where the run's own mesh is not there."""
    mesh = e.run.mesh
    if jax.process_count() > 1:  # each needs a part of the mesh
        return e
    rows = mesh.data * mesh.teacher * (sharding.slices(jax.devices()) if mesh.replica == -1 else mesh.replica)
    if rows * mesh.context * mesh.model == jax.device_count() and e.run.eval_batch % rows == 0:
        return e
    return dataclasses.replace(e, run=dataclasses.replace(e.run, mesh=MeshBlock(1, 1)))


def build(experiment: Experiment, devices: list | None = None, shapes: Mapping[str, Config] | None = None) -> Job:
    """Functions, abstract trees and shardings of an experiment; reads headers, loads no weights.

    Args:
        experiment: what to build.
        devices: to run on, None for those that are here.
        shapes: of models that are not to be opened, by path: what can be planned with. Their tokenizer is a size.

    Raises:
        ValueError, FileNotFoundError: for values that do not fit together or paths that are not there.
    """
    e = experiment
    sizes, devices = e.run.mesh, devices or jax.devices()
    one = (sizes.data, sizes.model, sizes.context, sizes.teacher, abs(sizes.replica)) == (1, 1, 1, 1, 1)
    place = devices[:1] if one and jax.process_count() == 1 else devices
    others = {"replica": sizes.replica, "context": sizes.context, "teacher": sizes.teacher}
    mesh = sharding.make_mesh(sizes.data, sizes.model, place, **others)
    validate.check(e, mesh.shape)
    shapes = shapes or {}
    opened = open_models.teachers(e, shapes)
    student_checkpoint, student_config = open_models.student(e, opened, shapes)
    known = {open_models.called(name): side for name, side in opened.items()}
    known["student"] = (student_checkpoint, student_config)
    tokenizer, own = open_models.tokenizers(e, known, shapes)
    whole = student_config.layers
    student_config = _cut(e, student_config)

    # All heads get the same number of columns, a multiple that the mesh divides.
    multiple = math.lcm(VOCAB_MULTIPLE, mesh.shape["model"])
    columns = -(-max(config.vocab for _, config in known.values()) // multiple) * multiple
    table = sharding.TABLES[e.student.sharding]
    student = _model(student_config, student_checkpoint, columns, mesh, table, "float32", e.run)
    student = student._replace(whole_layers=whole, tokenizer=own.get("student"))
    teachers = {"teacher": student._replace(checkpoint=None)}
    if opened:
        teachers = {}
        for name, (checkpoint, config) in opened.items():
            block = e.teacher.models[name]
            plain = dataclasses.replace(e.run, dtype=validate.STORED[block.dtype], remat="none")
            table = sharding.of_teacher(sharding.TABLES[block.sharding])
            model = _model(config, checkpoint, columns, mesh, table, block.dtype, plain)
            forward = online.within(table, model.forward) if mesh.shape["teacher"] > 1 else model.forward
            teachers[name] = model._replace(tokenizer=own.get(open_models.called(name)), forward=forward)

    mixing = _rule(e)  # a misspelt one is known before anything is loaded
    objective = objectives.objective(
        terms.build(
            e.objective,
            e.run.steps,
            {"teacher": next(iter(teachers.values())).config, "student": student_config},
            _told(e),
        ),
        vocab=tokenizer.vocab,
        domains=tuple(e.data.domains),
        tails=e.teacher.temperatures,
        trains=("objective",) if e.student.frozen else TRAINED,
        measured=group_dro.MEASURED if mixing.group_dro else {},
    )
    objective_init = partial(objective.init, **_outputs(e, objective, student, teachers))
    extra = jax.eval_shape(objective_init, jax.random.key(0))
    if e.student.frozen and not extra:
        raise ValueError("student.frozen leaves nothing to train: no term of the objective has parameters of its own")
    lr = terms.scalar(e.optim.lr, e.run.steps, "optim.lr")
    # What the objective learns does not decay: an identity pulled to zero would be another objective.
    axes = trainable({"student": student.axes, "objective": jax.tree.map(lambda _: (), extra)}, objective.trains)
    o = e.optim
    tx = optim.adamw(lr, axes, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip=o.clip)
    models = (student, *teachers.values())
    notes = {note for m in models for note in sharding.replicated_axes(m.axes, m.shapes, mesh, m.rules)}
    kept = group_dro.init(np.ones(len(e.data.domains))) if mixing.group_dro else None
    recent = guard.init() if o.spike else None
    state = _abstract_state(student, extra, objective.trains, tx, mesh, e.teacher.path == SELF, kept, recent)
    if mesh.shape["replica"] > 1:
        tx = optim.with_gradient_shardings(
            tx, jax.tree.map(lambda leaf: leaf.sharding, trainable(state.params, objective.trains))
        )
    job = Job(e, mesh, tokenizer, teachers, student, objective, objective_init, tx, lr, state, tuple(sorted(notes)))
    if e.teacher.members:
        shares(job)  # what it would refuse is known before anything is loaded
    return job


def rule(job: Job) -> rules.Rule:
    """How the domains are mixed: what `data.mixture` spells.

    Raises:
        ValueError: for an unknown rule or domain, or one that this teacher cannot serve.
    """
    return _rule(job.experiment)


def check_shares(job: Job) -> None:
    """Make the first shares of a rule that needs no measurement: what it reads of another run must be there.

    Raises:
        ValueError, FileNotFoundError: when it is not.
    """
    found = rule(job)
    if not found.measures:
        found.init([1] * len(job.domains), None)


def _rule(e: Experiment) -> rules.Rule:
    name, domains = e.data.mixture, tuple(e.data.domains)
    if "=" not in name.partition("(")[0]:
        found = terms.call(name, rules, "data.mixture")
        if not isinstance(found, rules.Rule):
            try:
                found = found(domains)
            except ValueError as error:
                raise ValueError(f"data.mixture: {error}") from None
        if found.group_dro and (_told(e).kind is not Head or e.teacher.path == SELF):
            kind = "is the student itself" if e.teacher.path == SELF else f"gives '{e.teacher.signal}'"
            raise ValueError(
                f"data.mixture '{name}' compares the student's loss on each token with the teacher's, and this teacher "
                f"{kind}: take another one, with teacher.signal 'head' or 'hidden'"
            )
        return found
    given = dict.fromkeys(domains, 0.0)
    for part in name.split(","):
        domain, _, weight = part.partition("=")
        try:
            number = float(weight)
        except ValueError:
            raise ValueError(
                f"data.mixture '{name}' must be a rule, such as ddk(alpha=0.5), or weights such as code=2,math=1"
            ) from None
        if domain.strip() not in given:
            raise ValueError(f"data.mixture names no domain '{domain.strip()}': {nearest(domain, domains)}")
        given[domain.strip()] = number
    return rules.fixed(list(given.values()))


def shares(job: Job) -> ensemble.Weigh:
    """What each of several teachers weighs in a row, by the step and the row's domain.

    Raises:
        ValueError: for a domain that is not there, a negative weight, or a domain that no teacher serves in some step.
    """
    members, steps = job.experiment.teacher.members, job.experiment.run.steps
    scalars = [terms.scalar(m.weight, steps, f"teacher.members.{name}.weight") for name, m in members.items()]
    weigh = ensemble.shares(scalars, [m.domains for m in members.values()], job.domains)
    # The last evaluation is at step `steps`.
    now = [np.broadcast_to(schedules.value(s, np.arange(steps + 1)), steps + 1) for s in scalars]
    for domain in job.domains:
        total = np.zeros(steps + 1)
        for (name, member), weight in zip(members.items(), now, strict=True):
            mine = weight * (member.domains.get(domain, 0.0) if member.domains else 1.0)
            if (bad := ~(np.isfinite(mine) & (mine >= 0))).any():
                raise ValueError(
                    f"teacher.members.{name} weighs {mine[bad][0]:g} in the domain '{domain}': a weight must be finite "
                    "and not negative"
                )
            total += mine
        if not total.all():
            raise ValueError(
                f"all teachers of the domain '{domain}' weigh nothing at step {int(np.argmin(total))} of {steps}: give "
                "one of them a weight that stays above 0"
            )
    return weigh


def abstract_batch(job: Job) -> Batch:
    """Shapes and shardings of a global batch."""
    place = sharding.batch_sharding(job.mesh)
    shapes = _batch_shapes(job.experiment)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)


def _batch_shapes(e: Experiment) -> Batch:
    rows, length = e.data.batch, e.data.length
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(
            (rows,) if name in ("row", "domain") else (rows, length),
            jnp.float32 if name == "weights" else jnp.int32,
        )
        for name in Batch._fields
        if name != "teacher"
    }
    return Batch(**shapes)


def _outputs(e: Experiment, objective: Objective, student: Model, teachers: Mapping[str, Model]) -> dict[str, Output]:
    """What both sides' forward passes return, abstractly, for objectives with features."""
    if not objective.fields:
        return {}
    batch, (teacher, *_) = _batch_shapes(e), teachers.values()
    look = lambda model, taps: jax.eval_shape(partial(model.forward, taps=taps), model.shapes, batch)
    return {"student": look(student, objective.student_taps), "teacher": look(teacher, objective.teacher_taps)}


def _told(e: Experiment) -> terms.SignalSpec:
    """What kind of signal the objective's terms learn from."""
    t = e.teacher
    kind = {"top_k": TopK, "sampled": Sampled, "token": Batch}.get(t.signal, Head)
    return terms.SignalSpec(kind, t.entries, t.temperatures, layers=t.signal == "head" and not t.members)


def _cut(e: Experiment, config: Config) -> Config:
    """The student's config once layers are left out."""
    layers, keep = e.student.layers, e.student.keep
    if layers and (list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < config.layers):
        raise ValueError(f"student.layers {layers} must be different and rising, from 0 to {config.layers - 1}")
    if keep and not 1 <= keep <= config.layers:
        raise ValueError(f"student.keep is {keep}, but the model it is cut from has {config.layers} layers")
    return dataclasses.replace(config, layers=len(layers) or keep or config.layers)


def _model(
    config: Config, checkpoint, columns: int, mesh: Mesh, rules: sharding.Rules, stored: str, run: RunBlock
) -> Model:
    config = dataclasses.replace(config, vocab_multiple=columns)
    shapes, axes = transformer.abstract(config)
    if narrow := stored == "int8":
        shapes, axes = quantized.abstract(shapes, axes)
    else:
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, validate.DTYPES[stored]), shapes)
    dtype = validate.DTYPES[run.dtype]
    forward = partial(transformer.forward, config, dtype=dtype, remat=run.remat)
    if checkpoint is not None:
        # A student cut from the file has fewer layers than the file: it is loaded whole and cut then.
        whole = dataclasses.replace(checkpoint.config, vocab_multiple=columns)
        checkpoint = dataclasses.replace(checkpoint, config=whole)
    places = sharding.shardings(axes, shapes, mesh, rules)
    model = Model(config, forward, shapes, axes, places, checkpoint, config.layers)
    return model._replace(rules=rules, dtype=dtype, quantized=narrow)


def _abstract_state(
    student: Model,
    extra: PyTree,
    trains: tuple[str, ...],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    averaged: bool,
    kept: group_dro.Groups | None,
    recent: guard.Recent | None,
) -> TrainState:
    everywhere = NamedSharding(mesh, PartitionSpec())
    first = partial(init_state, tx=tx, names=trains, averaged=averaged)
    shapes = jax.eval_shape(first, {"student": student.shapes, "objective": extra}, group_dro=kept, recent=recent)
    # Matrices of the objective are as wide as the model, so they are spread as its own are.
    axes = lambda leaf: ("embed", *[None] * (len(leaf.shape) - 1)) if len(leaf.shape) > 1 else (None,) * len(leaf.shape)
    spread, shared = (
        jax.tree.map(lambda leaf, r=rules: NamedSharding(mesh, sharding.spec(axes(leaf), leaf.shape, mesh, r)), extra)
        for rules in (student.rules, sharding.MOMENTS)
    )
    params = {"student": student.shardings, "objective": spread}
    moments = sharding.shardings(student.axes, student.shapes, mesh, sharding.MOMENTS)
    opt_state = optax.tree_utils.tree_map_params(
        tx,
        lambda _, place: place,
        shapes.opt_state,
        trainable({"student": moments, "objective": shared}, trains),
        transform_non_params=lambda _: everywhere,
    )
    averages = student.shardings if averaged else None
    small = [jax.tree.map(lambda _: everywhere, part) for part in (kept, recent)]
    places: Any = (everywhere, params, opt_state, averages, *small)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, TrainState(*places))
