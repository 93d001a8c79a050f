"""FLOPs of a decoder, counted from its shape. (XLA's cost analysis counts the body of a scan once.)"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxkd.core.chips import CHIPS
from jaxkd.models.transformer import Config


def body(config: Config, length: int) -> int:
    """Forward FLOPs per token of all layers, with causal attention over rows of `length` tokens.

    2 (q + k + v + o + gate + up + down) layers + 4 heads head_dim (length + 1) / 2 layers
    """
    c = config
    weights = c.embed * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.embed * c.mlp
    return c.layers * (2 * weights + 2 * c.heads * c.head_dim * (length + 1))


def head(config: Config) -> int:
    """Forward FLOPs per token of the head: 2 embed V, without padding."""
    return 2 * config.embed * config.vocab


def masked(config: Config, length: int) -> int:
    """Forward FLOPs per token that dense attention spends on later tokens and then masks.

    2 heads head_dim (length - 1) layers
    """
    return 2 * config.heads * config.head_dim * (length - 1) * config.layers


class Step(NamedTuple):
    """FLOPs of one step over a batch. `teacher` and `student` exclude masked and recomputed products, as in papers."""

    teacher: float
    student: float
    recomputed: float  # by rematerialisation
    masked: float  # by attention

    @property
    def model(self) -> float:
        """The numerator of MFU."""
        return self.teacher + self.student

    @property
    def executed(self) -> float:
        return self.model + self.recomputed + self.masked


class Side(NamedTuple):
    """Which parts of a model a step runs."""

    config: Config
    body: bool = True
    head: bool = True


def step(
    teachers: Sequence[Side], student: Side, tokens: int, length: int, *, remat: bool, trains: bool = True
) -> Step:
    """FLOPs of a train step: 2 per weight and token of each teacher, 6 of the student (2 unless it `trains`), plus
    attention over rows of `length` tokens.

    Optimiser, norms and the pointwise part of the loss are not counted. `remat` recomputes the layers' forward pass.
    """
    forward = lambda side: side.body * body(side.config, length) + side.head * head(side.config)
    wasted = lambda side: side.body * masked(side.config, length)
    passes, recomputed = (3 if trains else 1), int(remat and trains)
    return Step(
        tokens * sum(map(forward, teachers)),
        tokens * passes * forward(student),
        tokens * recomputed * body(student.config, length),
        tokens * (sum(map(wasted, teachers)) + (passes + recomputed) * wasted(student)),
    )


def rates(model: float, seconds: float, devices: int, kind: str) -> dict[str, float]:
    """`tflops` per device of `Step.model` FLOPs, and `mfu` where the peak of `kind` (JAX's `device_kind`) is known."""
    each = model / seconds / devices
    return {"tflops": each / 1e12} | ({"mfu": each / CHIPS[kind].flops} if kind in CHIPS else {})
