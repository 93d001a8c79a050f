"""What the two forms of the loss move and multiply on a TPU, the tiles that follow, and which form to take.

Counted by hand: a compiler's figures count the body of a loop once and a Pallas call as nothing. All counts are of
one device, value and gradients together, with N tokens, V columns, widths D (student) and E (teacher, 0 for none) and
b bytes an activation. Per-token numbers are left out: they are a thousandth of the rest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core.chips import CHIPS, Chip
from jaxkd.core.types import Head

LOGIT_BYTES = 38
"""Bytes per entry that the XLA form reads and writes of logits and what is made of them, where they are in HBM: the
slope over the chunk's tokens of the bytes in programs compiled for v5e (39) and v5p (38), forward KL and next token."""
_LANES = 128
_CLEARLY = 0.9  # a tie goes to the XLA form: the roofline leaves out vector units, which the Pallas form keeps busier
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


class Cost(NamedTuple):
    """Of value and gradients."""

    bytes: float
    flops: float

    def seconds(self, chip: Chip) -> float:
        """The roofline: whichever of products and memory takes longer, each at its peak; vector units left out."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


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
            return "pallas_tpu has no divergence that asks for the teacher's leading entries; use implementation='xla'"
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


def cost_xla(sizes: Sizes, chunk: int, chip: Chip) -> Cost:
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


def cost_pallas(sizes: Sizes, tiles: Tiling) -> Cost:
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


def _cast(sizes: Sizes) -> int:
    """Bytes of making the student's operand: both forms do it once."""
    return (4 + sizes.itemsize) * sizes.student * sizes.columns if sizes.cast else 0


def prefer_pallas(sizes: Sizes, chunk: int, chip: Chip | None) -> bool:
    """Whether the Pallas kernels move fewer bytes than the XLA form, and are not slower for their extra products.

    They multiply (4 (D + E) + 2 D) / (3 D + E) times as much: 2.8 for E = 2 D, and 2 without a teacher. So fewer
    bytes are needed but not enough: where the XLA form's chunks are large enough to keep the matrix units busy, it
    is the faster one although it moves more.

    Args:
        sizes: of the call.
        chunk: tokens at a time of the XLA form.
        chip: None, for no known TPU, means no.
    """
    tiles = None if chip is None else tiling(sizes, chip)
    if chip is None or tiles is None:
        return False
    xla, pallas = cost_xla(sizes, chunk, chip), cost_pallas(sizes, tiles)
    return pallas.bytes < xla.bytes and pallas.seconds(chip) < _CLEARLY * xla.seconds(chip)
