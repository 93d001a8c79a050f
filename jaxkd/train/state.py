"""All that a run's next step depends on, beside the mixture: what is checkpointed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxkd.types import PyTree


class TrainState(NamedTuple):
    """`params["student"]` is the model, `params["objective"]` what the objective itself learns."""

    step: jax.Array  # [] int32: updates made
    params: dict[str, PyTree]
    opt_state: PyTree


def init_state(params: dict[str, PyTree], tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; parameters in float32."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
