"""Optimisers from plain values."""

import jax
import optax

from jaxkd.core.types import PyTree, Scalar


def decays(axes: tuple[str, ...]) -> bool:
    """Whether weight decay applies to a parameter: matrices on the model's width, not norms and biases."""
    return "embed" in axes and len([a for a in axes if a != "layers"]) > 1


def updates(opt_state: PyTree) -> jax.Array:
    """[] int32: how many updates `adamw` has made, which is fewer than there were steps where some were left out."""
    adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    [state] = [x for x in jax.tree.leaves(opt_state, is_leaf=adam) if adam(x)]
    return state.count


def adamw(
    learning_rate: Scalar,
    axes: PyTree,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip: float,
) -> optax.GradientTransformation:
    """AdamW with clipping by global norm before it (arXiv 1711.05101).

    Args:
        learning_rate: a number or a schedule of the update count.
        axes: the parameters' logical axes, a tuple a leaf; they decide which of them decay.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; multiplied by the learning rate.
        clip: largest global gradient norm; 0 leaves gradients as they are.
    """
    mask = jax.tree.map(decays, axes, is_leaf=lambda a: isinstance(a, tuple))
    steps = [optax.clip_by_global_norm(clip)] if clip else []
    steps.append(optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask))
    return optax.chain(*steps)


def pinned(tx: optax.GradientTransformation, places: PyTree) -> optax.GradientTransformation:
    """The same, on gradients that lie as the parameters do: summed over replicas before the update shares them out.

    Else the places of moments that are split over replicas reach back into the backward pass, and activations are
    exchanged between slices.

    Args:
        tx: the optimiser.
        places: a sharding per gradient.
    """

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return tx.update(jax.lax.with_sharding_constraint(grads, places), state, params)

    return optax.GradientTransformation(tx.init, update)
