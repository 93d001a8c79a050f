"""What follows from an experiment without loading a weight or a row: all that compiling the step needs."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxkd.config import resolve, validate
from jaxkd.config.schema import Experiment, MeshBlock
from jaxkd.core import sharding
from jaxkd.core.types import PyTree, Scalar
from jaxkd.data import rules
from jaxkd.losses import group_dro
from jaxkd.losses import objective as objectives
from jaxkd.losses.objective import Objective
from jaxkd.models.transformer import Config
from jaxkd.run import rollouts
from jaxkd.run.batch import rows_batch
from jaxkd.run.open_models import Models, open_models
from jaxkd.train import guard, optim
from jaxkd.train.state import TrainState, abstract_state


class Job(NamedTuple):
    """Everything about a training run but its arrays: for the loop and for compiling its step."""

    experiment: Experiment
    mesh: Mesh
    models: Models
    rule: rules.Rule  # how the domains are mixed
    objective: Objective
    objective_init: Callable[[jax.Array], PyTree]  # key -> params["objective"]
    tx: optax.GradientTransformation
    lr: Scalar
    state: TrainState  # ShapeDtypeStruct leaves with shardings
    frozen: PyTree  # the student where it does not train, else {}; likewise


def build(e: Experiment, devices: list | None = None, shapes: Mapping[str, Config] | None = None) -> Job:
    """Functions, abstract trees and shardings of an experiment on devices, by default all; loads no weights.

    `shapes` has configs by path of models that are not on this machine, which suffice for compiling. ValueError for
    values that do not fit together, FileNotFoundError for missing paths.
    """
    mesh = build_mesh(e.run.mesh, devices or jax.devices())
    validate.check(e, mesh.shape)
    models = open_models(e, mesh, shapes or {})
    student, teacher, frozen = models.student, models.teacher, e.student.frozen
    rule = resolve.mixture_rule(e.data, e.teacher)
    if e.teacher.members:
        resolve.teacher_weights(e.teacher.members, tuple(e.data.domains), e.run.steps)
    lr = resolve.scalar(e.optim.lr, e.run.steps, "optim.lr")
    configs = {"teacher": teacher.config, "student": student.config}
    terms = resolve.terms(e.objective, e.run.steps, configs, e.teacher)
    objective = objectives.objective(
        terms,
        vocab=models.vocab,
        domains=tuple(e.data.domains),
        tails=e.teacher.temperatures,
        measured=group_dro.MEASURED if rule.group_dro else {},
    )
    outputs = {}
    if objective.fields:  # features have parameters as wide as what the forward passes return
        batch = rows_batch(e.data)
        for side, model, taps in (
            ("student", student, objective.student_taps),
            ("teacher", teacher, objective.teacher_taps),
        ):
            outputs[side] = jax.eval_shape(partial(model.forward, taps=taps), model.shapes, batch)
    objective_init = partial(objective.init, **outputs)
    learned = jax.eval_shape(objective_init, jax.random.key(0))
    if frozen and not learned:
        raise ValueError("student.frozen leaves nothing to train: no term of the objective has parameters of its own")

    # Matrices that the objective learns are as wide as the model and sharded as its `embed` is. They do not decay
    # (`decayed` has no axes for them): an identity pulled to 0 would be another objective.
    axes = jax.tree.map(lambda x: ("embed", *[None] * (len(x.shape) - 1)) if len(x.shape) > 1 else (None,), learned)
    trees = {"student": ({}, {}) if frozen else (student.axes, student.shapes), "objective": (axes, learned)}
    shardings, moments = (
        {name: sharding.shardings(axes, shapes, mesh, table) for name, (axes, shapes) in trees.items()}
        for table in (student.rules, sharding.MOMENTS)
    )
    leaf = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = {name: jax.tree.map(leaf, shapes, shardings[name]) for name, (_, shapes) in trees.items()}
    decayed = {"student": trees["student"][0], "objective": jax.tree.map(lambda _: (), learned)}
    tx = optim.build(e.optim, lr, decayed, shardings if mesh.shape["replica"] > 1 else None)
    state = abstract_state(
        params,
        moments,
        tx,
        averaged=e.teacher.is_self,
        group_dro=group_dro.init(np.ones(len(e.data.domains))) if rule.group_dro else None,
        recent=guard.init() if e.optim.spike else None,
    )
    state = state._replace(texts=rollouts.abstract_texts(e, mesh))
    return Job(e, mesh, models, rule, objective, objective_init, tx, lr, state, student.abstract if frozen else {})


def build_mesh(sizes: MeshBlock, devices: list) -> Mesh:
    """The mesh of a run; sizes of 1 take one device of a single process, however many there are."""
    single = (sizes.data, sizes.model, sizes.context, sizes.teacher, abs(sizes.replica)) == (1, 1, 1, 1, 1)
    devices = devices[:1] if single and jax.process_count() == 1 else devices
    others = {"replica": sizes.replica, "context": sizes.context, "teacher": sizes.teacher}
    return sharding.make_mesh(sizes.data, sizes.model, devices, **others)


def fit_devices(e: Experiment) -> Experiment:
    """The experiment for verbs that do not train: on one device where the run's own mesh does not fit these."""
    mesh = e.run.mesh
    if jax.process_count() > 1:  # each needs a part of the mesh
        return e
    rows = mesh.data * mesh.teacher * (sharding.slices(jax.devices()) if mesh.replica == -1 else mesh.replica)
    if rows * mesh.context * mesh.model == jax.device_count() and e.run.eval_batch % rows == 0:
        return e
    return dataclasses.replace(e, run=dataclasses.replace(e.run, mesh=MeshBlock(1, 1)))
