"""Tiles of the Pallas kernels: what fits in a core's VMEM, and which calls are supported.

Sizes are per device: N tokens, V columns, widths D (student) and E (teacher, 0 for none), b bytes per activation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core.chips import CHIPS, Chip
from jaxkd.core.types import Head

_LANES = 128
_STAY, _STREAM = (1024, 512, 256, 128), (256, 128)


class Sizes(NamedTuple):
    """One device's share of a call."""

    tokens: int
    columns: int
    student: int  # width
    teacher: int  # width, 0 if no term needs the teacher
    itemsize: int = 2  # of hidden states, the dtype of the products
    split: bool = False  # the vocabulary is sharded, so d hidden is written in float32
    terms: int = 2

    @property
    def widths(self) -> int:
        return self.student + self.teacher


class Tiling(NamedTuple):
    """The fields of `pallas_tpu.Plan` that depend on sizes."""

    rows: tuple[int, int]  # (tokens, columns) of a tile where tokens stay and the vocabulary streams
    columns: tuple[int, int]  # the same where columns stay and tokens stream
    vmem: int  # bytes to request


def device() -> tuple[str, str]:
    """(platform, kind) of the current mesh's devices, or else of the default backend's."""
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    if of_mesh is not None:
        return of_mesh.platform, of_mesh.device_kind
    return jax.devices()[0].platform, jax.devices()[0].device_kind


def current_chip() -> Chip | None:
    """The TPU that a call would run on; None for another device or an unknown TPU."""
    return CHIPS.get(device()[1])


def supports(plan: Any, student: Head, teacher: Any) -> str | None:
    """Why the Pallas kernels do not support a call of a `pallas_tpu.Plan`, or None if they do.

    A plan cannot express standardised logits: its maker must reject them.
    """
    platform, kind = device()
    if platform != "tpu" and not plan.interpret:
        return f"pallas_tpu needs a TPU, but the devices here are '{kind}' ({platform}); use implementation='xla'"
    for term in plan.terms:
        if term.top_set is not None:
            return "pallas_tpu has no divergence that asks for the teacher's top set; use implementation='xla'"
        if term.support is not None:
            return "pallas_tpu has no divergence from a sparse teacher; use implementation='xla'"
    if teacher is not None and not isinstance(teacher, Head):
        return f"pallas_tpu needs a teacher's head, not a {type(teacher).__name__} signal; use implementation='xla'"
    for name, head in (("student", student), ("teacher", teacher)):
        if head is not None and head.hidden.dtype not in (jnp.bfloat16, jnp.float32):
            return f"pallas_tpu multiplies bfloat16 or float32, but the {name}'s hidden states are {head.hidden.dtype}"
    for tile in (plan.rows, plan.columns):
        if not plan.interpret and (tile[0] % _LANES or tile[1] % _LANES):
            return f"pallas_tpu's tiles are multiples of {_LANES} x {_LANES}, and one of the plan's is {tile}"
    return None


def vmem(sizes: Sizes, tile: tuple[int, int], tokens_stay: bool) -> int:
    """VMEM bytes of the larger kernel of a kind, an upper bound of what the compiler asked for.

        2 b (n + v) (D + E)    blocks of both heads' operands, double-buffered
        tokens stay:   n D (4 + 2 x 2) or (4 + 2 x 4)    the float32 sum, and the output, double-buffered
        columns stay:  v D (2 x 4)                        the float32 sum, accumulated in the output
        6 D (n or v)           the product to add, and its transposed or masked operand
        4 n v (6 + terms)      float32 tiles: logits and the divergences' intermediates

    `tile` is (n tokens, v columns).
    """
    tokens, columns = tile
    out = 4 if sizes.split else sizes.itemsize
    output = tokens * (4 + 2 * out) if tokens_stay else columns * 8
    stays = tokens if tokens_stay else columns
    operands = 2 * sizes.itemsize * sum(tile) * sizes.widths
    return operands + sizes.student * (output + (4 + sizes.itemsize) * stays) + 4 * (6 + sizes.terms) * tokens * columns


def tiling(sizes: Sizes, chip: Chip) -> Tiling | None:
    """The tiles of a call, None if none fits in VMEM.

    With n tokens (or columns) that stay, a kernel makes n FLOPs per streamed byte, so above the chip's ridge re-reading
    costs no time. n is the smallest size from 1.5 times the ridge on, smaller if VMEM requires it; the streamed axis is
    as wide as the matrix unit. Larger tiles save bytes but no time, and compile for minutes. Tokens are spread evenly
    over their blocks.
    """
    limit = chip.vmem // 16 * 15
    enough = min([n for n in _STAY if n >= 1.5 * chip.ridge], default=_STAY[0])
    pairs = [(stay, stream) for stay in _STAY if stay <= enough for stream in _STREAM]
    chosen = []
    for tokens_stay in (True, False):
        tiles = [pair if tokens_stay else pair[::-1] for pair in pairs]
        fitting = [tile for tile in tiles if vmem(sizes, tile, tokens_stay) <= limit]
        if not fitting:
            return None
        chosen.append(fitting[0])
    (tokens, columns), blocks = chosen[0], -(-sizes.tokens // chosen[0][0])
    even = -(-sizes.tokens // (blocks * _LANES)) * _LANES
    return Tiling((min(tokens, even), columns), chosen[1], limit)
