"""Optimisers from plain values."""

import jax
import optax

from jaxkd.config.schema import OptimBlock
from jaxkd.core.types import PyTree, Scalar


def has_weight_decay(axes: tuple[str, ...]) -> bool:
    """Whether weight decay applies to a parameter with these logical axes: matrices, not norms and biases."""
    return "embed" in axes and len([a for a in axes if a != "layers"]) > 1


def update_count(opt_state: PyTree) -> jax.Array:
    """[] int32: updates of `adamw`, without skipped steps."""
    adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    [state] = [x for x in jax.tree.leaves(opt_state, is_leaf=adam) if adam(x)]
    return state.count


def adamw(
    learning_rate: Scalar, axes: PyTree, *, b1: float, b2: float, eps: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW after clipping by global norm (arXiv 1711.05101).

    `learning_rate` is a number or a schedule of the update count, `axes` the parameters' logical axes (see
    `has_weight_decay`); `weight_decay` is multiplied by the learning rate; `clip` 0 does not clip.
    """
    mask = jax.tree.map(has_weight_decay, axes, is_leaf=lambda a: isinstance(a, tuple))
    steps = [optax.clip_by_global_norm(clip)] if clip else []
    steps.append(optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask))
    return optax.chain(*steps)


def build(
    o: OptimBlock, lr: Scalar, axes: dict[str, PyTree], shardings: dict[str, PyTree] | None
) -> optax.GradientTransformation:
    """A recipe's optimiser for parameters with these logical axes; `shardings` of gradients are given with replicas."""
    tx = adamw(lr, axes, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip=o.clip)
    if shardings is None:
        return tx

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        # Gradients are reduced over replicas first. Else the sharding of moments over replicas propagates into the
        # backward pass, and activations are exchanged between slices.
        return tx.update(jax.lax.with_sharding_constraint(grads, shardings), state, params)

    return optax.GradientTransformation(tx.init, update)
