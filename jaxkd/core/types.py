"""NamedTuples shared by several modules.

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
"""name -> (sum, weight); divided when read, after sums over micro-batches and devices."""

PyTree = Any

LOG_FLOOR = -80.0
"""Lower bound of log-probabilities: exp(-80) is still a normal float32. Gradients pass through the floor."""


class View(NamedTuple):
    """What the teacher reads in the place of a row: the same text in another context, of M tokens."""

    tokens: Int[jax.Array, "B M"]
    segments: Int[jax.Array, "B M"]
    positions: Int[jax.Array, "B M"]
    index: Int[jax.Array, "B L"]  # type: ignore[assignment]  # where the student's token is in `tokens`; of no meaning where the weight is 0


class Batch(NamedTuple):
    """Packed rows. `targets[b, t]` is the token after `tokens[b, t]`; its weight is 0 where there is none."""

    tokens: Int[jax.Array, "B L"]
    targets: Int[jax.Array, "B L"]
    weights: Float[jax.Array, "B L"]  # loss mask and only normaliser: 0 on padding, prompts and a segment's end
    segments: Int[jax.Array, "B L"]  # 1, 2, ... per document in the row; 0 is padding
    positions: Int[jax.Array, "B L"]  # restart at 0 in each segment
    row: Int[jax.Array, " B"]  # index in the row's own domain
    domain: Int[jax.Array, " B"]
    teacher: Any = None  # the cached signal of these rows: Hidden, TopK, Sampled, or a tuple of those
    aux: dict[str, Any] = {}  # noqa: RUF012 - further arrays [B ...] by name, such as advantages; never mutated
    view: View | None = None  # None: the teacher reads the row itself


class Head(NamedTuple):
    """Logits left unmultiplied: `softcap * tanh((hidden @ unembed * scale + bias) / softcap)`."""

    hidden: Float[jax.Array, "*tokens D"]
    unembed: Float[jax.Array, "D V"]
    bias: Float[jax.Array, " V"] | None = None
    scale: float | None = None
    softcap: float | None = None


class TopK(NamedTuple):
    """A teacher's largest entries, true log-probabilities at temperature 1, and the mass of all others.

    An id below 0 or beyond the vocabulary, or a log-probability of -inf, is padding.
    """

    ids: Int[jax.Array, "*tokens K"]  # distinct within a token, except padding
    logprobs: Float[jax.Array, "*tokens K"]
    tail: Float[jax.Array, "*tokens T"]  # log of the other entries' mass, at each stored temperature


class Sampled(NamedTuple):
    """Draws from the teacher's distribution at temperature 1: counts per id; a count of 0 is padding."""

    ids: Int[jax.Array, "*tokens K"]  # distinct within a token, except padding
    counts: Int[jax.Array, "*tokens K"]


class Hidden(NamedTuple):
    """A teacher's last hidden states, after its final norm; with its unembedding they determine its logits."""

    hidden: Float[jax.Array, "*tokens E"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["heads", "weights"], meta_fields=["geometric"])
@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several teachers as one: their heads, and each head's weight at every token.

    Each head's distribution is softened by the temperature first. `geometric` averages log-probabilities (and
    normalises the result), otherwise probabilities are averaged. A head with weight 0 at a token, even NaN, has no
    effect there.
    """

    heads: tuple[Head, ...]
    weights: Any  # float [*tokens T]: at least 0, sum to 1 over the T heads where a token has weight
    geometric: bool = False  # static


class TopSet(NamedTuple):
    """The teacher's most probable entries: the fewest that hold `mass`, or the `entries` largest; ties are included."""

    mass: float = 0.0
    entries: int = 0


class Side(NamedTuple):
    """What a divergence may use of a vocabulary entry besides the two log-probabilities. No gradient flows here."""

    is_target: jax.Array  # [N, v] bool: the entry is the data's next token
    in_top_set: Any = None  # [N, v] bool: the entry is in the teacher's top set, if `top_set` requests it


class Divergence(NamedTuple):
    """`combine(*[sum_v c for c in phi(lp, lq, side)])`, differentiable in `lq` only.

    `phi` returns a tuple of m arrays [N, v]; `combine` maps their m sums over the vocabulary, each [N], to
    nats [N]. `top_set` requests `side.in_top_set`. `support` selects the entries of a top-k teacher and their
    normalisation; None is the K and their tail. `unbiased` promises that phi is linear in p, so that draws may
    replace p. With `normaliser`, `combine` gets the logits' log-sum-exp [N] as a last argument.
    """

    phi: Callable[[jax.Array, jax.Array, Side], tuple[jax.Array, ...]]
    combine: Callable[..., jax.Array] = lambda total: total
    uses_teacher: bool = True
    top_set: TopSet | None = None
    support: str | None = None
    unbiased: bool = False
    normaliser: bool = False


class Output(NamedTuple):
    """A model's forward pass: its head, and tapped features by name."""

    head: Head
    taps: dict[str, jax.Array]  # "layer_3" -> [B L D], the residual stream after three layers; see models/transformer
    aux: dict[str, jax.Array] = {}  # noqa: RUF012 - further arrays by name, such as a router's loss per token [B L]


Signal = Output | TopK | Sampled | Ensemble
"""A teacher's distribution per token."""

Forward = Callable[..., Output]
"""`forward(params, batch, *, taps=()) -> Output`."""
