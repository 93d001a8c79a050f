"""What a job describes, made real: rows on disk, weights on devices."""

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxkd.config.schema import Experiment
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import Batch, PyTree
from jaxkd.data import build, loader
from jaxkd.data.rows import Rows
from jaxkd.data.sources import open_source
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses.divergences import next_token
from jaxkd.models import heads, quantized, shrink, transformer
from jaxkd.run.job import Job, Model
from jaxkd.runtime import multihost

_IMPORTANCE_ROWS = 2  # of each domain
_PART = 0.8  # of a device's memory that a model may take there, beside its activations


class Domains(NamedTuple):
    """Prepared rows of every domain, in the config's order."""

    names: tuple[str, ...]
    prepared: tuple[build.Prepared, ...]
    train: tuple[Rows, ...]
    valid: tuple[Rows, ...]

    @property
    def sizes(self) -> list[int]:
        """Training rows per domain that are there to draw from."""
        return [len(rows) for rows in self.train]

    @property
    def whole(self) -> list[int]:
        """Training rows that each domain's whole text would give, beyond `data.train_rows` too: what rules weigh by."""
        return [p.whole_rows for p in self.prepared]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each domain's rows: what a resumed run must find again."""
        return {p.name: p.fingerprint for p in self.prepared}


def domains(job: Job, progress: bool = True) -> Domains:
    """Build the rows that are not there yet, and open all of them.

    Process 0 builds; then the others find its rows on a shared disk, or build the same ones on their own.

    Raises:
        ValueError, FileNotFoundError, OSError: with one line on what is wrong with which domain.
    """
    kept = "stopped by a signal while rows were built: domains that are done are kept, and the same command goes on"
    with multihost.interruptible(kept):
        prepared = multihost.main_first("rows", lambda: _prepared(job, progress))
    multihost.assert_equal("the rows of the domains", {p.name: p.fingerprint for p in prepared})
    train = tuple(Rows(p.path, "train") for p in prepared)
    valid = tuple(Rows(p.path, "valid") for p in prepared)
    return Domains(job.domains, tuple(prepared), train, valid)


def _prepared(job: Job, progress: bool) -> list[build.Prepared]:
    data = job.experiment.data
    return [
        build.prepare(
            name,
            open_source(spec, data.text_key),
            job.tokenizer,
            data.length,
            data.train_rows,
            data.valid_rows,
            data.directory,
            valid_share=data.valid_share,
            progress=progress,
        )
        for name, spec in data.domains.items()
    ]


def held_out(
    job: Job, rows: Domains, host_features: loader.HostFeatures = lambda rows: rows
) -> dict[str, Iterator[tuple[Batch, np.ndarray]]]:
    """Each domain's held-out rows as batches on the devices, with the bytes of their targets; to be read once."""
    place, size = batch_sharding(job.mesh), job.experiment.run.eval_batch
    return {
        name: loader.fixed_batches(valid, i, size, place, host_features)
        for i, (name, valid) in enumerate(zip(rows.names, rows.valid, strict=True))
    }


def put(params: PyTree, model: Model) -> PyTree:
    """Host arrays, all or some of a model's, to their shards, as the model stores them."""
    params = quantized.quantize(params) if model.quantized else params
    return jax.tree.map(
        lambda x, shape, place: jax.make_array_from_callback(
            shape.shape, place, lambda index: np.asarray(x[index], shape.dtype)
        ),
        params,
        {name: model.shapes[name] for name in params},
        {name: model.shardings[name] for name in params},
    )


def host_params(model: Model, seed: int, only: tuple[str, ...] | None = None) -> PyTree:
    """A model's weights on the host: from its checkpoint, or random.

    Args:
        model: which.
        seed: of random ones.
        only: the top-level names that are wanted, None for all.
    """
    if model.checkpoint is not None:
        return model.checkpoint.load(np.float32, only)
    params = jax.tree.map(np.asarray, transformer.init(model.config, jax.random.key(seed)))
    return params if only is None else {name: params[name] for name in only}


def teacher_seed(e: Experiment, number: int) -> int:
    """Of the random weights of the teacher with that number; the student has the one after the first."""
    return e.run.seed + number + (number > 0)


class Models(NamedTuple):
    """Weights on their devices."""

    teachers: dict[str, PyTree]  # by name; of cached ones the head alone, of a student that teaches itself nothing
    student: PyTree | None
    kept_layers: tuple[int, ...] | None  # of the model that the student was cut from


def teacher(job: Job, name: str) -> PyTree:
    """A teacher's whole weights on their devices, whether it is cached or not."""
    number = list(job.teachers).index(name)
    return put(host_params(job.teachers[name], teacher_seed(job.experiment, number)), job.teachers[name])


def models(job: Job, rows: Domains, with_student: bool = True, progress: bool = True) -> Models:
    """Load the teachers, of cached ones the head, and make the student's first parameters unless they are restored.

    Args:
        job: what to load.
        rows: prepared, for the choice of layers.
        with_student: whether the student is wanted.
        progress: show it on stderr.

    Raises:
        ValueError, FileNotFoundError: when a file is damaged or does not fit.
    """
    e = job.experiment
    cut = with_student and e.student.path == "teacher"
    teachers: dict[str, PyTree] = {}
    host: PyTree = None
    for number, (name, model) in enumerate(() if job.own else job.teachers.items()):
        cut_here = cut and number == 0
        whole = not e.teacher.models[name].cache
        found = host_params(model, teacher_seed(e, number), None if whole or cut_here else heads.names(model.config))
        teachers[name] = put(found if whole else {n: found[n] for n in heads.names(model.config)}, model)
        host = found if cut_here else host
        del found
    if not with_student:
        return Models(teachers, None, None)
    if not cut:
        host = host_params(job.student, e.run.seed + 1)
    kept: tuple[int, ...] | None = e.student.layers or None
    if e.student.keep:
        found = _by_importance(job, rows, host, progress and multihost.is_main())
        kept = tuple(
            multihost.broadcast("layers", lambda: list(found))
        )  # a near tie may fall otherwise on another host
    if kept:
        host = shrink.keep_layers(host, kept)
    return Models(teachers, put(host, job.student), kept)


def _by_importance(job: Job, rows: Domains, host: PyTree, progress: bool) -> tuple[int, ...]:
    """Layers to keep, by the loss on the first training rows of each domain when each is left out."""
    depth = jax.tree.leaves(host["layers"])[0].shape[0]
    side = job.teacher if job.experiment.student.path == "teacher" else job.student
    config = side.config if side.checkpoint is None else side.checkpoint.config  # with all its layers
    # On one device and on the same rows whatever the mesh, so that the choice of layers does not depend on it.
    batches = [next(loader.fixed_batches(r, i, _IMPORTANCE_ROWS))[0] for i, r in enumerate(rows.train)]
    batch = jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts]), *batches)

    @jax.jit
    def loss(params: PyTree, layer: jax.Array, batch: Batch) -> jax.Array:
        head = transformer.forward(config, shrink.without_layer(params, layer), batch).head
        value, _ = linear_divergence(
            (next_token(),), head, None, batch.targets, batch.weights[None], (1.0,), vocab=job.tokenizer.vocab
        )
        return value / batch.weights.sum()

    check_one_device(host, jax.local_devices()[0])
    params = jax.tree.map(jnp.asarray, host)
    show: Any = lambda items: tqdm(items, "leaving out each layer", file=sys.stderr, disable=not progress, leave=False)
    scores = shrink.importance(lambda layer: float(loss(params, jnp.asarray(layer), batch)), depth, show)
    if not all(math.isfinite(s) for s in scores):
        raise ValueError("the loss is not finite when a layer is left out: check the teacher's weights")
    return shrink.most_important(scores, job.experiment.student.keep)


def check_one_device(host: PyTree, device: Any) -> None:
    """See that a model can be tried on one device in float32, as `student.keep` does.

    Args:
        host: its arrays.
        device: of JAX; one that does not know its memory has enough.

    Raises:
        ValueError: it cannot.
    """
    size, memory = 4 * sum(x.size for x in jax.tree.leaves(host)), device.memory_stats() or {}
    if size > _PART * memory.get("bytes_limit", math.inf):
        raise ValueError(
            f"student.keep tries the model without each layer on one device, where its {size / 2**30:.1f} GiB in "
            "float32 do not fit: name the layers (student.layers), or choose them where JAX_PLATFORMS=cpu"
        )
