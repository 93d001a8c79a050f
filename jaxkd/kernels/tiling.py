"""The tiles of the Pallas kernels: what fits in a core's VMEM, and which calls they can serve.

Sizes are of one device: N tokens, V columns, widths D (student) and E (teacher, 0 for none), b bytes an activation.
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
    teacher: int  # width, 0 where no term needs the teacher
    itemsize: int = 2  # of hidden states, in which the products run
    cast: bool = True  # the student's unembedding is stored in float32, and is cast first
    split: bool = False  # the vocabulary is split over devices, so that d hidden is written in float32
    terms: int = 2

    @property
    def widths(self) -> int:
        return self.student + self.teacher


class Tiling(NamedTuple):
    """The last fields of `pallas_tpu.Plan` that sizes decide."""

    rows: tuple[int, int]  # (tokens, columns) of a tile where tokens stay and the vocabulary streams
    columns: tuple[int, int]  # the same where columns stay and tokens stream
    vmem: int  # bytes to ask for


def device() -> tuple[str, str]:
    """(platform, kind) of the current mesh's devices, or else of the default backend's."""
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    if of_mesh is not None:
        return of_mesh.platform, of_mesh.device_kind
    return jax.devices()[0].platform, jax.devices()[0].device_kind


def current_chip() -> Chip | None:
    """The TPU that a call would run on, None if it is another device or an unknown one."""
    return CHIPS.get(device()[1])


def supports(plan: Any, student: Head, teacher: Any) -> str | None:
    """Why the Pallas kernels cannot serve a call, in one line, or None if they can.

    Standardised logits have no place in the plan: who makes it has to refuse them.

    Args:
        plan: a `pallas_tpu.Plan`.
        student: hidden [N D], unembed [D V].
        teacher: the same with its own width, or None; another signal is refused.
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
    """VMEM bytes of the hungrier kernel of a kind, on the safe side of what the compiler asked for.

        2 b (n + v) (D + E)    blocks of both sides' operands, double-buffered
        tokens stay:   n D (4 + 2 x 2) or (4 + 2 x 4)    the float32 sum, and what is written, double-buffered
        columns stay:  v D (2 x 4)                        the float32 sum, where it is written
        6 D (n or v)           the product to add, and its transposed or masked operand
        4 n v (6 + terms)      float32 tiles: logits and what divergences make of them

    Args:
        sizes: of the call.
        tile: (n tokens, v columns).
        tokens_stay: which kind of kernel.
    """
    tokens, columns = tile
    out = 4 if sizes.split else sizes.itemsize
    kept = tokens * (4 + 2 * out) if tokens_stay else columns * 8
    stays = tokens if tokens_stay else columns
    operands = 2 * sizes.itemsize * sum(tile) * sizes.widths
    return operands + sizes.student * (kept + (4 + sizes.itemsize) * stays) + 4 * (6 + sizes.terms) * tokens * columns


def tiling(sizes: Sizes, chip: Chip) -> Tiling | None:
    """The tiles of a call, None if none fits in VMEM.

    A kernel makes n FLOPs for each byte that streams by n tokens, or columns, that stay: from the chip's ridge on,
    reading again costs no time. So the smallest n from one and a half times the ridge on, and less where VMEM ends;
    what streams is as wide as the matrix unit. Larger tiles save bytes and no time, and take minutes to compile.
    Tokens are spread evenly over their blocks.
    """
    allowed = chip.vmem // 16 * 15
    enough = min([n for n in _STAY if n >= 1.5 * chip.ridge], default=_STAY[0])
    pairs = [(stay, stream) for stay in _STAY if stay <= enough for stream in _STREAM]
    found = []
    for tokens_stay in (True, False):
        tiles = [pair if tokens_stay else pair[::-1] for pair in pairs]
        fitting = [tile for tile in tiles if vmem(sizes, tile, tokens_stay) <= allowed]
        if not fitting:
            return None
        found.append(fitting[0])
    (tokens, columns), blocks = found[0], -(-sizes.tokens // found[0][0])
    even = -(-sizes.tokens // (blocks * _LANES)) * _LANES
    return Tiling((min(tokens, even), columns), found[1], allowed)
