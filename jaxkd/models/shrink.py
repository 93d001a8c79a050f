"""Students cut from a teacher by leaving layers out."""

from collections.abc import Callable

import jax
import numpy as np

from jaxkd.core.types import PyTree


def keep_layers(params: PyTree, layers: tuple[int, ...]) -> PyTree:
    """The same decoder with only some of its layers, embeddings and norms shared by value.

    Args:
        params: a decoder's, layers stacked on the leading axis.
        layers: which to keep, counted from 0, in rising order.

    Raises:
        ValueError: for a layer that does not exist, stands twice or out of order.
    """
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise ValueError(
            f"student.layers {tuple(layers)} must be different layers of the teacher in rising order, "
            f"from 0 to {depth - 1}"
        )
    index = np.asarray(layers)
    return {**params, "layers": jax.tree.map(lambda a: a[index], params["layers"])}


def without_layer(params: PyTree, layer: jax.Array | int) -> PyTree:
    """The decoder with one layer turned into the identity: its two output projections are zero.

    Shapes stay, so that one compiled program measures every layer.
    """
    stack = dict(params["layers"])
    for name in ("o", "down"):
        gate = np.arange(stack[name].shape[0]) != layer
        stack[name] = stack[name] * gate.reshape(-1, *[1] * (stack[name].ndim - 1)).astype(stack[name].dtype)
    return {**params, "layers": stack}


def importance(loss: Callable[[int], float], layers: int, progress: Callable = iter) -> np.ndarray:
    """What each layer is worth: the loss when that layer alone is left out.

    Args:
        loss: of the decoder without layer i, in nats per token.
        layers: how many there are.
        progress: wraps the iteration, to show it.

    Returns:
        [layers] nats per token; the larger, the more important.
    """
    return np.array([loss(layer) for layer in progress(range(layers))])


def most_important(scores: np.ndarray, keep: int) -> tuple[int, ...]:
    """The `keep` layers whose loss is largest when left out, in rising order.

    Raises:
        ValueError: when `keep` is not between 1 and the number of layers.
    """
    if not 1 <= keep <= len(scores):
        raise ValueError(f"student.keep is {keep}, but the teacher has {len(scores)} layers")
    return tuple(sorted(int(i) for i in np.argsort(-scores, kind="stable")[:keep]))
