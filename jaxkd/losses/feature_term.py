"""`FeatureTerm`, `TokenWeights`, and helpers for taps, layer maps and documents.

Reductions are in float32. Padding, NaN included, reaches neither value nor gradient.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxkd.core.types import Batch, Divergence, Output, PyTree

Init = Callable[[Array, Output, Output | None], PyTree]
Pairs = tuple[tuple[int, int], ...]

LAST = -1
"""In a layer map: the head's input, after the final norm, which is what a cache of hidden states holds."""


class TokenWeights(NamedTuple):
    """Factors of a term's token weights: `fn(batch, *values) -> [B L]`, at least 0; see `token_weights.py`.

    `values` are the `measured` divergences of each token [B L], at temperature 1 and without gradient. All that the
    terms of an objective measure together costs one forward product of each head in it, and nothing where there is
    none.
    """

    fn: Callable[..., Array]
    measured: tuple[Divergence, ...] = ()


class FeatureTerm(NamedTuple):
    """A term with one value per token.

    `init(key, student, teacher)`: its parameters from the abstract outputs, `{}` for none.
    `fn(params, student, teacher, batch, weights, vocab) -> (value, field)`: `field` [B L] float32 is for metrics;
    `value` is differentiable, linear in `weights` [B L], and the sum of `weights * field`.
    """

    init: Init
    fn: Callable[..., tuple[Array, Array]]
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    uses_teacher: bool = True
    token_weights: TokenWeights | None = None


def per_token(field: Callable[[PyTree, Output, Any, Batch], Array]) -> Callable[..., tuple[Array, Array]]:
    """The `fn` of a term with differentiable `field(params, student, teacher, batch)` [B L].

    The field's gradient must be finite where the batch has no weight.
    """

    def fn(params: PyTree, student: Output, teacher: Output | None, batch: Batch, weights: Array, vocab: int):
        values = field(params, student, teacher, batch)
        # `where` before multiply: values without weight may be NaN.
        return jnp.sum(weights * jnp.where(weights != 0, values, 0.0)), values

    return fn


def nothing(key: Array, student: Output, teacher: Output | None) -> PyTree:
    """The `init` of a term without parameters."""
    return {}


def beside(x: Array, segments: Array, later: bool = False) -> Array:
    """The sum of `x` [B L] over the earlier tokens of each token's own segment, or over the later ones."""
    step, edge = (-1, x.shape[1] - 1) if later else (1, 0)
    first = (segments != jnp.roll(segments, step, 1)) | (jnp.arange(x.shape[1]) == edge)

    def add(a, b):
        (sum_a, first_a), (sum_b, first_b) = a, b
        return jnp.where(first_b, sum_b, sum_a + sum_b), first_a | first_b

    sums, _ = jax.lax.associative_scan(add, (x, first), reverse=later, axis=1)
    return jnp.where(first, 0.0, jnp.roll(sums, step, 1))


def pairs_of(layers: Mapping[int, int], last: bool = True) -> Pairs:
    """(student layer, teacher layer) pairs of a map, with `LAST` only if `last`; ValueError for an invalid map."""
    valid = lambda n: type(n) is int and (n >= 1 or (last and n == LAST))
    if not isinstance(layers, Mapping) or not layers or not all(valid(n) for pair in layers.items() for n in pair):
        more = f", {LAST} being what the head sees" if last else ""
        raise ValueError(
            f"layers must map student layers to teacher layers, from 1{more}, such as {{2: 4}}, got {layers!r}"
        )
    return tuple(sorted(layers.items()))


def taps_of(pairs: Pairs, kinds: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the student's taps and of the teacher's taps."""
    student, teacher = (
        tuple(f"{kind}_{pair[side]}" for pair in pairs for kind in kinds if pair[side] != LAST) for side in (0, 1)
    )
    return student, teacher


def tap(output: Output, name: str, live: Array) -> Array:
    """A tap, zeroed where `live` [B L] is False."""
    return _zeroed(output.taps[name], live)


def _zeroed(x: Array, live: Array) -> Array:
    return jnp.where(live.reshape(*live.shape, *[1] * (x.ndim - 2)), x, 0)


def hidden(output: Output, layer: int, live: Array) -> Array:
    """The residual stream after `layer` layers [B L D], float32, zeroed where `live` [B L] is False."""
    return _zeroed(_layer(output, layer), live).astype(jnp.float32)


def _layer(output: Output, layer: int) -> Any:
    return output.head.hidden if layer == LAST else output.taps[f"layer_{layer}"]


def width(output: Output | None, layer: int) -> int:
    """Width of the residual stream after `layer` layers."""
    assert output is not None
    return _layer(output, layer).shape[-1]


def matrix(key: Array, d: int, e: int) -> Array:
    """Initial value of a projector [D E]: the identity where D = E, else normal(1/sqrt(D))."""
    return jnp.eye(d) if d == e else jax.random.normal(key, (d, e)) / math.sqrt(d)
