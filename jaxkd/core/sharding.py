"""From logical axes to mesh axes: one table, its variants for either side, and the few functions that read them."""

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
"""Where a batch lies, and all of the student's rows. To a teacher's layers `teacher` is more of `model`."""

Rules = Mapping[str, tuple[str, ...]]
"""Mesh axes per logical axis; what an array's size does not divide over is left out, from the end."""

# Parameters and activations name their axes; this says where each lives. `embed` is for parameters only (fully sharded
# data parallelism, over what shares a slice): activations leave their width whole.
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
"""How a model's parameters may lie: split over `data` and gathered layer by layer, or whole beside `model`."""
# Moments are read by the update alone, once a step: whatever holds the same of them may share them.
MOMENTS: Rules = {**RULES, "embed": (*RULES["embed"], "replica")}


def of_teacher(rules: Rules) -> Rules:
    """A table for a teacher: `teacher` beside `model`, and its rows whole there. Its vocabulary stays over `model`."""
    without = {name: tuple(a for a in rules[name] if a != "teacher") for name in ("batch", "embed")}
    return {**rules, **without, **{name: ("teacher", *rules[name]) for name in ("heads", "kv_heads", "mlp")}}


def slices(devices: Sequence) -> int:
    """How many TPU slices some devices are of; others count as one."""
    return len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1


def make_mesh(
    data: int, model: int, devices: list | None = None, *, replica: int = 1, context: int = 1, teacher: int = 1
) -> Mesh:
    """A mesh of `MESH_AXES`.

    Args:
        data: devices along `data`, or -1 for what the other axes leave.
        model: devices along `model`.
        devices: which ones; None is all.
        replica: copies of what is split over the other axes, or -1 for one a slice.
        context: devices that share the tokens of a row.
        teacher: devices that share the teacher's layers, as those along `model` do, and are rows to the student.

    Raises:
        ValueError: when the product is not the number of devices, or slices would share another axis than `replica`.
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
        said = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name in ("data", "model"))
        raise ValueError(
            f"run.mesh is {said} = {math.prod(shape)} devices, but there are {len(devices)}; set run.mesh.data=-1 to "
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

    # Tori whose shape does not factor as asked need their physical axes split; plain is faster where it works.
    try:
        return grid(split=False)
    except NotImplementedError:
        return grid(split=True)


def over(targets: Sequence[str], size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of some mesh axes that split a dimension: without axes of one device, and from the end without what does
    not divide.
    """
    used = [name for name in targets if sizes.get(name, 1) > 1]
    while used and size % math.prod(sizes[name] for name in used):
        used.pop()
    return tuple(used)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh, rules: Rules = RULES) -> PartitionSpec:
    """Mesh axes for an array's logical axes; an axis that does not divide, or is taken, is replicated.

    Args:
        axes: logical name per dimension, None for a dimension that is never sharded.
        shape: the array's shape.
        mesh: a Mesh or AbstractMesh.
        rules: `RULES` or another table of the same names.

    Raises:
        ValueError: for a name that is not in the table.
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


def shardings(axes, shapes, mesh: Mesh, rules: Rules = RULES):
    """A NamedSharding per leaf of a tree of arrays.

    Args:
        axes: tree of tuples of logical names.
        shapes: tree of the same structure with `.shape` leaves.
        mesh: the mesh.
        rules: the table.
    """
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape, mesh, rules)), shapes, axes)


def replicated_axes(axes, shapes, mesh: Mesh, rules: Rules = RULES) -> list[str]:
    """One sentence per logical axis that a rule would shard but whose size does not divide."""
    notes: set[str] = set()

    def look(leaf, names):
        for name, size in zip(names, leaf.shape, strict=True):
            wanted = [target for target in rules[name] if mesh.shape[target] > 1] if name else []
            used = over(wanted, size, mesh.shape)
            if len(used) < len(wanted):
                sizes = " x ".join(f"{target}={mesh.shape[target]}" for target in wanted)
                left = f"split over {' x '.join(used)} only" if used else "replicated"
                notes.add(f"axis '{name}' of size {size} does not divide over {sizes}: {left}")

    jax.tree.map(look, shapes, axes)
    return sorted(notes)


_TABLE: ContextVar[Rules] = ContextVar("table", default=RULES)


@contextmanager
def table(rules: Rules) -> Iterator[None]:
    """What is traced inside is pinned by this table instead of `RULES`: `with table(rules): forward(...)`.

    It is read while a function is traced. What `jax.jit` has traced before is not traced again for another table.
    """
    token = _TABLE.set(rules)
    try:
        yield
    finally:
        _TABLE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh in use, by the table in use; the identity when there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.axis_sizes) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh, _TABLE.get()))


def split_length() -> bool:
    """Whether the mesh in use has devices that share the tokens of a row."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `ROWS`; every later dimension whole."""
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in ROWS if name in mesh.axis_names)))
