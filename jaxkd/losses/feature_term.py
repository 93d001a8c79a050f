"""What a term over features is made of: the `FeatureTerm`, its taps, the map of layers.

Reductions are in float32. What stands in padding, NaN included, can reach neither a value nor a gradient.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core.types import Batch, Output, PyTree

Array = jax.Array
Init = Callable[[Array, Output, Output | None], PyTree]
Pairs = tuple[tuple[int, int], ...]

LAST = -1
"""In a map of layers: what the head sees, after the final norm. Cached hidden states are of this one."""


class FeatureTerm(NamedTuple):
    """A term whose value is a number for every token.

    `init(key, student, teacher)` makes its parameters from the two sides' abstract outputs, `{}` for none.
    `fn(params, student, teacher, batch, weights, vocab) -> (value, field)`: `field` [B L] float32 is for metrics;
    `value` is differentiable, linear in `weights` [B L], and the sum of `weights * field`.
    """

    init: Init
    fn: Callable[..., tuple[Array, Array]]
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    uses_teacher: bool = True


def per_token(field: Callable[[PyTree, Output, Any, Batch], Array]) -> Callable[..., tuple[Array, Array]]:
    """The `fn` of a term that is differentiable token by token: the weighted sum beside the field.

    Args:
        field: `(params, student, teacher, batch) -> [B L]`, with a finite gradient wherever the batch has no weight.
    """

    def fn(params: PyTree, student: Output, teacher: Output | None, batch: Batch, weights: Array, vocab: int):
        del vocab
        each = field(params, student, teacher, batch)
        # `where` before multiply: a field may be anything where it has no weight.
        return jnp.sum(weights * jnp.where(weights != 0, each, 0.0)), each

    return fn


def nothing(key: Array, student: Output, teacher: Output | None) -> PyTree:
    """The `init` of a term without parameters."""
    return {}


def pairs_of(layers: Mapping[int, int], last: bool = True) -> Pairs:
    """(student layer, teacher layer) pairs of a map, checked.

    Args:
        layers: the map.
        last: whether `LAST` is a layer here.

    Raises:
        ValueError: when it is empty or holds something else than whole numbers from 1, or `LAST`.
    """
    fine = isinstance(layers, Mapping) and layers
    known = lambda n: type(n) is int and (n >= 1 or (last and n == LAST))
    if not fine or not all(known(n) for pair in layers.items() for n in pair):
        more = f", {LAST} being what the head sees" if last else ""
        raise ValueError(
            f"layers must map student layers to teacher layers, from 1{more}, such as {{2: 4}}, got {layers!r}"
        )
    return tuple(sorted(layers.items()))


def taps_of(pairs: Pairs, kinds: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the student's and of the teacher's taps."""
    ours, theirs = (
        tuple(f"{kind}_{pair[side]}" for pair in pairs for kind in kinds if pair[side] != LAST) for side in (0, 1)
    )
    return ours, theirs


def tap(output: Output, name: str, live: Array) -> Array:
    """A tap with zeros where `live` [B L] is not."""
    return _zeroed(output.taps[name], live)


def _zeroed(x: Array, live: Array) -> Array:
    return jnp.where(live.reshape(*live.shape, *[1] * (x.ndim - 2)), x, 0)


def hidden(output: Output, layer: int, live: Array) -> Array:
    """The residual stream after `layer` layers [B L D], float32, with zeros where `live` [B L] is not."""
    return _zeroed(_layer(output, layer), live).astype(jnp.float32)


def _layer(output: Output, layer: int) -> Any:
    return output.head.hidden if layer == LAST else output.taps[f"layer_{layer}"]


def fixed(x: Array) -> Array:
    """The same, through which no gradient flows."""
    return jax.lax.stop_gradient(x)


def width(output: Output | None, layer: int) -> int:
    """Of the residual stream after `layer` layers."""
    assert output is not None
    return _layer(output, layer).shape[-1]


def matrix(key: Array, d: int, e: int) -> Array:
    """A projector [D E] before training: the identity where it can be, else normal(1/sqrt(D))."""
    return jnp.eye(d) if d == e else jax.random.normal(key, (d, e)) / math.sqrt(d)
