"""Rows on disk, and weights on devices."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxkd.config.schema import DataBlock, Experiment, StudentBlock
from jaxkd.core import seeds
from jaxkd.core.types import Batch, PyTree
from jaxkd.data import build, loader
from jaxkd.data.rows import Rows
from jaxkd.data.sources import open_source
from jaxkd.data.tokenize import Tokenizer
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses.divergences import next_token
from jaxkd.models import heads, quantized, shrink, transformer
from jaxkd.run.open_models import Model, Models
from jaxkd.runtime import multihost
from jaxkd.runtime.progress import bar as progress_bar

_IMPORTANCE_ROWS = 2  # of each domain
_MEMORY_SHARE = 0.8  # of a device's memory that parameters may take beside activations


class Domains(NamedTuple):
    """Prepared rows of every domain, in the config's order."""

    names: tuple[str, ...]
    prepared: tuple[build.Prepared, ...]
    train: tuple[Rows, ...]
    valid: tuple[Rows, ...]

    @property
    def sizes(self) -> list[int]:
        """Training rows per domain."""
        return [len(rows) for rows in self.train]

    @property
    def whole(self) -> list[int]:
        """Training rows per domain without the limit `data.train_rows`: mixture rules weigh by these."""
        return [p.whole_rows for p in self.prepared]

    @property
    def fingerprints(self) -> dict[str, str]:
        return {p.name: p.fingerprint for p in self.prepared}


def domains(data: DataBlock, tokenizer: Tokenizer, progress: bool = True) -> Domains:
    """Build the rows that do not exist yet, and open all of them; an error is one line that names the domain.

    Process 0 builds first; then the others find its rows on a shared disk, or build the same ones on their own.
    """

    def prepare() -> list[build.Prepared]:
        return [
            build.prepare(
                name,
                open_source(domain.source, domain.field or data.text_key, domain.validation),
                tokenizer,
                data.length,
                data.train_rows,
                data.valid_rows,
                data.directory,
                valid_share=data.valid_share,
                bad_records=data.bad_records,
                progress=progress,
                packs=data.packs,
                context=data.context,
            )
            for name, domain in data.sources.items()
        ]

    stopped = "stopped by a signal while rows were built: finished domains are kept; the same command continues"
    with multihost.interruptible(stopped):
        prepared = multihost.main_first("rows", prepare)
    multihost.assert_equal("the rows of the domains", {p.name: p.fingerprint for p in prepared})
    train, valid = (tuple(Rows(p.path, split) for p in prepared) for split in ("train", "valid"))
    return Domains(tuple(data.domains), tuple(prepared), train, valid)


def held_out(
    rows: Domains, batch: int, sharding: NamedSharding, host_features: loader.HostFeatures = lambda rows: rows
) -> dict[str, Iterator[tuple[Batch, np.ndarray]]]:
    """Each domain's held-out rows as sharded batches, with the bytes of their targets; each is read once."""
    return {
        name: loader.fixed_batches(valid, i, batch, sharding, host_features)
        for i, (name, valid) in enumerate(zip(rows.names, rows.valid, strict=True))
    }


def put(params: PyTree, model: Model) -> PyTree:
    """Host arrays, all or some top-level names of a model, as sharded arrays in the dtype the model stores."""
    params = quantized.quantize(params) if model.quantized else params
    return jax.tree.map(
        lambda x, shape, sharding: jax.make_array_from_callback(
            shape.shape, sharding, lambda index: np.asarray(x[index], shape.dtype)
        ),
        params,
        {name: model.shapes[name] for name in params},
        {name: model.shardings[name] for name in params},
    )


def host_params(model: Model, only: tuple[str, ...] | None = None) -> PyTree:
    """A model's weights on the host, in float32: from its checkpoint, or random; `only` some top-level names."""
    if model.checkpoint is not None:
        return model.checkpoint.load(np.float32, only)
    params = jax.tree.map(np.asarray, transformer.init(model.config, seeds.key(model.seed)))
    return params if only is None else {name: params[name] for name in only}


class Weights(NamedTuple):
    """Parameters on their devices."""

    teachers: dict[str, PyTree]  # by name; of cached ones the head alone; {} where the student is its own teacher
    student: PyTree | None
    kept_layers: tuple[int, ...] | None  # of the model that the student is cut from


def teachers(models: Models, keep_host: bool = False) -> tuple[dict[str, PyTree], PyTree]:
    """Every teacher's parameters, of cached ones the head; with `keep_host` the first one's on the host too."""
    placed: dict[str, PyTree] = {}
    first: PyTree = None
    for name, model in () if models.is_self else models.teachers.items():
        keep = keep_host and not placed
        names = heads.names(model.config) if model.cache else None
        host = host_params(model, None if keep else names)
        placed[name] = put(host if names is None else {n: host[n] for n in names}, model)
        first = host if keep else first
        del host
    return placed, first


def weights(
    models: Models, block: StudentBlock, rows: Domains, progress: bool = True, with_student: bool = True
) -> Weights:
    """Load the teachers and, with `with_student`, the student's first parameters."""
    cut = with_student and block.path == "teacher"
    placed, host = teachers(models, keep_host=cut)
    if not with_student:
        return Weights(placed, None, None)
    source = models.teacher if cut else models.student
    host = host if cut else host_params(source)
    layers: tuple[int, ...] | None = block.layers or None
    if block.keep:
        config = source.config if source.checkpoint is None else source.checkpoint.config  # with all its layers
        chosen = _by_importance(config, block.keep, models.vocab, rows, host, progress and multihost.is_main())
        # Near ties may be decided differently on another host.
        layers = tuple(multihost.broadcast("layers", lambda: list(chosen)))
    if layers:
        host = shrink.keep_layers(host, layers)
    return Weights(placed, put(host, models.student), layers)


def frozen(e: Experiment, models: Models) -> PyTree:
    """The student's parameters that are in no checkpoint: all of them under `student.frozen`, else {}."""
    return weights(models, e.student, domains(e.data, models.tokenizer)).student if e.student.frozen else {}


def _by_importance(
    config: transformer.Config, keep: int, vocab: int, rows: Domains, host: PyTree, progress: bool
) -> tuple[int, ...]:
    """Layers to keep, by the loss on the first training rows of each domain when each is left out."""
    depth = jax.tree.leaves(host["layers"])[0].shape[0]
    # On one device and on the same rows whatever the mesh, so that the choice of layers does not depend on it.
    batches = [next(loader.fixed_batches(r, i, _IMPORTANCE_ROWS))[0] for i, r in enumerate(rows.train)]
    batch = jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts]), *batches)

    @jax.jit
    def loss(params: PyTree, layer: jax.Array, batch: Batch) -> jax.Array:
        head = transformer.forward(config, shrink.without_layer(params, layer), batch).head
        value, _ = linear_divergence(
            (next_token(),), head, None, batch.targets, batch.weights[None], (1.0,), vocab=vocab
        )
        return value / batch.weights.sum()

    check_one_device(host, jax.local_devices()[0])
    params = jax.tree.map(jnp.asarray, host)
    show: Any = lambda items: progress_bar(items, "leaving out each layer", unit="layers", shown=progress, leave=False)
    scores = shrink.importance(lambda layer: float(loss(params, jnp.asarray(layer), batch)), depth, show)
    if not all(math.isfinite(s) for s in scores):
        raise ValueError("the loss is not finite when a layer is left out: check the teacher's weights")
    return shrink.most_important(scores, keep)


def check_one_device(host: PyTree, device: Any) -> None:
    """Refuse parameters that do not fit on one JAX device in float32, as `student.keep` needs."""
    size, memory = 4 * sum(x.size for x in jax.tree.leaves(host)), device.memory_stats() or {}
    if size > _MEMORY_SHARE * memory.get("bytes_limit", math.inf):
        raise ValueError(
            f"student.keep tries the model without each layer on one device, where its {size / 2**30:.1f} GiB in "
            "float32 do not fit: name the layers (student.layers), or choose them where JAX_PLATFORMS=cpu"
        )
