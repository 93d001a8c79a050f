"""Terms over relations between tokens: queries, keys and values, and attention maps."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxkd.core.sharding import constrain
from jaxkd.core.types import Batch, Output, PyTree
from jaxkd.losses.feature_term import FeatureTerm, nothing, pairs_of, per_token, tap, taps_of

_MASKED = -1e30  # score of a masked token; finite, so that it makes no NaN
_TAP_NAMES = {"q": "query", "k": "key", "v": "value"}


def relations(layers: Mapping[int, int], heads: int, pairs: tuple[str, ...] = ("qq", "kk", "vv")) -> FeatureTerm:
    """KL between teacher's and student's relations among queries, keys and values.

        R = softmax(A B^T / sqrt(d_r)),   field[t] = mean_(layers, pairs, heads) sum_u R_T[t, u] log(R_T / R_S)[t, u]

    A and B are queries, keys or values with their heads concatenated and split again into `heads` relation heads of
    width d_r, so the models' widths and numbers of heads may differ. u runs over the tokens of t's segment up to t. In
    "qk", grouped keys are repeated to the number of query heads. Memory does not grow with `heads`.

    Args:
        layers: {student layer: teacher layer}, from 1.
        heads: relation heads; must divide the concatenated width in both models.
        pairs: two letters each, of q, k and v; ("qk", "vv") on the last layer is the first MiniLM.

    Raises ValueError for an invalid map or pair, and from `init` for `heads` that do not divide.

    Source: MiniLMv2 (arXiv 2012.15828) and MiniLM (arXiv 2002.10957), recalled; causal, as the decoder is.
    """
    mapped, used = pairs_of(layers, last=False), sorted({letter for pair in pairs for letter in pair})
    wrong = [p for p in pairs if not isinstance(p, str) or len(p) != 2 or set(p) - set(_TAP_NAMES)]
    if wrong or not pairs:
        raise ValueError(f"pairs must be such as ('qq', 'kk', 'vv'), of the letters q, k and v, got {pairs!r}")
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")

    def init(key: Array, student: Output, teacher: Output | None) -> PyTree:
        assert teacher is not None
        for side, output, layers in zip(("student", "teacher"), (student, teacher), zip(*mapped)):
            for pair, layer in ((p, n) for p in pairs for n in layers):
                a, b = (output.taps[f"{_TAP_NAMES[letter]}_{layer}"].shape[2:] for letter in pair)
                count = max(a[0], b[0])
                if count * a[1] % heads:
                    raise ValueError(
                        f"heads={heads} must divide the {side}'s {pair} of layer {layer}: {count} heads x {a[1]} = "
                        f"{count * a[1]}"
                    )
        return {}

    def field(params: PyTree, student: Output, teacher: Output, batch: Batch) -> Array:
        mask, total = _visible(batch), jnp.zeros(batch.weights.shape, jnp.float32)

        def kl(parts: tuple[Array, Array, Array, Array]) -> Array:
            lq, lp = _log_attention(parts[0], parts[1], mask), _log_attention(parts[2], parts[3], mask)
            return jnp.sum(jnp.exp(lp) * (lp - lq), -1)

        for s, t in mapped:
            for pair in pairs:
                parts = (*_operands(student, s, pair, batch), *map(stop_gradient, _operands(teacher, t, pair, batch)))
                total += _mean_over_heads(kl, tuple(_split(x, heads) for x in parts), total.shape)
        return total / (len(mapped) * len(pairs))

    return FeatureTerm(init, per_token(field), *taps_of(mapped, tuple(_TAP_NAMES[letter] for letter in used)))


def attention_transfer(layers: Mapping[int, int]) -> FeatureTerm:
    """Squared distance of attention maps, averaged over heads, each query's row normalised to length one.

        field[t] = mean_(s, l) | M_s[t] / |M_s[t]| - M_l[t] / |M_l[t]| |^2,   M = mean_heads softmax(Q K^T / sqrt(d))

    `layers` is {student layer: teacher layer}, from 1, else ValueError.

    Source: Zagoruyko and Komodakis (arXiv 1612.03928), Eq. 2, recalled and adapted from activation maps of
    convolutions to a decoder's attention maps, per query.
    """
    pairs = pairs_of(layers, last=False)

    def field(params: PyTree, student: Output, teacher: Output, batch: Batch) -> Array:
        mask, total = _visible(batch), jnp.zeros(batch.weights.shape, jnp.float32)

        def attention(parts: tuple[Array, Array]) -> Array:
            return jnp.exp(_log_attention(parts[0], parts[1], mask))

        def unit(operands: tuple[Array, Array]) -> Array:
            parts = tuple(_split(x, x.shape[2]) for x in operands)
            m = _mean_over_heads(attention, parts, mask.shape)
            return m * jax.lax.rsqrt(jnp.sum(jnp.square(m), -1, keepdims=True))  # a row sums to 1, so the norm is not 0

        for s, t in pairs:
            target = stop_gradient(unit(_operands(teacher, t, "qk", batch)))
            total += jnp.sum(jnp.square(unit(_operands(student, s, "qk", batch)) - target), -1)
        return total / len(pairs)

    return FeatureTerm(nothing, per_token(field), *taps_of(pairs, ("query", "key")))


def _visible(batch: Batch) -> Array:
    """[B L L] causal mask within segments; padding is a segment of its own, so no row is empty."""
    length = batch.segments.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & (batch.segments[:, :, None] == batch.segments[:, None, :])


def _operands(output: Output, layer: int, pair: str, batch: Batch) -> tuple[Array, Array]:
    """A and B [B L H d] of a pair such as "qk", with equal numbers of heads."""
    # Prompt tokens have no weight but are keys, so only padding is zeroed.
    a, b = (tap(output, f"{_TAP_NAMES[letter]}_{layer}", batch.segments > 0) for letter in pair)
    if a.shape[2] != b.shape[2]:
        heads = max(a.shape[2], b.shape[2])
        a, b = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (a, b))
    return a, b


def _split(x: Array, heads: int) -> Array:
    """[B L H d] -> [heads B L d_r]: concatenates the heads and splits again."""
    x = jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 0)
    return constrain(x, None, "batch", "length", None)


def _log_attention(a: Array, b: Array, mask: Array) -> Array:
    scores = jnp.einsum("blr,bmr->blm", a, b, preferred_element_type=jnp.float32) / math.sqrt(a.shape[-1])
    return jax.nn.log_softmax(jnp.where(mask, scores, _MASKED), axis=-1)


def _mean_over_heads(f: Callable, parts: tuple[Array, ...], shape: tuple[int, ...]) -> Array:
    """The mean of `f(parts of a head)` [shape], one head at a time, recomputed in the backward pass."""
    f = jax.checkpoint(f, prevent_cse=False)
    total, _ = jax.lax.scan(lambda sums, x: (sums + f(x), None), jnp.zeros(shape, jnp.float32), parts)
    return total / parts[0].shape[0]
