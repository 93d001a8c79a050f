"""Sharding tables from logical axes to mesh axes, and functions that apply them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("replica", "data", "context", "teacher", "model")
"""From the slowest network to the fastest: only `replica` goes across slices."""
ROWS = ("replica", "data", "teacher")
"""Axes that shard a batch's rows. A teacher's layers use `teacher` like `model` instead."""

Rules = Mapping[str, tuple[str, ...]]
"""Mesh axes per logical axis; those that do not divide an array's size are dropped, from the end."""

# `embed` is for parameters only (fully sharded data parallelism within a slice): activations' width is unsharded.
RULES: Rules = {
    "batch": ROWS,
    "length": ("context",),
    "embed": ("data", "teacher", "context"),
    "heads": ("model",),
    "kv_heads": ("model",),
    "head_dim": (),
    "mlp": ("model",),
    "vocab": ("model",),
    "layers": (),
}
TABLES: Mapping[str, Rules] = {"fsdp": RULES, "replicated": {**RULES, "embed": ()}}
"""Parameter shardings: over `data`, gathered layer by layer, or over `model` only."""
# Moments are read once per step, by the update only, so replicas shard them too.
MOMENTS: Rules = {**RULES, "embed": (*RULES["embed"], "replica")}


def of_teacher(rules: Rules) -> Rules:
    """A teacher's table: `teacher` shards what `model` does, except the vocabulary, and no longer the rows."""
    without = {name: tuple(a for a in rules[name] if a != "teacher") for name in ("batch", "embed")}
    return {**rules, **without, **{name: ("teacher", *rules[name]) for name in ("heads", "kv_heads", "mlp")}}


def slices(devices: Sequence) -> int:
    """Number of TPU slices that the devices belong to; 1 for other devices."""
    return len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1


def make_mesh(
    data: int, model: int, devices: list | None = None, *, replica: int = 1, context: int = 1, teacher: int = 1
) -> Mesh:
    """A mesh of `MESH_AXES`.

    Args:
        data, model: devices along that axis; data -1 takes all that the other axes leave.
        devices: None is all.
        replica: copies of what is sharded over the other axes, or -1 for one per slice.
        context: devices that share the tokens of a row.
        teacher: devices that shard the teacher's layers, as `model` does, and the student's rows.

    Raises ValueError: the product is not the number of devices, or slices would share another axis than `replica`.
    """
    devices = devices or jax.devices()
    count = slices(devices)
    replica = count if replica == -1 else replica
    if min(replica, context, teacher, model) < 1 or data < -1 or data == 0:
        raise ValueError(
            f"run.mesh has sizes from 1 on, or -1 for replica and data, got replica={replica}, data={data}, "
            f"context={context}, teacher={teacher}, model={model}"
        )
    if data == -1:
        data = max(len(devices) // (replica * context * teacher * model), 1)
    sizes = dict(zip(MESH_AXES, (replica, data, context, teacher, model), strict=True))
    shape = tuple(sizes.values())
    if math.prod(shape) != len(devices):
        axes = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name in ("data", "model"))
        raise ValueError(
            f"run.mesh is {axes} = {math.prod(shape)} devices, but there are {len(devices)}; set run.mesh.data=-1 to "
            "use what the other axes leave"
        )
    if replica % count:
        raise ValueError(
            f"these devices are {count} slices, and only the replica axis goes across slices: run.mesh.replica must "
            f"be a multiple of {count}, or -1, got {replica}"
        )
    return Mesh(place(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def place(shape: tuple[int, ...], devices: Sequence) -> np.ndarray:
    """Devices in a grid, neighbours along an axis near each other; the first axis goes across slices."""
    if devices[0].platform == "cpu":
        return np.asarray(devices).reshape(shape)
    count = slices(devices)
    inside, across = (shape[0] // count, *shape[1:]), (count, *[1] * len(shape[1:]))

    def grid(split: bool) -> np.ndarray:
        if count == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=split)

    # Splitting physical axes is slower, and needed only if the torus does not factor into `shape`.
    try:
        return grid(split=False)
    except NotImplementedError:
        return grid(split=True)


def over(targets: Sequence[str], size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that shard a dimension: more than one device each, dropped from the end until they divide it."""
    used = [name for name in targets if sizes.get(name, 1) > 1]
    while used and size % math.prod(sizes[name] for name in used):
        used.pop()
    return tuple(used)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh, rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of logical axes (None: unsharded); axes that do not divide or are already used are replicated.

    Raises ValueError: a name is not in the table.
    """
    taken: set[str] = set()
    result: list[str | tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"no sharding rule for logical axis '{name}'; sharding.RULES knows {', '.join(rules)}")
        free = [target for target in rules[name] if target not in taken] if name is not None else []
        used = over(free, size, mesh.shape)
        taken.update(used)
        result.append(used if len(used) > 1 else used[0] if used else None)
    return PartitionSpec(*result)


def shardings(axes, shapes, mesh: Mesh | jax.sharding.AbstractMesh, rules: Rules = RULES):
    """A NamedSharding per leaf; `axes` has tuples of logical names, `shapes` leaves with `.shape`."""
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape, mesh, rules)), shapes, axes)


def replicated_axes(axes, shapes, mesh: Mesh, rules: Rules = RULES) -> list[str]:
    """One sentence per logical axis that a rule would shard but whose size does not divide."""
    notes: set[str] = set()

    def check(leaf, names):
        for name, size in zip(names, leaf.shape, strict=True):
            targets = [target for target in rules[name] if mesh.shape[target] > 1] if name else []
            used = over(targets, size, mesh.shape)
            if len(used) < len(targets):
                sizes = " x ".join(f"{target}={mesh.shape[target]}" for target in targets)
                outcome = f"split over {' x '.join(used)} only" if used else "replicated"
                notes.add(f"axis '{name}' of size {size} does not divide over {sizes}: {outcome}")

    jax.tree.map(check, shapes, axes)
    return sorted(notes)


_TABLE: ContextVar[Rules] = ContextVar("table", default=RULES)


@contextmanager
def table(rules: Rules) -> Iterator[None]:
    """Use this table instead of `RULES` in `constrain` while tracing: `with table(rules): forward(...)`.

    A function that `jax.jit` has already traced is not traced again for another table.
    """
    token = _TABLE.set(rules)
    try:
        yield
    finally:
        _TABLE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation's sharding by the current mesh and table; the identity without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.axis_sizes) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh, _TABLE.get()))


def split_length() -> bool:
    """Whether the current mesh shards the tokens of a row."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows sharded over `ROWS`, all other dimensions unsharded."""
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in ROWS if name in mesh.axis_names)))
