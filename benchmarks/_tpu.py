"""Programs compiled for TPUs on a machine that has none: what fits on a chip, and what a mesh exchanges."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# There is no TPU to ask about, and none that two processes could not share.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import _forms
import jax
import jax.numpy as jnp
import numpy as np
from _forms import FORMS, Shape
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxkd.core import chips
from jaxkd.core.sharding import MESH_AXES, make_mesh
from jaxkd.core.types import Head
from jaxkd.kernels import traffic
from jaxkd.kernels.api import IMPLEMENTATIONS, chunk_size
from jaxkd.planning.hlo import Program


class Chip(NamedTuple):
    """One device of a topology that the compiler knows."""

    topology: str
    memory: int  # bytes of HBM
    kind: str  # as JAX names it


KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}
CHIPS = {name: Chip(f"{name}:2x2", chips.CHIPS[kind].hbm, kind) for name, kind in KINDS.items()}
WAYS = {"dense": None, "xla": "xla", "pallas": "pallas_tpu"}
VOCAB, WIDTH, TEACHER_WIDTH = 128_256, 2_048, 4_096  # Llama-3.2-1B learns from Llama-3.1-8B
FORM = "forward_kl"
COUNTS = sorted({1 << k for k in range(9, 21)} | {3 << (k - 1) for k in range(9, 21)})
SHARDED, MESH, SHARDED_TOKENS = "v5e:2x4", (4, 2), 32_768


def _function(way: str) -> Callable:
    implementation = WAYS[way]
    return _forms.fused(FORMS[FORM], VOCAB, implementation) if implementation else _forms.dense(FORMS[FORM], VOCAB)


def _arguments(tokens: int) -> tuple:
    return _forms.abstract(Shape(tokens, VOCAB, WIDTH, TEACHER_WIDTH), Head, jnp.bfloat16)


def _compiled(way: str, chip: str, tokens: int):
    """The program on one chip, or the first line of the compiler's reason against it."""
    device = get_topology_desc(topology_name=CHIPS[chip].topology, platform="tpu").devices[0]
    # A mesh of one: the kernel asks the mesh, not the machine, what it will run on.
    mesh = Mesh(np.array([[device]]), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    there = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    print(f"{chip}: {way} with {tokens} tokens", file=sys.stderr, flush=True)
    try:
        with jax.set_mesh(mesh):
            return jax.jit(_function(way)).lower(*jax.tree.map(there, _arguments(tokens))).compile()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return str(error).splitlines()[0]  # a ValueError is the kernel's own refusal


def _moved(way: str, chip: str, tokens: int, program) -> int | None:
    """Bytes between HBM and the chip in one call.

    XLA's own figure counts a loop's body once and a Pallas call as nothing: it is taken where there is neither.
    """
    if way == "dense":
        return int(program.cost_analysis()["bytes accessed"])
    kind, sizes = traffic.CHIPS[CHIPS[chip].kind], traffic.Sizes(tokens, VOCAB, WIDTH, TEACHER_WIDTH)
    if way == "xla":
        return int(traffic.cost_xla(sizes, chunk_size(tokens, VOCAB, WIDTH), kind).bytes)
    tiles = traffic.tiling(sizes, kind)
    return int(traffic.cost_pallas(sizes, tiles).bytes) if tiles else None


def _largest(way: str, chip: str) -> dict:
    """The row of the largest token count that compiles."""
    row = {"name": f"{way} {chip}", "chip": chip, "form": FORM, "vocab": VOCAB}
    if WAYS[way] and WAYS[way] not in IMPLEMENTATIONS:
        return row | {"note": "not available"}
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    outputs = lambda arguments: size(arguments[:2])
    held = [size(_arguments(count)) + outputs(_arguments(count)) for count in COUNTS]
    fits, fails = -1, next((i for i, total in enumerate(held) if total > CHIPS[chip].memory), len(COUNTS))
    found: dict[int, Any] = {}
    while fails - fits > 1:
        middle = (fits + fails) // 2
        found[middle] = _compiled(way, chip, COUNTS[middle])
        fits, fails = (fits, middle) if isinstance(found[middle], str) else (middle, fails)
    if fits < 0:
        return row | {"tokens": 0, "note": found[fails]}
    if fails not in found and fails < len(COUNTS):
        found[fails] = _compiled(way, chip, COUNTS[fails])
    memory = found[fits].memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    row |= {"tokens": COUNTS[fits], "bytes": sum(parts.values()), **{f"{k}_bytes": v for k, v in parts.items()}}
    moved = _moved(way, chip, COUNTS[fits], found[fits])
    row |= {"bytes_moved": moved, "bytes_per_token": moved and moved // COUNTS[fits]}
    return row | {"next_tokens": COUNTS[fails] if fails < len(COUNTS) else None, "note": found.get(fails)}


def _sharded(way: str) -> Iterator[dict]:
    """The collectives of one program over a data x model mesh."""
    row = {"name": f"{way} {SHARDED} collective", "mesh": "x".join(map(str, MESH)), "tokens": SHARDED_TOKENS}
    if WAYS[way] and WAYS[way] not in IMPLEMENTATIONS:
        yield row | {"note": "not available"}
        return
    print(f"{SHARDED}: {way} with {SHARDED_TOKENS} tokens over data x model = {MESH}", file=sys.stderr, flush=True)
    mesh = make_mesh(*MESH, list(get_topology_desc(topology_name=SHARDED, platform="tpu").devices))
    tokens, columns, each = PartitionSpec("data", None), PartitionSpec(None, "model"), PartitionSpec("data")
    specs = (tokens, columns, Head(tokens, columns), each, each)
    there = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    arguments = jax.tree.map(there, _arguments(SHARDED_TOKENS), specs)
    gradients = (NamedSharding(mesh, PartitionSpec()), (NamedSharding(mesh, tokens), NamedSharding(mesh, columns)))
    with jax.set_mesh(mesh):
        program = jax.jit(_function(way), out_shardings=gradients).lower(*arguments).compile()
    row["temp_bytes"] = program.memory_analysis().temp_size_in_bytes
    for found in Program(program.as_text()).collectives(dict(mesh.shape)):
        yield row | dataclasses.asdict(found)


def table() -> Iterator[dict]:
    """What fits, for each chip and way; then what a mesh exchanges."""
    for chip in CHIPS:
        for way in WAYS:
            yield _largest(way, chip)
    for way in ("xla", "pallas"):
        yield from _sharded(way)
