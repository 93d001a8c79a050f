"""From logical axes to mesh axes: one table, and the few functions that read it."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "model")

# Parameters and activations name their axes; this says where each lives. `embed` is sharded over `data` for
# parameters only (fully sharded data parallelism): activations leave their width whole.
RULES: dict[str, str | None] = {
    "batch": "data",
    "length": None,
    "embed": "data",
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "mlp": "model",
    "vocab": "model",
    "layers": None,
}


def make_mesh(data: int, model: int, devices: list | None = None) -> Mesh:
    """A `(data, model)` mesh.

    Args:
        data: devices along `data`, or -1 for what `model` leaves.
        model: devices along `model`.
        devices: which ones; None is all.

    Raises:
        ValueError: when the product is not the number of devices.
    """
    devices = devices or jax.devices()
    if data == -1:
        data = max(len(devices) // model, 1)
    if data * model != len(devices):
        raise ValueError(
            f"run.mesh is data={data} x model={model} = {data * model} devices, but there are {len(devices)}; "
            "set run.mesh.data=-1 to use what run.mesh.model leaves"
        )
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(data, model)
    else:
        # Tori whose shape does not factor as asked need their physical axes split; plain is faster where it works.
        try:
            grid = mesh_utils.create_device_mesh((data, model), devices)
        except NotImplementedError:
            grid = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh) -> PartitionSpec:
    """Mesh axes for an array's logical axes; an axis that does not divide, or is taken, is replicated.

    Args:
        axes: logical name per dimension, None for a dimension that is never sharded.
        shape: the array's shape.
        mesh: a Mesh or AbstractMesh.

    Raises:
        ValueError: for a name that is not in `RULES`.
    """
    taken: set[str] = set()
    result: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"no sharding rule for logical axis '{name}'; sharding.RULES knows {', '.join(RULES)}")
        target = RULES[name] if name is not None else None
        if target in taken or target not in mesh.axis_names or size % mesh.shape[target] or mesh.shape[target] == 1:
            target = None
        if target is not None:
            taken.add(target)
        result.append(target)
    return PartitionSpec(*result)


def shardings(axes, shapes, mesh: Mesh):
    """A NamedSharding per leaf of a tree of arrays.

    Args:
        axes: tree of tuples of logical names.
        shapes: tree of the same structure with `.shape` leaves.
        mesh: the mesh.
    """
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape, mesh)), shapes, axes)


def replicated_axes(axes, shapes, mesh: Mesh) -> list[str]:
    """One sentence per logical axis that a rule would shard but whose size does not divide."""
    notes: set[str] = set()

    def look(leaf, names):
        for name, size in zip(names, leaf.shape, strict=True):
            target = RULES.get(name) if name else None
            if target and size % mesh.shape[target]:
                notes.add(
                    f"axis '{name}' of size {size} does not divide over {target}={mesh.shape[target]}: replicated"
                )

    jax.tree.map(look, shapes, axes)
    return sorted(notes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh in use; the identity when there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.axis_sizes) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data`; every later dimension whole."""
    return NamedSharding(mesh, PartitionSpec("data"))
