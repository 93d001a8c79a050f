"""A decoder's matrices as int8 with a scale per output channel: for teachers, which only run forwards.

    W ~ Q diag(s),   s_j = max_i |W_ij| / 127,   Q = round(W / s),   so that x W ~ (x Q) * s and |W - Q s| <= s / 2

The embedding and the head are bfloat16, norms, biases and scales float32. Products are made in the activations' dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import PyTree

SCALE = "_scale"
"""A matrix's scales have its name and this."""
_LEVELS = 127
# The matrices of a layer, and over how many of their first axes a product sums; the others are output channels.
_SUMMED = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def matrix(weights: np.ndarray, summed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The nearest multiples of a scale per output channel.

    Args:
        weights: [*summed *outputs] float.
        summed: how many of the first axes a product sums over.

    Returns:
        (int8 of the same shape, scales [*outputs] float32).

    Raises:
        ValueError: for weights that are not finite.
    """
    largest = np.abs(weights).max(axis=tuple(range(summed)))
    if not np.isfinite(largest).all():
        raise ValueError("weights that are not finite cannot be stored as int8")
    scales = (largest / _LEVELS).astype(np.float32)
    return np.rint(weights / np.where(scales > 0, scales, 1)).astype(np.int8), scales


def quantize(params: PyTree) -> PyTree:
    """A decoder's host arrays with its layers' matrices as int8 and their scales beside them; the rest as it is.

    Args:
        params: nested dict of float arrays, all or some of the decoder's; it is left as it is.

    Raises:
        ValueError: for weights that are not finite, with the first such layer.
    """
    if "layers" not in params:
        return params
    stack = dict(params["layers"])
    for name, summed in _SUMMED.items():
        whole = np.asarray(stack[name])
        stack[name] = np.empty(whole.shape, np.int8)
        stack[name + SCALE] = np.empty((len(whole), *whole.shape[1 + summed :]), np.float32)
        for i, weights in enumerate(whole):  # of a stack of large ones only one layer at a time is copied
            try:
                stack[name][i], stack[name + SCALE][i] = matrix(weights, summed)
            except ValueError as error:
                raise ValueError(
                    f"'{name}' of layer {i}: {error}; check the file, or set teacher.dtype=float32"
                ) from None
    return {**params, "layers": stack}


def abstract(shapes: PyTree, axes: PyTree) -> tuple[PyTree, PyTree]:
    """What `quantize` makes of a decoder, from what `transformer.abstract` says of it.

    Args:
        shapes: tree of ShapeDtypeStruct.
        axes: tree of tuples of logical names.

    Returns:
        The same two trees, with scales: they lie as the output channels do.
    """
    stored = lambda leaf, kind: jax.ShapeDtypeStruct(leaf.shape, kind)
    wide = lambda leaf: stored(leaf, jnp.bfloat16 if len(leaf.shape) > 1 else jnp.float32)
    outer = {name: wide(leaf) for name, leaf in shapes.items() if name != "layers"}
    inner = {
        name: stored(leaf, jnp.int8 if name in _SUMMED else jnp.float32) for name, leaf in shapes["layers"].items()
    }
    names = dict(axes["layers"])
    for name, summed in _SUMMED.items():
        layers, *rest = inner[name].shape
        inner[name + SCALE] = jax.ShapeDtypeStruct((layers, *rest[summed:]), jnp.float32)
        names[name + SCALE] = (names[name][0], *names[name][1 + summed :])
    return {**outer, "layers": inner}, {**axes, "layers": names}
