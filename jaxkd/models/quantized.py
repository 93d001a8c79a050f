"""A decoder's matrices as int8 with one scale per output channel, for teachers.

    W ~ Q diag(s),   s_j = max_i |W_ij| / 127,   Q = round(W / s),   so that x W ~ (x Q) * s and |W - Q s| <= s / 2

Embedding and head are bfloat16; norms, biases and scales float32. Matrix products run in the activations' dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import PyTree

SCALE = "_scale"
"""Suffix of the parameter that holds a matrix's scales."""
_LEVELS = 127
# Matrix -> number of leading axes that are contracted; the remaining ones are output channels.
_SUMMED = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def matrix(weights: np.ndarray, summed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Weights [*contracted *outputs] as int8, and scales [*outputs] float32; `summed` axes are contracted."""
    largest = np.abs(weights).max(axis=tuple(range(summed)))
    if not np.isfinite(largest).all():
        raise ValueError("weights that are not finite cannot be stored as int8")
    scales = (largest / _LEVELS).astype(np.float32)
    return np.rint(weights / np.where(scales > 0, scales, 1)).astype(np.int8), scales


def quantize(params: PyTree) -> PyTree:
    """A copy of a decoder's host arrays with the layers' matrices as int8, with scales beside them."""
    if "layers" not in params:
        return params
    stack = dict(params["layers"])
    for name, summed in _SUMMED.items():
        whole = np.asarray(stack[name])
        stack[name] = np.empty(whole.shape, np.int8)
        stack[name + SCALE] = np.empty((len(whole), *whole.shape[1 + summed :]), np.float32)
        for i, weights in enumerate(whole):  # layer by layer, to limit temporary memory
            try:
                stack[name][i], stack[name + SCALE][i] = matrix(weights, summed)
            except ValueError as error:
                raise ValueError(f"'{name}' of layer {i}: {error}; set teacher.dtype=float32") from None
    return {**params, "layers": stack}


def quantize_traced(params: PyTree) -> PyTree:
    """`quantize` of arrays on devices, under `jit`: for a student that writes with int8 weights."""
    stack = dict(params["layers"])
    for name, summed in _SUMMED.items():
        axes = tuple(range(1, 1 + summed))
        scales = jnp.abs(stack[name]).max(axes, keepdims=True) / _LEVELS
        stack[name + SCALE] = jnp.squeeze(scales, axes).astype(jnp.float32)
        stack[name] = jnp.rint(stack[name] / jnp.where(scales > 0, scales, 1)).astype(jnp.int8)
    return {**params, "layers": stack}


def abstract(shapes: PyTree, axes: PyTree) -> tuple[PyTree, PyTree]:
    """`transformer.abstract`'s shapes and logical axes as `quantize` changes them; scales have the output axes."""
    struct = lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype)
    wide = lambda leaf: struct(leaf, jnp.bfloat16 if len(leaf.shape) > 1 else jnp.float32)
    outer = {name: wide(leaf) for name, leaf in shapes.items() if name != "layers"}
    inner = {
        name: struct(leaf, jnp.int8 if name in _SUMMED else jnp.float32) for name, leaf in shapes["layers"].items()
    }
    names = dict(axes["layers"])
    for name, summed in _SUMMED.items():
        layers, *rest = inner[name].shape
        inner[name + SCALE] = jax.ShapeDtypeStruct((layers, *rest[summed:]), jnp.float32)
        names[name + SCALE] = (names[name][0], *names[name][1 + summed :])
    return {**outer, "layers": inner}, {**axes, "layers": names}
