"""Weights of the domains in the loss that move at every step: Group DRO as pure functions of small arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import Batch


class GroupDRO(NamedTuple):
    """How fast the weights move, and what none of them falls below: c / N."""

    eta: float = 1.0
    floor: float = 1e-4


class Groups(NamedTuple):
    """What is kept from step to step, float32 [domains] each: a part of the train state, and checkpointed with it."""

    log_weights: jax.Array
    score: jax.Array  # the newest of each domain
    average: jax.Array  # of the weights, over all steps so far
    sampling: jax.Array  # the shares that rows are drawn with


def init(sampling: np.ndarray) -> Groups:
    """Equal weights, before the first step.

    Args:
        sampling: [domains] shares that rows are drawn with, the same in the whole run.
    """
    count = len(sampling)
    nothing = jnp.zeros(count, jnp.float32)
    return Groups(jnp.full(count, -np.log(count), jnp.float32), nothing, nothing, jnp.asarray(sampling, jnp.float32))


def tokens(batch: Batch, count: int) -> jax.Array:
    """[domains] weighted tokens of a batch."""
    return jnp.zeros(count, jnp.float32).at[batch.domain].add(batch.weights.sum(-1))


def factors(groups: Groups, found: jax.Array) -> jax.Array:
    """What a token of each domain counts in the loss: f_i = (w_i / s_i) n / sum_j (w_j / s_j) n_j.

    s_i is the share that rows are drawn with, and not that of this batch: a domain of few rows is then weighed up by
    what it lacks on average, where dividing by its rows in a batch would lose all the batches that it is absent from.
    The second factor makes a batch weigh what it would without weights, n = sum_j n_j, as the authors' code does.

    Args:
        groups: the weights.
        found: n [domains], tokens of the whole batch.

    Returns:
        [domains].
    """
    raw = jnp.where(groups.sampling > 0, jnp.exp(groups.log_weights) / groups.sampling, 0.0)
    total = (raw * found).sum()
    return raw * jnp.where(total > 0, found.sum() / jnp.where(total > 0, total, 1.0), 0.0)


def update(groups: Groups, excess: jax.Array, found: jax.Array, step: jax.Array, how: GroupDRO) -> Groups:
    """One step of exponentiated gradient ascent: w <- (1 - c) softmax(log w + eta lambda) + c / N.

    Args:
        groups: before it.
        excess: [domains] sum over a batch's tokens of max(loss - reference loss, 0), clipped per token.
        found: [domains] tokens of the batch; a domain that has none keeps its last score.
        step: updates made before this one, which the average is over.
        how: eta and c.

    Source: DoReMi (arXiv 2305.10429), Algorithm 1, step 2; absent domains and c = 1e-4 as in the authors' code.
    """
    score = jnp.where(found > 0, excess / jnp.where(found > 0, found, 1.0), groups.score)
    risen = jax.nn.log_softmax(groups.log_weights + how.eta * score)
    least = jnp.log(jnp.asarray(how.floor / len(score), jnp.float32))  # -inf for none
    log_weights = jnp.logaddexp(jnp.log1p(-jnp.asarray(how.floor, jnp.float32)) + risen, least)
    average = groups.average + (jnp.exp(log_weights) - groups.average) / (step + 1)
    return groups._replace(log_weights=log_weights, score=score, average=average)
