"""Rows to batches on their devices.

The batch at a step is a pure function of the mixture, the seed and the step. Threads read ahead on the host,
each process only the rows that its devices hold; arrays are put in place by the thread that trains.
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

Annotate = Callable[[dict[str, Any]], dict[str, Any]]
"""What a teacher's cache adds to rows on the host, by the names of `Batch`."""


def _by_row(sharding: NamedSharding) -> NamedSharding:
    """The sharding of an array that has the batch axis only."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))


def local_rows(batch: int, sharding: NamedSharding | None) -> np.ndarray:
    """Places in the global batch that this process needs, ascending.

    Raises:
        ValueError: the batch does not divide over the devices.
    """
    if sharding is None:
        return np.arange(batch)
    try:
        indices = _by_row(sharding).addressable_devices_indices_map((batch,))
    except ValueError as error:
        raise ValueError(f"a batch of {batch} rows does not divide over the mesh {sharding}: {error}") from None
    needed = np.zeros(batch, bool)
    for index in indices.values():
        needed[index] = True
    return np.nonzero(needed)[0]


def place(local: dict[str, Any], batch: int, where: np.ndarray, sharding: NamedSharding | None) -> Batch:
    """Global arrays out of this process's rows.

    Args:
        local: arrays, or trees of them, whose first axis goes over the places `where`.
        batch: rows in the global batch.
        where: ascending places in the global batch [n].
        sharding: of the batch axis; `None` is the default device.
    """
    known = {name: local[name] for name in Batch._fields if name in local}
    if sharding is None:
        return Batch(**jax.tree.map(jax.device_put, known))
    by_row = _by_row(sharding)

    def array(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # only devices of this process are asked for
            places = np.searchsorted(where, np.arange(batch)[index[0]])
            return values[places][(slice(None), *index[1:])]

        return jax.make_array_from_callback((batch, *values.shape[1:]), sharding if values.ndim > 1 else by_row, shard)

    return Batch(**jax.tree.map(array, known))


def read_rows(domains: Sequence[Rows], domain: np.ndarray, row: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of several domains, in the order given: domain and row [n] -> arrays [n, ...]."""
    result: dict[str, np.ndarray] = {}
    for d in np.unique(domain):
        here = domain == d
        for name, values in domains[d].read(row[here]).items():
            if name not in result:
                result[name] = np.zeros((len(row), *values.shape[1:]), values.dtype)
            result[name][here] = values
    return {**result, "row": row.astype(np.int32), "domain": domain.astype(np.int32)}


def drawn(
    sizes: Sequence[int], mixture: Mixture, seed: int, batch: int, step: int, stop_step: int, interval_start_step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Domains and rows [B] of the whole global batch of a step, in every process, as `batches` has them.

    Args:
        sizes: rows of each domain.
        mixture, seed, batch, stop_step, interval_start_step: as for `batches`.
        step: of the interval.
    """
    domain, row = mixtures.order(mixture, sizes, seed, (stop_step - interval_start_step) * batch)
    places = slice((step - interval_start_step) * batch, (step - interval_start_step + 1) * batch)
    return domain[places], row[places]


def batches(
    domains: Sequence[Rows],
    mixture: Mixture,
    seed: int,
    batch: int,
    start_step: int,
    stop_step: int,
    interval_start_step: int,
    sharding: NamedSharding | None = None,
    host_features: Annotate = lambda rows: rows,
) -> Iterator[Batch]:
    """The batches of an interval of constant mixture, from `start_step` to its end.

    Step s has rows `[(s - interval_start_step) * batch, ... + batch)` of `mixture.order` for the interval's
    `(stop_step - interval_start_step) * batch` rows. Nothing is read beyond `stop_step`.

    Args:
        domains: rows of each domain, in the mixture's order.
        mixture: the interval's.
        seed: the run's.
        batch: rows in the global batch.
        start_step: first step wanted; a resumed run starts inside the interval.
        stop_step: the interval's end, not included. The order depends on it: to stop earlier, stop iterating.
        interval_start_step: the interval's first step.
        sharding: of the batch axis (and the length axis, if it names one).
        host_features: a teacher's; it runs in the threads that read ahead.

    Yields:
        int32 arrays, float32 weights.

    Raises:
        ValueError: steps out of order, an empty batch, domains of different lengths, or a batch that does not
            divide.
    """
    if not interval_start_step <= start_step <= stop_step:
        raise ValueError(
            f"steps must be in order: interval_start_step={interval_start_step} <= start_step={start_step} "
            f"<= stop_step={stop_step}"
        )
    if batch < 1:
        raise ValueError(f"the batch must have at least 1 row, got {batch}")
    lengths = {rows.length for rows in domains}
    if len(lengths) != 1:
        raise ValueError(f"all domains must have rows of one length, got {sorted(lengths)}: prepare them again")
    where = local_rows(batch, sharding)
    sizes = [len(rows) for rows in domains]
    domain, row = mixtures.order(mixture, sizes, seed, (stop_step - interval_start_step) * batch)

    def read(step: int) -> dict[str, np.ndarray]:
        places = (step - interval_start_step) * batch + where
        return host_features(read_rows(domains, domain[places], row[places]))

    # Checked above when called, not when first iterated: so the generator is a function of its own.
    return _ahead(read, start_step, stop_step, batch, where, sharding)


def _ahead(
    read: Any, start: int, stop: int, batch: int, where: np.ndarray, sharding: NamedSharding | None
) -> Iterator[Batch]:
    if start == stop:
        return
    for local in grain.MapDataset.range(start, stop).map(read).to_iter_dataset(_READ):
        yield place(local, batch, where, sharding)


def fixed_batches(
    rows: Rows,
    domain: int,
    batch: int,
    sharding: NamedSharding | None = None,
    host_features: Annotate = lambda rows: rows,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """All rows of a domain in their order, for evaluation.

    The last batch is filled up with copies of its last row, of zero weight and zero bytes: copies, since a row
    without any segment has nothing to attend to.

    Args:
        rows: the domain's.
        domain: its number.
        batch: rows in the global batch.
        sharding, host_features: as for `batches`.

    Yields:
        the batch, and int64 [B]: text bytes of each row's targets. Every process gets all of them.

    Raises:
        ValueError: the batch is empty or does not divide over the devices.
    """
    if batch < 1:
        raise ValueError(f"the batch must have at least 1 row, got {batch}")
    where = local_rows(batch, sharding)

    def read(number: int) -> tuple[dict[str, Any], np.ndarray]:
        wanted = np.arange(number * batch, (number + 1) * batch)
        real = wanted < len(rows)
        wanted = np.minimum(wanted, len(rows) - 1)
        values = read_rows([rows], np.zeros(batch, np.int64), wanted)
        values["domain"] = np.full(batch, domain, np.int32)
        values["weights"] = values["weights"] * real[:, None].astype(np.float32)
        # What a cache adds to a row is many times the row: read for those alone that this process places.
        mine = host_features({name: value[where] for name, value in values.items()})
        return mine, np.where(real, values["bytes"], 0)

    return _fixed(read, -(-len(rows) // batch), batch, where, sharding)


def _fixed(
    read: Any, number: int, batch: int, where: np.ndarray, sharding: NamedSharding | None
) -> Iterator[tuple[Batch, np.ndarray]]:
    for mine, size in grain.MapDataset.range(number).map(read).to_iter_dataset(_READ):
        yield place(mine, batch, where, sharding), size
