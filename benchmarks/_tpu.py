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
from jaxkd.kernels import tiling
from jaxkd.kernels.api import IMPLEMENTATIONS, chunk_size
from jaxkd.planning.hlo import Program


class Chip(NamedTuple):
    """One device of a topology that the compiler knows."""

    topology: str
    memory: int  # bytes of HBM
    kind: str  # as JAX names it


LOGIT_BYTES = 38
"""Bytes per entry that the XLA form reads and writes of logits and what is made of them, where they are in HBM: the
slope over the chunk's tokens of the bytes in programs compiled for v5e (39) and v5p (38), forward KL and next token."""
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


class Cost(NamedTuple):
    """Of value and gradients."""

    bytes: float
    flops: float


def cost_xla(sizes: tiling.Sizes, chunk: int, chip: chips.Chip) -> Cost:
    """The form that scans over chunks of c tokens and makes gradients as it goes.

    A chunk reads the unembeddings three times (student's and teacher's logits, d hidden), and reads and writes the
    float32 gradient of the head, which is too large to stay on the chip:

        bytes = ceil(N / c) V (b (2 D + E) + 8 D) + b N (3 D + E) + logits,    flops = 2 N V (3 D + E)

    and `LOGIT_BYTES` per logit unless a chunk's three float32 buffers fit in VMEM, where the compiler then puts them.

    Args:
        sizes: of the call.
        chunk: tokens at a time.
        chip: whose VMEM it is.
    """
    tokens, columns, student, teacher, itemsize, *_ = sizes
    per_chunk = columns * (itemsize * (2 * student + teacher) + 8 * student)
    logits = 0 if 12 * chunk * columns <= chip.vmem else LOGIT_BYTES * tokens * columns
    hidden = itemsize * tokens * (3 * student + teacher)
    moved = -(-tokens // chunk) * per_chunk + hidden + logits + _cast(sizes)
    return Cost(moved, 2 * tokens * columns * (3 * student + teacher))


def cost_pallas(sizes: tiling.Sizes, tiles: tiling.Tiling) -> Cost:
    """The four kernels, with n tokens a block where tokens stay and v columns a tile where columns stay.

    Three kernels read all unembeddings for each block of tokens, one reads all hidden states for each tile of columns
    and writes the gradient of the head once. All four make both sides' logits, two of them one product more:

        bytes = 3 (ceil(N / n) b V (D + E) + b N (D + E)) + ceil(V / v) b N (D + E) + b V (D + E) + 4 D V + b N D
        flops = 2 N V (4 (D + E) + 2 D)

    Args:
        sizes: of the call.
        tiles: what stays and what streams.
    """
    tokens, columns, student, _, itemsize, *_ = sizes
    unembeds, hiddens = (itemsize * x * sizes.widths for x in (columns, tokens))
    by_tokens = 3 * (-(-tokens // tiles.rows[0]) * unembeds + hiddens)
    by_columns = -(-columns // tiles.columns[1]) * hiddens + unembeds + 4 * student * columns
    dhidden = (4 if sizes.split else itemsize) * tokens * student
    flops = 2 * tokens * columns * (4 * sizes.widths + 2 * student)
    return Cost(by_tokens + by_columns + dhidden + _cast(sizes), flops)


def _cast(sizes: tiling.Sizes) -> int:
    """Bytes of making the student's operand: both forms do it once."""
    return (4 + sizes.itemsize) * sizes.student * sizes.columns


def _moved(way: str, chip: str, tokens: int, program) -> int | None:
    """Bytes between HBM and the chip in one call.

    XLA's own figure counts a loop's body once and a Pallas call as nothing: it is taken where there is neither.
    """
    if way == "dense":
        return int(program.cost_analysis()["bytes accessed"])
    kind, sizes = chips.CHIPS[CHIPS[chip].kind], tiling.Sizes(tokens, VOCAB, WIDTH, TEACHER_WIDTH)
    if way == "xla":
        return int(cost_xla(sizes, chunk_size(tokens, VOCAB, WIDTH), kind).bytes)
    tiles = tiling.tiling(sizes, kind)
    return int(cost_pallas(sizes, tiles).bytes) if tiles else None


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
