"""One divergence between two heads as a loss, for custom training loops."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxkd.core.types import Divergence, Ensemble, Head, Sampled, TopK
from jaxkd.kernels.api import linear_divergence
from jaxkd.kernels.mesh import AXES, Axes
from jaxkd.losses.divergences import forward_kl


def distill(
    student: Head,
    teacher: Head | Ensemble | TopK | Sampled,
    weights: Float[jax.Array, "*tokens"],
    *,
    divergence: Divergence | None = None,
    temperature: float | jax.Array = 1.0,
    vocab: int | None = None,
    targets: Int[jax.Array, "*tokens"] | None = None,
    tails: tuple[float, ...] = (1.0,),
    chunk: int | None = None,
    axes: Axes = AXES,
) -> Float[jax.Array, ""]:
    """The weighted mean over tokens of T^2 D(p^(T), q^(T)), differentiable in the student's head.

        loss = T^2 sum_n weights[n] D(p_n^(T), q_n^(T)) / sum_n weights[n]

    in nats; 0 where all weights are 0. Logits are computed in chunks of tokens and never materialised as a whole. T^2
    keeps the gradient's scale as T changes (Hinton et al. 2015, arXiv 1503.02531, section 2). On a mesh, call it under
    `jax.set_mesh` and name the axes that shard tokens and vocabulary.

    Args:
        student: hidden [*tokens D] in the compute dtype, unembed [D V].
        teacher: a head of its own width over the same columns, several, or stored entries; it gets no gradient.
        weights: [*tokens], 0 where a token does not count; need not sum to 1.
        divergence: `forward_kl()` where None.
        vocab: true vocabulary, all columns where None; later columns have no probability and no gradient.
        targets: [*tokens] next-token ids, for divergences that use them (`decoupled_kd`).
        tails: the temperatures of a top-k teacher's tails.
        chunk: tokens per chunk on a device; None derives it.

    Raises ValueError as `linear_divergence` does.
    """
    divergence = forward_kl() if divergence is None else divergence
    if vocab is None:  # anything but a head is refused below
        vocab = student.unembed.shape[1] if isinstance(student, Head) else 0
    # Normalised globally before the kernel, so that the result does not depend on the mesh or on padding.
    weights = jnp.asarray(weights, jnp.float32)
    total = weights.sum()
    scale = jnp.square(jnp.asarray(temperature, jnp.float32)) / jnp.where(total > 0, total, 1.0)
    value, _ = linear_divergence(
        (divergence,),
        student,
        teacher,
        jnp.zeros(weights.shape, jnp.int32) if targets is None else targets,
        (scale * weights)[None],
        (temperature,),
        vocab=vocab,
        tails=tails,
        chunk=chunk,
        axes=axes,
    )
    return value
