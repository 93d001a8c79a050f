"""Students initialised from a subset of the teacher's layers."""

from collections.abc import Callable

import jax
import numpy as np

from jaxkd.core.types import PyTree


def keep_layers(params: PyTree, layers: tuple[int, ...]) -> PyTree:
    """The decoder's parameters with only `layers`, counted from 0 in rising order; ValueError for other layers."""
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise ValueError(f"student.layers {tuple(layers)} must rise, from 0 to the teacher's last layer, {depth - 1}")
    index = np.asarray(layers)
    return {**params, "layers": jax.tree.map(lambda a: a[index], params["layers"])}


def without_layer(params: PyTree, layer: jax.Array | int) -> PyTree:
    """The decoder with one layer made the identity by zeroing its output projections: shapes do not change."""
    stack = dict(params["layers"])
    for name in ("o", "down"):
        gate = np.arange(stack[name].shape[0]) != layer
        stack[name] = stack[name] * gate.reshape(-1, *[1] * (stack[name].ndim - 1)).astype(stack[name].dtype)
    return {**params, "layers": stack}


def importance(loss: Callable[[int], float], layers: int, progress: Callable = iter) -> np.ndarray:
    """Importance [layers]: `loss(i)` without layer i, in nats per token; `progress` wraps the iteration."""
    return np.array([loss(layer) for layer in progress(range(layers))])


def most_important(scores: np.ndarray, keep: int) -> tuple[int, ...]:
    """The `keep` layers with the largest `importance`, in rising order."""
    if not 1 <= keep <= len(scores):
        raise ValueError(f"student.keep is {keep}, but the teacher has {len(scores)} layers")
    return tuple(sorted(int(i) for i in np.argsort(-scores, kind="stable")[:keep]))
