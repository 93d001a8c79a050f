"""`jaxkd cache`: a teacher's signal of every row, computed once and stored; its cost and what it saves."""

import math
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxkd.config.schema import Experiment, TeacherBlock
from jaxkd.core import seeds
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import Batch, Hidden, PyTree
from jaxkd.data import loader
from jaxkd.evals.payload import payload_kl
from jaxkd.models import flops, heads
from jaxkd.report.text import amount
from jaxkd.run import load, rollouts
from jaxkd.run.open_models import Model, Models
from jaxkd.run.teacher import cache_facts, cache_layouts, reduced
from jaxkd.runtime import multihost
from jaxkd.runtime.progress import bar as progress_bar
from jaxkd.teachers import codec
from jaxkd.teachers.online import online
from jaxkd.teachers.shards import Block
from jaxkd.teachers.store import Store, Writer

BLOCK = 256
"""Rows per file: the most that an interruption loses. A file has 128 KiB of overhead."""
_SAME_TEXT = 1 / 3  # of the tokens must come again: sampled texts diverge where rounding decides a draw otherwise
_SEED = 0  # of draws; not the run's, since a cache serves runs of any seed


class Recorder(NamedTuple):
    """The online teacher, and how its signal is stored."""

    params: PyTree
    signals: Mapping[str, Callable[[PyTree, Batch], Any]]  # per split: arrays [B L ...], jitted
    kl: Callable[[PyTree, Batch, Any], jax.Array]  # [B L] nats, of a payload from the teacher; jitted
    layouts: dict[str, codec.Layout]  # per split
    batch: int
    sharding: NamedSharding  # of a batch


def make_recorder(e: Experiment, models: Models, mesh: Mesh, name: str = "teacher") -> Recorder:
    """Load a teacher, with what stores its signal."""
    model = models.teachers[name]
    teacher = online(load.put(load.host_params(model), model), model.forward)
    reduced_teacher = teacher if e.teacher.members else reduced(e.teacher, models, teacher, _SEED)

    def hidden(params: PyTree, batch: Batch) -> Hidden:
        return Hidden(teacher.signal(params, batch).head.hidden)

    # Draws depend on the domain's name, not on its number: the same whichever other domains a recipe has.
    name_ids = jnp.asarray([zlib.crc32(domain.encode()) & 0x7FFFFFFF for domain in e.data.domains], jnp.int32)

    def drawn(params: PyTree, batch: Batch) -> Any:
        batch = batch._replace(domain=name_ids[batch.domain])
        if e.teacher.signal == "token":
            text = rollouts.teacher_text(e.teacher, models)(params, batch, jax.random.fold_in(seeds.key(_SEED), 0))
            return codec.Text(*[getattr(text, name) for name in codec.Text._fields])
        options = {"step": jnp.zeros((), jnp.int32)} if "step" in reduced_teacher.requires else {}
        return reduced_teacher.signal(params, batch, **options)

    def kl(params: PyTree, batch: Batch, payload: Any) -> jax.Array:
        return payload_kl(teacher.signal(params, batch).head, payload, models.vocab)

    sharding = batch_sharding(mesh)
    rows = lambda function: jax.jit(function, out_shardings=sharding)  # whole rows: a host writes those it holds
    signals = {
        "train": rows(hidden if e.teacher.members or e.teacher.signal == "hidden" else drawn),
        "valid": rows(hidden),
    }
    layouts = cache_layouts(e.teacher, models, e.data.length, name)
    return Recorder(teacher.state, signals, jax.jit(kl), layouts, e.run.eval_batch, sharding)


def _groups(batch: int, sharding: NamedSharding) -> tuple[int, int, bool]:
    """Groups of processes that hold the same rows of a batch, each of which fills one block at a time.

    How many there are, this process's, and whether this process writes for it.
    """
    by_row = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    by_process: dict[int, set[int]] = {}
    device: Any
    for device, index in by_row.devices_indices_map((batch,)).items():
        by_process.setdefault(device.process_index, set()).update(range(batch)[index[0]])
    rows = {process: tuple(sorted(held)) for process, held in by_process.items()}
    groups, me = sorted(set(rows.values())), jax.process_index()
    first = min(process for process in rows if rows[process] == rows[me])
    return len(groups), groups.index(rows[me]), first == me


def write(e: Experiment, models: Models, mesh: Mesh, rows: load.Domains, progress: bool = True) -> Iterator[str]:
    """Store the teacher's signal of all rows in `teacher.cache`; blocks that exist are kept. Yields console lines.

    All processes go through the same batches together; each group of them fills its own block with its share.
    ValueError where another process is writing it, or the directory holds something else.
    """
    root = e.teacher.cache
    sizes = {
        name: {"train": len(train), "valid": len(valid)}
        for name, train, valid in zip(rows.names, rows.train, rows.valid, strict=True)
    }
    manifest = cache_facts(e.teacher, models, e.data, rows.fingerprints)
    started, process = time.perf_counter(), jax.process_index()
    with Writer(root, manifest, sizes, block=BLOCK, leader=process == 0) as writer:
        multihost.barrier("the cache is opened")
        todo = writer.missing()
        multihost.barrier("the cache is counted")  # all look for missing blocks before any is written
        total = sum(block.stop - block.start for block in todo)
        measured: dict[str, float] = {}
        if todo:
            yield f"storing {total:,} rows in {len(todo):,} blocks of at most {BLOCK}"
            measured = _fill(make_recorder(e, models, mesh), rows, writer, todo, progress and process == 0)
        multihost.barrier("the cache is written")
        if process == 0:
            writer.finish()
        multihost.barrier("the cache is finished")  # it is marked complete before any process opens it
    seconds = time.perf_counter() - started
    if todo:
        yield f"stored in {seconds:,.0f} s, {total * e.data.length / seconds:,.0f} tokens/s"
    for name, value in measured.items():
        yield f"{name}: KL from the teacher to the stored signal {value:.2e} nats per token, over a batch"
    yield from costs(e, models, rows, {"teacher": Store(root)})


def _fill(
    recorder: Recorder, rows: load.Domains, writer: Writer, todo: list[Block], progress: bool
) -> dict[str, float]:
    """Compute and write blocks; returns the payload's KL per domain, of its first batch of training rows."""
    batch, sharding = recorder.batch, recorder.sharding
    groups, group, writes = _groups(batch, sharding)
    mine = loader.local_rows(batch, sharding)
    kls: dict[str, float] = {}
    # In a round all groups run the same program, so blocks of one split go together.
    rounds = [
        same[i : i + groups]
        for split in ("train", "valid")
        for same in [[block for block in todo if block.split == split]]
        for i in range(0, len(same), groups)
    ]
    bar = progress_bar(title="cache", total=sum(b.stop - b.start for b in todo), unit="rows", shown=progress)
    for blocks in rounds:
        block = blocks[min(group, len(blocks) - 1)]
        payloads: list[bytes] = []
        domain = rows.names.index(block.domain)
        for start in range(0, max(b.stop - b.start for b in blocks), len(mine)):
            wanted = np.minimum(block.start + start + np.arange(len(mine)), block.stop - 1)
            sources = rows.train if block.split == "train" else rows.valid
            local = loader.read_rows(sources, np.full(len(mine), domain), wanted)
            placed = loader.to_devices(local, batch, mine, sharding)
            signal = recorder.signals[block.split](recorder.params, placed)
            payloads += _encoded(recorder.layouts[block.split], signal, local["weights"])
            if block.split == "train" and block.domain not in kls and groups == 1:
                stored = codec.decode_rows(recorder.layouts["train"], payloads[-len(mine) :])
                if not isinstance(stored, codec.Text):
                    kls[block.domain] = _distance(recorder, placed, jax.tree.map(jnp.asarray, stored))
            bar.update(min(len(mine), block.stop - block.start - start))
        if writes and group < len(blocks):
            writer.write(block, payloads[: block.stop - block.start])
    bar.close()
    return kls


def _encoded(layout: codec.Layout, signal: Any, weights: np.ndarray) -> list[bytes]:
    def local(x: jax.Array) -> np.ndarray:
        shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}  # each row once
        return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])

    payloads, signal = [], jax.tree.map(local, signal)
    for i in range(len(weights)):
        row = jax.tree.map(lambda x, i=i: x[i], signal)
        live = (row.weights if isinstance(row, codec.Text) else weights[i]) != 0
        payloads.append(codec.encode(layout, row, live))
    return payloads


def _distance(recorder: Recorder, batch: Batch, payload: Any) -> float:
    """Nats per token from the teacher."""
    kl, live = recorder.kl(recorder.params, batch, payload), batch.weights != 0
    return float(jnp.where(live, kl, 0.0).sum() / live.sum())


def verify(t: TeacherBlock) -> Iterator[str]:
    """Read every record of the caches that a recipe names; a line each, or ValueError for damaged files."""
    for name, model in t.models.items():
        if model.cache:
            yield f"cache of {name}: {Store(model.cache).verify():,} rows in {model.cache}, all checksums match"


def spot_check(e: Experiment, models: Models, mesh: Mesh, rows: load.Domains, name: str, store: Store) -> str:
    """Compare a cache with its teacher run now, on some training rows of every domain that is in it.

    ValueError where the cache is farther from the teacher than storing the same rows again would be.
    """
    try:
        recorder = make_recorder(e, models, mesh, name)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"{name} does not fit beside what is loaded ({str(error).splitlines()[0][:200]}), so its cache cannot be "
            "compared with it here: run `jaxkd check` where it fits, and train with --no-check"
        ) from None
    where = f"the cache {store.root}"
    # Batches of domain and row [B]: of each domain in the store the first row, the last, and some between.
    size, names = recorder.batch, store.manifest["sizes"]
    served = np.asarray([d for d, domain in enumerate(rows.names) if domain in names])
    spot = np.arange(-(-2 * len(served) // size) * size)
    domains, share = served[spot % len(served)], spot // len(served) / ((len(spot) - 1) // len(served))
    numbers = np.rint(share * (np.asarray(rows.sizes)[domains] - 1)).astype(np.int64)
    batches = zip(domains.reshape(-1, size), numbers.reshape(-1, size), strict=True)
    then, now = np.mean([_again(recorder, rows, store, domain, row) for domain, row in batches], 0)
    if store.layout("train").signal == "token":
        if then < _SAME_TEXT:
            raise ValueError(
                f"{where} holds other text: {then:.0%} of the tokens agree; delete it and run `jaxkd cache`"
            )
        return f"cache: the teacher repeats {then:.0%} of the text"
    if not then <= 1.5 * now + 0.01:
        raise ValueError(
            f"{where} is {then:.3f} nats per token from this teacher, a new one would be {now:.3f}: it was written by "
            "other weights or another forward pass; delete it and run `jaxkd cache`"
        )
    return f"cache: {then:.2e} nats per token from its teacher, {now:.2e} if stored again"


def _again(
    recorder: Recorder, rows: load.Domains, store: Store, domain: np.ndarray, row: np.ndarray
) -> tuple[float, float]:
    """Nats per token from the teacher, of rows [B]: as stored, and as they would be stored now.

    For text: the share of the stored tokens that the teacher writes again, and 1.
    """
    layout, sharding = store.layout("train"), recorder.sharding
    mine = loader.local_rows(len(row), sharding)
    local = loader.read_rows(rows.train, domain[mine], row[mine])
    batch = loader.to_devices(local, len(row), mine, sharding)
    old = [store.read(rows.names[d], "train", [r])[0] for d, r in zip(domain[mine], row[mine], strict=True)]
    fresh = _encoded(layout, recorder.signals["train"](recorder.params, batch), local["weights"])
    stored, now = (codec.decode_rows(layout, payloads) for payloads in (old, fresh))
    if isinstance(stored, codec.Text) and isinstance(now, codec.Text):
        same = np.asarray(stored.targets == now.targets)[np.asarray(stored.weights) != 0]
        return float(same.mean()) if same.size else 1.0, 1.0
    placed = (loader.to_devices({**local, "teacher": x}, len(row), mine, sharding).teacher for x in (stored, now))
    then, again = (_distance(recorder, batch, x) for x in placed)
    return then, again


def costs(e: Experiment, models: Models, rows: load.Domains, stores: Mapping[str, Store]) -> Iterator[str]:
    """Bytes and FLOPs of the teachers, a line or two each; `stores` holds the caches of those that have one."""

    def device_bytes(model: Model, names: Collection[str]) -> int:
        leaves = jax.tree.leaves({name: model.abstract[name] for name in names})
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    def stored_bytes(store: Store, split: str) -> int:
        paths = (path for name in rows.names for path in store.root.glob(f"{name}/*/*-{split}.array_record*"))
        return sum(path.stat().length for path in paths)

    length = e.data.length
    per_step = e.data.batch * length
    for name, model in models.teachers.items():
        whole = flops.body(model.config, length) + flops.head(model.config)
        if name not in stores:
            yield (
                f"{name}, online: {amount(whole / 1e6)} MFLOP a token, {amount(whole * per_step / 1e9)} GFLOP a step, "
                f"{amount(device_bytes(model, list(model.shapes)) / 2**20)} MiB on each device"
            )
            continue
        store = stores[name]
        train, valid = stored_bytes(store, "train"), stored_bytes(store, "valid")
        saved = whole - (flops.head(model.config) if store.layout("train").signal == "hidden" else 0)
        tokens = sum(n for d, n in zip(rows.names, rows.sizes) if d in store.manifest["sizes"]) * length
        yield (
            f"{name}, cached in {store.root}: {train / tokens:,.1f} bytes per token of the rows, "
            f"{(train + valid) / 1e6:,.1f} MB on disk, {valid / 1e6:,.1f} for held-out rows"
        )
        yield (
            f"{name}, saved: {amount(saved / 1e6)} MFLOP a token, {amount(saved * per_step / 1e9)} GFLOP a step and "
            f"{amount(saved * per_step * e.run.steps / 1e12)} TFLOP in a run of {e.run.steps:,} steps; its head takes "
            f"{amount(device_bytes(model, heads.names(model.config)) / 2**20)} MiB on each device"
        )
