"""A model reduced to its head: what turns stored hidden states into logits."""

import jax

from jaxkd.core.types import Head, Output, PyTree
from jaxkd.models.transformer import Config


def names(config: Config) -> tuple[str, ...]:
    """The parameters that a head needs."""
    return ("embed",) if config.tied else ("unembed",)


def output(config: Config, params: PyTree, hidden: jax.Array) -> Output:
    """What the forward pass returns of its last hidden states, without taps.

    Args:
        config: the model's.
        params: at least `names(config)`.
        hidden: [*tokens D], after the final norm.
    """
    return Output(Head(hidden, params["embed"].T if config.tied else params["unembed"]), {})
