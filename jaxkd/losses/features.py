"""Terms over features: hidden states and task-aware filters, with those of `relations.py` and `policy.py`.

`layers` maps student layers to teacher layers, from 1 as in the taps; -1 is the input of the head (after the final
norm), the only layer that cached hidden states have. No gradient flows to the teacher.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxkd.core.types import Batch, Output, PyTree
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences
from jaxkd.losses.feature_term import (
    FeatureTerm,
    Init,
    Pairs,
    hidden,
    matrix,
    nothing,
    pairs_of,
    per_token,
    taps_of,
    width,
)
from jaxkd.losses.policy import minillm, policy_gradient
from jaxkd.losses.relations import attention_transfer, relations

__all__ = [
    "attention_transfer", "hidden_cosine", "hidden_mse", "linear_cka", "minillm", "policy_gradient", "relations",
    "ted_filters", "ted_match",
]  # fmt: skip

EPS = 1e-6
"""Added to a squared norm before its root, so that a vector of zeros has a finite gradient."""
_MIN_VARIANCE = 1e-10  # of a row's features, relative to their mean square


def hidden_mse(layers: Mapping[int, int], projector: bool = False) -> FeatureTerm:
    """Squared distance of hidden states, averaged over the map and the teacher's width.

        field[t] = mean_(s, l) mean_e (h_s[t] W_s - h_l[t])_e^2

    `layers` is {student layer: teacher layer}, from 1 (-1 is the head's input), else ValueError. `W_s` [D E] is learned
    where the widths differ or `projector` is set, else omitted. It is initialised to the identity where D = E, else to
    normal(1/sqrt(D)).

    Source: FitNets (arXiv 1412.6550), Eq. 3, adapted to any layers; recalled.
    """

    return _hidden(layers, projector, lambda a, b: jnp.mean(jnp.square(a - b), -1))


def hidden_cosine(layers: Mapping[int, int], projector: bool = False) -> FeatureTerm:
    """One minus the cosine of hidden states, averaged over the map.

        field[t] = mean_(s, l) 1 - a . b / sqrt((|a|^2 + eps) (|b|^2 + eps)),   a = h_s[t] W_s,  b = h_l[t]

    with eps = 1e-6; arguments and `W_s` as in `hidden_mse`.

    Source: DistilBERT (arXiv 1910.01108), section 2, recalled; the eps is MaxText's.
    """

    def distance(a: Array, b: Array) -> Array:
        square = lambda x: jnp.sum(jnp.square(x), -1) + EPS
        return 1.0 - jnp.sum(a * b, -1) * jax.lax.rsqrt(square(a)) * jax.lax.rsqrt(square(b))

    return _hidden(layers, projector, distance)


def linear_cka(layers: Mapping[int, int]) -> FeatureTerm:
    """One minus linear centred kernel alignment of a row's hidden states, averaged over the map.

        CKA = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)

    with X [n D] and Y [n E] the hidden states of the row's n weighted tokens, centred over them; every weighted token
    of the row has this value. It is invariant to rotation and scale, so widths may differ without a projector. A row
    with fewer than two weighted tokens, or whose tokens are all equal, has 0. `layers` as in `hidden_mse`.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), section 3, recalled; over a row's tokens instead of examples.
    """
    pairs = pairs_of(layers)

    def field(params: PyTree, student: Output, teacher: Output, batch: Batch) -> Array:
        live = batch.weights != 0
        total = jnp.zeros(batch.weights.shape[0], jnp.float32)
        for s, t in pairs:
            x, y = hidden(student, s, live), stop_gradient(hidden(teacher, t, live))
            (x, x_varies), (y, y_varies) = _centred(x, batch.weights), _centred(y, batch.weights)
            # Through the Gram matrices [B L L]: |Y^T X|_F^2 = sum(X X^T * Y Y^T).
            k, m = (jnp.einsum("bld,bmd->blm", a, a) for a in (x, y))
            inner = lambda a, b: jnp.sum(a * b, (1, 2))
            valid = x_varies & y_varies
            norms = jnp.sqrt(jnp.where(valid, inner(k, k), 1.0)) * jnp.sqrt(jnp.where(valid, inner(m, m), 1.0))
            total += jnp.where(valid, 1.0 - inner(k, m) / norms, 0.0)
        return jnp.where(live, total[:, None] / len(pairs), 0.0)

    return FeatureTerm(nothing, per_token(field), *taps_of(pairs, ("layer",)))


def _hidden(layers: Mapping[int, int], projector: bool, distance: Callable[[Array, Array], Array]) -> FeatureTerm:
    pairs = pairs_of(layers)

    def init(key: Array, student: Output, teacher: Output | None) -> PyTree:
        params = {}
        for (s, t), layer_key in zip(pairs, jax.random.split(key, len(pairs))):
            d, e = width(student, s), width(teacher, t)
            if projector or d != e:
                params[f"layer_{s}"] = matrix(layer_key, d, e)
        return params

    def field(params: PyTree, student: Output, teacher: Output, batch: Batch) -> Array:
        live = batch.weights != 0
        total = jnp.zeros(batch.weights.shape, jnp.float32)
        for s, t in pairs:
            h = hidden(student, s, live)
            h = h @ params[f"layer_{s}"] if f"layer_{s}" in params else h
            total += distance(h, stop_gradient(hidden(teacher, t, live)))
        return total / len(pairs)

    return FeatureTerm(init, per_token(field), *taps_of(pairs, ("layer",)))


def _centred(x: Array, weights: Array) -> tuple[Array, Array]:
    """Rows [B L D] centred by weight and normalised, and whether their variance is above rounding [B]."""
    weight = weights[..., None]
    mass = jnp.sum(weight, 1, keepdims=True)
    mean = jnp.sum(weight * x, 1, keepdims=True) / jnp.where(mass > 0, mass, 1.0)
    centred = jnp.sqrt(weight) * (x - mean)
    square = lambda a: jnp.sum(jnp.square(a), (1, 2))
    size, uncentred = square(centred), square(jnp.sqrt(weight) * x)
    varies = (jnp.sum(weights != 0, 1) >= 2) & (size > _MIN_VARIANCE * uncentred)
    # CKA does not depend on the scale, so it needs no gradient.
    scale = stop_gradient(jax.lax.rsqrt(jnp.where(varies, size, 1.0)))
    return centred * scale[:, None, None], varies


def ted_filters(layers: Mapping[int, int]) -> FeatureTerm:
    """Stage 1 of task-aware distillation: linear filters that keep the part of a hidden state that the task needs.

        field[t] = mean_filters -log softmax(y[t] U)[target[t]],   y = |h_T| rms_norm(h F)

    Each mapped layer has a filter F, [D E] for the student and [E E] for the teacher; only filters are trained. The
    paper trains small task heads. For language models the task head is the teacher's, frozen: unembedding U applied to
    the filtered state, rescaled to the root mean square of the teacher's last hidden state h_T at the token. `layers`
    as in `hidden_mse`.

    Source: TED (arXiv 2210.01351), section 3, adapted as described.
    """
    pairs = pairs_of(layers)

    def fn(params: PyTree, student: Output, teacher: Output, batch: Batch, weights: Array, vocab: int):
        live = batch.weights != 0
        head = teacher.head
        last = stop_gradient(jnp.where(live[..., None], head.hidden, 0))
        frozen = head._replace(unembed=stop_gradient(head.unembed), bias=stop_gradient(head.bias))
        value, total = jnp.zeros((), jnp.float32), jnp.zeros(weights.shape, jnp.float32)
        for name, filter_ in params.items():
            side, _, layer = name.split("_")
            y = stop_gradient(hidden(student if side == "student" else teacher, int(layer), live)) @ filter_
            y = y * jax.lax.rsqrt(_mean_square(y) + EPS) * jnp.sqrt(_mean_square(last.astype(jnp.float32)))
            task = frozen._replace(hidden=y.astype(last.dtype))
            part, fields = linear_divergence(
                (divergences.next_token(),), task, None, batch.targets, weights[None], (1.0,), vocab=vocab
            )
            value, total = value + part, total + fields[0]
        return value / len(params), total / len(params)

    return FeatureTerm(_filters(pairs), fn, *taps_of(pairs, ("layer",)))


def ted_match(layers: Mapping[int, int]) -> FeatureTerm:
    """Stage 2 of task-aware distillation: the student's filtered hidden states match the teacher's.

        field[t] = mean_(s, l) mean_e (h_s[t] F_s - h_l[t] F_l)_e^2

    The student and its filters are trained, the teacher's filters are not. The parameters are those of `ted_filters`:
    start from the result of stage 1 (`student.objective_from`). `layers` as in `hidden_mse`.

    Source: TED (arXiv 2210.01351), section 3; the mean over dimensions in place of the sum is ours.
    """
    pairs = pairs_of(layers)

    def field(params: PyTree, student: Output, teacher: Output, batch: Batch) -> Array:
        live = batch.weights != 0
        total = jnp.zeros(batch.weights.shape, jnp.float32)
        for s, t in pairs:
            x = hidden(student, s, live) @ params[f"student_layer_{s}"]
            y = stop_gradient(hidden(teacher, t, live) @ params[f"teacher_layer_{t}"])
            total += jnp.mean(jnp.square(x - y), -1)
        return total / len(pairs)

    return FeatureTerm(_filters(pairs), per_token(field), *taps_of(pairs, ("layer",)))


def _filters(pairs: Pairs) -> Init:
    def init(key: Array, student: Output, teacher: Output | None) -> PyTree:
        params = {}
        for (s, t), layer_key in zip(pairs, jax.random.split(key, len(pairs))):
            e = width(teacher, t)
            params[f"student_layer_{s}"] = matrix(layer_key, width(student, s), e)
            params[f"teacher_layer_{t}"] = jnp.eye(e)  # shared by all student layers that are mapped to it
        return params

    return init


def _mean_square(x: Array) -> Array:
    return jnp.mean(jnp.square(x), -1, keepdims=True)
