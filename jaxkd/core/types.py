"""The NamedTuples that cross module boundaries.

Sizes: `B` batch rows, `L` length, `N` tokens (B x L flattened), `D` student width, `E` teacher width,
`V` padded vocabulary. Per-token weights are floats and are called `weights`, never a mask.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Float, Int

Scalar = float | Callable[[Any], Any]
"""A number, or a schedule `step -> value`."""

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, weight); divided when read, so that sums over micro-batches and devices stay exact."""

PyTree = Any

LOG_FLOOR = -80.0
"""Log-probabilities below this are read as this: exp(-80) is still a normal float32, and 80 nats is a large,
finite price. The floor changes values only; gradients pass straight through it."""


class Batch(NamedTuple):
    """Packed rows. `targets[b, t]` is the token after `tokens[b, t]`; its weight is 0 where there is none."""

    tokens: Int[jax.Array, "B L"]
    targets: Int[jax.Array, "B L"]
    weights: Float[jax.Array, "B L"]  # loss mask and only normaliser: 0 on padding, prompts and a segment's end
    segments: Int[jax.Array, "B L"]  # 1, 2, ... per document in the row; 0 is padding
    positions: Int[jax.Array, "B L"]  # restart at 0 in each segment
    row: Int[jax.Array, " B"]  # index in the row's own domain
    domain: Int[jax.Array, " B"]
    teacher: Any = None  # what a cache holds of these rows: Hidden, TopK, Sampled, or a tuple of those
    aux: dict[str, Any] = {}  # noqa: RUF012 - further arrays [B ...] by name, such as advantages; never mutated


class Head(NamedTuple):
    """Logits left unmultiplied: `softcap * tanh((hidden @ unembed * scale + bias) / softcap)`."""

    hidden: Float[jax.Array, "*tokens D"]
    unembed: Float[jax.Array, "D V"]
    bias: Float[jax.Array, " V"] | None = None
    scale: float | None = None
    softcap: float | None = None


class TopK(NamedTuple):
    """A teacher's largest entries, true log-probabilities at temperature 1, and what all the others weigh together.

    An id below 0 or beyond the vocabulary, or a log-probability of -inf, is filling and counts nothing.
    """

    ids: Int[jax.Array, "*tokens K"]  # different within a token, where they count
    logprobs: Float[jax.Array, "*tokens K"]
    tail: Float[jax.Array, "*tokens T"]  # log of the other entries' mass, at each temperature that was stored


class Sampled(NamedTuple):
    """Draws from the teacher's distribution at temperature 1: how often each id came up; a count of 0 is filling."""

    ids: Int[jax.Array, "*tokens K"]  # different within a token, where they count
    counts: Int[jax.Array, "*tokens K"]


class Hidden(NamedTuple):
    """A teacher's last hidden states, after its final norm: with its unembedding, all that its head would say."""

    hidden: Float[jax.Array, "*tokens E"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["heads", "weights"], meta_fields=["geometric"])
@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several teachers as one: their heads, and for every token what each of them weighs.

    At a temperature each head's own distribution is softened first. `geometric` averages log-probabilities (and
    normalises the result), otherwise probabilities are averaged. A head whose weight is 0 at a token, NaN included,
    changes nothing there.
    """

    heads: tuple[Head, ...]
    weights: Any  # float [*tokens T]: at least 0, sum to 1 over the T heads where a token has weight
    geometric: bool = False  # part of the program, not of its data


class TopSet(NamedTuple):
    """The teacher's most probable entries: the fewest that hold `mass`, or so many `entries`; ties come along."""

    mass: float = 0.0
    entries: int = 0


class Side(NamedTuple):
    """What a divergence may know of a vocabulary entry beside the two log-probabilities. No gradient flows here."""

    is_target: jax.Array  # [N, v] bool: the entry is the data's next token
    in_top_set: Any = None  # [N, v] bool: it is one of the teacher's top set, where asked for


class Divergence(NamedTuple):
    """`combine(*[sum_v c for c in phi(lp, lq, side)])`, differentiable in `lq` only.

    `phi` returns a tuple of m arrays [N, v]; `combine` maps their m sums over the vocabulary, each [N], to
    nats [N]. `top_set` asks for `side.in_top_set`. `support` says which entries of a top-k teacher are seen, and how
    normalised; None is the K and their tail. `unbiased` promises that phi is linear in p, so that draws may
    stand for p. With `normaliser`, `combine` gets the logits' log-sum-exp [N] as a last argument.
    """

    phi: Callable[[jax.Array, jax.Array, Side], tuple[jax.Array, ...]]
    combine: Callable[..., jax.Array] = lambda total: total
    uses_teacher: bool = True
    top_set: TopSet | None = None
    support: str | None = None
    unbiased: bool = False
    normaliser: bool = False


class Output(NamedTuple):
    """What a model's forward pass returns: the head, and by name what was tapped on the way."""

    head: Head
    taps: dict[str, jax.Array]  # "layer_3" -> [B L D], the residual stream after three layers; see models/transformer
    aux: dict[str, jax.Array] = {}  # noqa: RUF012 - further arrays by name, such as a router's loss per token [B L]


Signal = Output | TopK | Sampled | Ensemble
"""What a teacher gives for a batch: a distribution per token. Text that a model writes is a rollout instead."""

Forward = Callable[..., Output]
"""`forward(params, batch, *, taps=()) -> Output`."""
