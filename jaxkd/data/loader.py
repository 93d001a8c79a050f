"""Batches on their devices from packed rows, a pure function of the mixture, the seed and the step.

Host threads prefetch rows, each process only those that its devices hold; the training thread transfers them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxkd.core.types import Batch
from jaxkd.data import mixture as mixtures
from jaxkd.data.mixture import Mixture
from jaxkd.data.rows import Rows

_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)

HostFeatures = Callable[[dict[str, Any]], dict[str, Any]]
"""`Teacher.host_features`: rows by the field names of `Batch` -> the same with what a teacher adds on the host."""


def _by_row(sharding: NamedSharding) -> NamedSharding:
    """The sharding of an array [B], from that of an array [B, L]."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))


def local_rows(batch: int, sharding: NamedSharding | None) -> np.ndarray:
    """Ascending indices [n] into the global batch of the rows that this process's devices hold."""
    rows = np.arange(batch)
    if sharding is None:
        return rows
    indices = _by_row(sharding).addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([rows[index] for index in indices.values()]))


def to_devices(local: dict[str, Any], batch: int, indices: np.ndarray, sharding: NamedSharding | None) -> Batch:
    """The global batch of `batch` rows, from the n rows that this process holds at `indices` (ascending).

    `local` has arrays, or pytrees of them, [n, ...] by the field names of `Batch`; other names are ignored.
    """
    fields = {name: local[name] for name in Batch._fields if name in local}
    if sharding is None:
        return Batch(**jax.tree.map(jax.device_put, fields))
    by_row, length = _by_row(sharding), local["tokens"].shape[1]

    def array(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # only devices of this process are asked for
            held = np.searchsorted(indices, np.arange(batch)[index[0]])
            return values[held][(slice(None), *index[1:])]

        per_token = values.shape[1:2] == (length,)
        return jax.make_array_from_callback((batch, *values.shape[1:]), sharding if per_token else by_row, shard)

    return Batch(**jax.tree.map(array, fields))


def read_rows(domains: Sequence[Rows], domain: np.ndarray, row: np.ndarray) -> dict[str, Any]:
    """Rows of several domains in the given order: domain and row [n] -> arrays [n, ...] by field.

    `aux` has the arrays of all domains, so that every batch has the same: zeros for rows of a domain without one.
    """
    result: dict[str, Any] = {}
    aux = {name: np.zeros((len(row), *shape), dtype) for rows in domains for name, (shape, dtype) in rows.aux.items()}
    for d in np.unique(domain):
        chosen = domain == d
        values = domains[d].read(row[chosen])
        for name, array in values.pop("aux").items():
            aux[name][chosen] = array
        for name, array in values.items():
            if name not in result:
                result[name] = np.zeros((len(row), *array.shape[1:]), array.dtype)
            result[name][chosen] = array
    return {**result, "aux": aux, "row": row.astype(np.int32), "domain": domain.astype(np.int32)}


def step_rows(
    sizes: Sequence[int], mixture: Mixture, seed: int, batch: int, step: int, stop_step: int, interval_start_step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Domain and row [B] of the whole global batch that `batches` yields for a step, on every process."""
    domain, row = mixtures.order(mixture, sizes, seed, (stop_step - interval_start_step) * batch)
    span = slice((step - interval_start_step) * batch, (step - interval_start_step + 1) * batch)
    return domain[span], row[span]


def batches(
    domains: Sequence[Rows],
    mixture: Mixture,
    seed: int,
    batch: int,
    start_step: int,
    stop_step: int,
    interval_start_step: int,
    sharding: NamedSharding | None = None,
    host_features: HostFeatures = lambda rows: rows,
) -> Iterator[Batch]:
    """The batches of an interval of constant mixture, from `start_step` to its end.

    Step s has rows `[(s - interval_start_step) * batch, ... + batch)` of `mixture.order` for the interval's
    `(stop_step - interval_start_step) * batch` rows. Nothing is read beyond `stop_step`.

    A resumed run starts inside the interval. The order depends on `stop_step`: to stop earlier, stop iterating.
    `sharding` is of the batch axis (and the length axis, if it names one). A teacher's `host_features` run in the
    prefetching threads.
    """
    indices = local_rows(batch, sharding)
    sizes = [len(rows) for rows in domains]
    domain, row = mixtures.order(mixture, sizes, seed, (stop_step - interval_start_step) * batch)

    def read(step: int) -> dict[str, Any]:
        local = (step - interval_start_step) * batch + indices
        return host_features(read_rows(domains, domain[local], row[local]))

    if start_step < stop_step:
        for rows in grain.MapDataset.range(start_step, stop_step).map(read).to_iter_dataset(_READ):
            yield to_devices(rows, batch, indices, sharding)


def fixed_batches(
    rows: Rows,
    domain: int,
    batch: int,
    sharding: NamedSharding | None = None,
    host_features: HostFeatures = lambda rows: rows,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """All rows of a domain in stored order, for evaluation: batches, each with the text bytes [B] of its rows' targets.

    The bytes are of the global batch on every process. The last batch is filled with copies of its last row at zero
    weight and zero bytes. (Copies, because a row of padding alone would leave attention without any key.)
    """
    indices = local_rows(batch, sharding)

    def read(number: int) -> tuple[dict[str, Any], np.ndarray]:
        index = np.arange(number * batch, (number + 1) * batch)
        real = index < len(rows)
        index = np.minimum(index, len(rows) - 1)
        values = read_rows([rows], np.zeros(batch, np.int64), index)
        values["domain"] = np.full(batch, domain, np.int32)
        values["weights"] = values["weights"] * real[:, None].astype(np.float32)
        # A cache adds many times a row's own size: read it only for the rows of this process.
        local = host_features(jax.tree.map(lambda value: value[indices], values))
        return local, np.where(real, values["bytes"], 0)

    for local, size in grain.MapDataset.range(-(-len(rows) // batch)).map(read).to_iter_dataset(_READ):
        yield to_devices(local, batch, indices, sharding), size
