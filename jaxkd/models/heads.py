"""A model's head alone, for hidden states that were stored."""

import jax

from jaxkd.core.types import Head, Output, PyTree
from jaxkd.models.transformer import Config


def names(config: Config) -> tuple[str, ...]:
    """Top-level parameters that the head uses."""
    return ("embed",) if config.tied else ("unembed",)


def output(config: Config, params: PyTree, hidden: jax.Array) -> Output:
    """The forward pass's output for last hidden states [*tokens D], after the final norm; `params` has `names`."""
    return Output(Head(hidden, params["embed"].T if config.tied else params["unembed"]), {})
