"""Floating-point operations of a decoder, counted from its shape: what a compiler's own figure misses in its loops."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxkd.core.chips import CHIPS
from jaxkd.models.transformer import Config


def body(config: Config, length: int) -> int:
    """Of the layers' forward pass, per token: 2 per weight, and attention over the tokens before.

        2 (q + k + v + o + gate + up + down) layers + 4 heads head_dim (length + 1) / 2 layers

    Args:
        config: the decoder's shape.
        length: tokens of a row; a token sees half of them on average.
    """
    c = config
    attention = c.embed * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    weights = attention + 3 * c.embed * c.mlp
    return c.layers * (2 * weights + 2 * c.heads * c.head_dim * (length + 1))


def head(config: Config) -> int:
    """Of the head's forward product, per token: 2 embed V, without padding."""
    return 2 * config.embed * config.vocab


def masked(config: Config, length: int) -> int:
    """Of the forward pass, per token: products with later tokens, which dense attention makes and then masks.

    2 heads head_dim (length - 1) layers
    """
    return 2 * config.heads * config.head_dim * (length - 1) * config.layers


class Step(NamedTuple):
    """Of one step over a batch. A model's own are counted as papers do: nothing masked, nothing made twice."""

    teacher: float
    student: float
    again: float  # what rematerialisation makes a second time
    masked: float  # what attention makes and masks

    @property
    def model(self) -> float:
        """What the mathematics asks for: the numerator of MFU."""
        return self.teacher + self.student

    @property
    def executed(self) -> float:
        """What the devices multiply."""
        return self.model + self.again + self.masked


class Side(NamedTuple):
    """How much of a model a step runs."""

    config: Config
    body: bool = True
    head: bool = True


def step(teachers: Sequence[Side], student: Side, tokens: int, length: int, *, remat: bool, moves: bool = True) -> Step:
    """Of a train step: 2 per weight and token for each teacher's forward pass, 6 for the student, attention beside it.

    A head is three products of a student (logits and both gradients) and one of a teacher. Optimiser, norms and the
    pointwise part of the loss are left out.

    Args:
        teachers: what each one runs: of cached hidden states the head alone, of stored entries nothing.
        student: whether a term needs its head.
        tokens: in a batch.
        length: of a row.
        remat: whether the layers' forward pass runs a second time.
        moves: whether the student learns; otherwise it is run forwards only.
    """
    of = lambda side: side.body * body(side.config, length) + side.head * head(side.config)
    hidden = lambda side: side.body * masked(side.config, length)
    passes, again = (3 if moves else 1), int(remat and moves)
    return Step(
        tokens * sum(map(of, teachers)),
        tokens * passes * of(student),
        tokens * again * body(student.config, length),
        tokens * (sum(map(hidden, teachers)) + (passes + again) * hidden(student)),
    )


def rates(model: float, seconds: float, devices: int, kind: str) -> dict[str, float]:
    """`tflops` a device, and `mfu`, their share of its peak, where that is known.

    Args:
        model: `Step.model` of the whole batch.
        seconds: of the step.
        devices: that share it.
        kind: JAX's `device_kind`.
    """
    each = model / seconds / devices
    return {"tflops": each / 1e12} | ({"mfu": each / CHIPS[kind].flops} if kind in CHIPS else {})
