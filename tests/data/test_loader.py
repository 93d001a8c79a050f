"""Batches are a function of the step, whatever the devices, and carry the rows the mixture says."""

import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxkd.data import loader
from jaxkd.data import mixture as mixtures
from jaxkd.data.rows import Rows

BATCH = 8


@pytest.fixture(scope="module")
def rows(domains):
    return [Rows(prepared.path, "train") for prepared in domains]


@pytest.fixture(scope="module")
def mixture(rows):
    return mixtures.init(mixtures.natural([len(side) for side in rows]))


def mesh(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    names = ("data", "model")[: len(shape)]
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(shape))


def host(batches):
    return [jax.tree.map(np.asarray, batch) for batch in batches]


def assert_same(first, second):
    assert len(first) == len(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_batches_follow_the_order_from_any_start(rows, mixture):
    batches = host(loader.batches(rows, mixture, 3, BATCH, 10, 16, 10))
    assert len(batches) == 6
    domain, row = mixtures.order(mixture, [len(side) for side in rows], 3, 6 * BATCH)
    np.testing.assert_array_equal(np.concatenate([batch.domain for batch in batches]), domain)
    np.testing.assert_array_equal(np.concatenate([batch.row for batch in batches]), row)
    assert set(domain) == {0, 1}
    for batch in batches:
        for i in range(BATCH):
            stored = rows[batch.domain[i]].read([batch.row[i]])
            for name in ("tokens", "targets", "weights", "segments", "positions"):
                np.testing.assert_array_equal(getattr(batch, name)[i], stored[name][0])
    kinds = {
        name: str(values.dtype)
        for name, values in batches[0]._asdict().items()
        if name not in ("teacher", "aux", "view")
    }
    assert batches[0].aux == {}
    assert kinds.pop("weights") == "float32"
    assert set(kinds.values()) == {"int32"}
    # Any start gives the rest.
    everything = host(loader.batches(rows, mixture, 0, BATCH, 0, 7, 0))
    for start in (1, 4, 7):
        assert_same(host(loader.batches(rows, mixture, 0, BATCH, start, 7, 0)), everything[start:])


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((8,), ("data",)), ((4, 2), ("data",)), ((2, 4), (("data", "model"),)), ((2, 2), ("data", "model"))],
)
def test_shardings_hold_the_same_batches(rows, mixture, shape, spec):
    sharding = NamedSharding(mesh(*shape), PartitionSpec(*spec))
    sharded = list(loader.batches(rows, mixture, 0, BATCH, 0, 3, 0, sharding))
    assert_same(host(sharded), host(loader.batches(rows, mixture, 0, BATCH, 0, 3, 0)))
    assert sharded[0].tokens.sharding.is_equivalent_to(sharding, 2)
    assert len(sharded[0].row.sharding.device_set) == sharding.num_devices


def test_a_process_reads_its_own_rows_and_all_together_all(rows, mixture, monkeypatch):
    whole = host(loader.batches(rows, mixture, 0, BATCH, 0, 2, 0))
    sharding = NamedSharding(mesh(4, 2), PartitionSpec("data"))
    everywhere = sharding.addressable_devices_indices_map((BATCH,))
    domain, row = mixtures.order(mixture, [len(side) for side in rows], 0, 2 * BATCH)
    halves = []
    for process in range(2):
        mine = {d: index for d, index in everywhere.items() if d.id // 4 == process}
        monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda self, shape, m=mine: m)
        where = loader.local_rows(BATCH, sharding)
        halves.append(where)
        local = loader.read_rows(rows, domain[where], row[where])
        np.testing.assert_array_equal(local["tokens"], whole[0].tokens[where])
    np.testing.assert_array_equal(np.concatenate(halves), np.arange(BATCH))


def test_fixed_batches(rows, domains):
    side = Rows(domains[0].path, "valid")
    for sharding in (None, NamedSharding(mesh(4), PartitionSpec("data"))):
        got = list(loader.fixed_batches(side, 5, BATCH, sharding))
        batches, sizes = host([batch for batch, _ in got]), [size for _, size in got]
        assert len(batches) == -(-len(side) // BATCH)
        stored = side.read(range(len(side)))
        assert len(side) % BATCH
        tokens = np.concatenate([batch.tokens for batch in batches])
        np.testing.assert_array_equal(tokens[: len(side)], stored["tokens"])
        weights = np.concatenate([batch.weights for batch in batches])
        np.testing.assert_array_equal(weights[: len(side)], stored["weights"])
        assert (weights[len(side) :] == 0).all()
        assert np.concatenate([batch.segments for batch in batches]).max(axis=1).min() >= 1
        np.testing.assert_array_equal(np.concatenate(sizes)[: len(side)], stored["bytes"])
        assert sum(size.sum() for size in sizes) == stored["bytes"].sum()
        assert all((batch.domain == 5).all() for batch in batches)


def test_rows_are_read_ahead_by_another_thread_up_to_the_end(rows, mixture, monkeypatch):
    """Beyond the interval the rows are not drawn yet."""
    readers, read, until = [], loader.read_rows, time.monotonic() + 60
    noting = lambda *arguments: readers.append(threading.get_ident()) or read(*arguments)
    monkeypatch.setattr(loader, "read_rows", noting)
    assert len(list(loader.batches(rows, mixture, 0, BATCH, 2, 5, 0))) == len(readers) == 3
    batches = loader.batches(rows, mixture, 0, BATCH, 0, 20, 0)
    readers.clear()
    next(batches)
    while len(readers) < 4:  # the first one, the next two, and one more
        assert time.monotonic() < until, "nothing is read until it is asked for"
        time.sleep(0.01)
    assert threading.get_ident() not in readers
