"""The checks before the first step; each failure is one sentence that says what to do."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxkd.config.schema import Experiment
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import Batch, Forward, PyTree
from jaxkd.data import chat, loader
from jaxkd.evals import compare
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses.divergences import next_token
from jaxkd.run import cache_teacher, load
from jaxkd.run.open_models import Model, Models
from jaxkd.run.teacher import Teachers, build_teacher, open_stores
from jaxkd.teachers.store import Store

_PADDING = 8  # tokens appended to a row
_WIDE = ("tokens", "targets", "weights", "segments", "positions")
_SAME = 2e-3  # nats, that the order of summation may change in float32
_PRECISION = 0.05  # nats per token that a compute dtype may cost against float32
_BEHIND = 0.02  # nats per token by which a teacher may be worse than its student: noise of a few rows


class Loaded(NamedTuple):
    """A run's models and rows before its first step."""

    models: Models
    rows: load.Domains
    teacher_params: Mapping[str, PyTree]
    teachers: Teachers
    student: PyTree
    average: PyTree  # `TrainState.ema`, or the student's parameters
    comparison: Callable[[PyTree, Any, Batch], compare.Sums]  # as `Teachers.comparison`


def prepare(e: Experiment, models: Models, rows: load.Domains) -> tuple[Loaded, dict[str, Store]]:
    """Load what the checks look at, as before a run's first step."""
    stores = open_stores(e, models, rows.fingerprints)
    teacher_params, student, _ = load.weights(models, e.student, rows)
    teachers = build_teacher(e, models, teacher_params, stores)
    return Loaded(models, rows, teacher_params, teachers, student, student, teachers.comparison(models)), stores


def run(loaded: Loaded, stores: Mapping[str, Store], e: Experiment, mesh: Mesh) -> Iterator[str]:
    """The checks, one after the other; each yields a line on what it measured, or raises ValueError."""
    models, rows = loaded.models, loaded.rows
    yield _chat(models)
    # Held-out rows of all domains in turn, with what the evaluation's teacher needs of them.
    size, sharding = e.run.eval_batch, batch_sharding(mesh)
    domain = np.arange(size) % len(rows.names)
    row = (np.arange(size) // len(rows.names)) % np.asarray([len(v) for v in rows.valid])[domain]
    mine = loader.local_rows(size, sharding)
    local = loader.read_rows(rows.valid, domain[mine], row[mine])
    batch = loader.to_devices(loaded.teachers.evaluate.host_features(local), size, mine, sharding)
    yield from _losses(loaded, batch)
    for name, model in () if models.is_self else models.teachers.items():
        if name not in stores:
            yield _forward(name, model, loaded.teacher_params[name], batch, models.vocab)
    yield _forward("student", models.student, loaded.student, batch, models.vocab)
    for name, store in stores.items():
        yield cache_teacher.spot_check(e, models, mesh, loaded.rows, name, store)


CONVERSATION = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
)


def _chat(models: Models) -> str:
    sides = {**models.teachers, "student": models.student}
    own = {side: model.tokenizer for side, model in sides.items() if model.tokenizer is not None}
    templates = {side: (t.chat_template, t.generation.tokens) for side, t in own.items() if t.chat_template}
    if all(each == next(iter(templates.values())) for each in templates.values()):
        return f"chat template: {'the same for teacher and student' if len(templates) > 1 else 'none to compare'}"
    rendered = {
        side: chat.render(template, CONVERSATION, tokens=tokens, source=f"the {side}", add_generation_prompt=True)
        for side, (template, tokens) in templates.items()
    }
    (first, expected), *others = rendered.items()
    for side, other in others:
        if other != expected:
            pairs = enumerate(zip(expected + "\0", other + "\0"))
            at = next(i for i, (a, b) in pairs if a != b)
            near = lambda s, at=at: repr(s[max(at - 20, 0) : at + 20])
            raise ValueError(
                f"the chat templates of {first} and {side} render the same conversation differently, from character "
                f"{at} on: {near(expected)} and {near(other)}. On a format that it was not trained on, a teacher's "
                "distribution is no target: give both models one template, or add --no-check where the data has no chat"
            )
    return "chat templates: different, but they render the same text"


def _losses(loaded: Loaded, batch: Batch) -> Iterator[str]:
    """Teacher and student on real rows, twice."""
    models = loaded.models
    inputs = (loaded.teachers.evaluate.state, jnp.zeros((), jnp.int32), loaded.average)
    once, again = (jax.device_get(loaded.comparison(loaded.student, inputs, batch)) for _ in range(2))
    for name, first, second in zip(compare.Sums._fields, once, again, strict=True):
        if not np.array_equal(first, second, equal_nan=True):
            raise ValueError(
                f"two passes over the same rows differ in {name} ({first} and {second}): the program is not "
                "deterministic, so no run can be repeated; check XLA_FLAGS and the device"
            )
    yield "two passes: bitwise equal"
    teacher, student = (float(x / once.tokens) for x in (once.teacher_nats, once.student_nats))
    guess = math.log(models.vocab)
    for side, nats in (("teacher", teacher), ("student", student)):
        if not math.isfinite(nats):
            raise ValueError(f"the {side}'s loss on held-out rows is {nats}: damaged weights, or its dtype overflows")
    real = models.is_self or all(m.checkpoint is not None for m in models.teachers.values())
    if real and not models.is_self and teacher >= guess:
        raise ValueError(
            f"the teacher's loss on held-out rows is {teacher:.2f} nats per token, no better than guessing "
            f"({guess:.2f}): its weights do not match its config, or it was not trained on text of this kind"
        )
    if real and teacher > student + _BEHIND:
        raise ValueError(
            f"the teacher's loss on held-out rows is {teacher:.2f} nats per token, worse than the student's "
            f"{student:.2f}: swap them, or add --no-check if that is intended"
        )
    yield f"held-out rows: teacher {teacher:.3f}, student {student:.3f}, guessing {guess:.3f} nats per token"


def _forward(side: str, model: Model, params: PyTree, batch: Batch, vocab: int) -> str:
    """Compare a model's loss with that of padded rows, and with that in float32."""

    @jax.jit
    def losses(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        def mean_nats(forward: Forward, batch: Batch) -> jax.Array:
            head, targets, weights = forward(params, batch).head, batch.targets, batch.weights[None]
            _, nats = linear_divergence((next_token(),), head, None, targets, weights, (1.0,), vocab=vocab)
            nats = nats[0][:, :length]
            live = batch.weights[:, :length] != 0
            return jnp.sum(jnp.where(live, nats, 0.0)) / jnp.sum(live)

        length = batch.tokens.shape[1]
        longer: dict[str, Any] = {name: jnp.pad(getattr(batch, name), ((0, 0), (0, _PADDING))) for name in _WIDE}
        float32 = partial(model.forward, dtype=jnp.float32)
        padded = batch._replace(**longer)
        return mean_nats(model.forward, batch), mean_nats(model.forward, padded), mean_nats(float32, batch)

    plain, padded, float32 = (float(x) for x in losses(params, batch._replace(teacher=None)))
    if abs(plain - padded) > (_SAME if plain == float32 else _PRECISION):
        raise ValueError(
            f"the {side}'s loss is {plain:.4f}, and {padded:.4f} on padded rows: its forward pass attends to padding"
        )
    if abs(plain - float32) > _PRECISION:
        key = "run.dtype" if side == "student" else "teacher.dtype"
        raise ValueError(
            f"the {side}'s loss is {plain:.3f} nats per token in its dtype, and {float32:.3f} in float32: set "
            f"{key}=float32, or use weights that were trained in this dtype"
        )
    return f"{side}: loss changed by {abs(plain - padded):.1e} nats by padding, {abs(plain - float32):.1e} by its dtype"
