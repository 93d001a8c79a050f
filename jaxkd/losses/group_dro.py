"""Group DRO: per-domain loss weights, updated after every step and applied as `factors` of the objective."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import Batch, Metrics
from jaxkd.losses.divergences import excess_loss
from jaxkd.losses.objective import Objective, Reweighting, match

MEASURED = {"excess": match(excess_loss())}
"""Metrics that the objective must report: max(student's loss - teacher's, 0) per token, a domain's score."""


class GroupDRO(NamedTuple):
    """Step size eta, and c of the weights' lower bound c / N."""

    eta: float = 1.0
    floor: float = 1e-4


class Groups(NamedTuple):
    """State, float32 [domains] each; part of the train state."""

    log_weights: jax.Array
    score: jax.Array  # latest of each domain
    average: jax.Array  # of the weights, over all steps so far
    sampling: jax.Array  # sampling probabilities of the rows


def init(sampling: np.ndarray) -> Groups:
    """Initial state with equal weights; `sampling` [domains] are the run's constant sampling probabilities."""
    count = len(sampling)
    zeros = jnp.zeros(count, jnp.float32)
    return Groups(jnp.full(count, -np.log(count), jnp.float32), zeros, zeros, jnp.asarray(sampling, jnp.float32))


def reweighting(settings: GroupDRO, objective: Objective) -> Reweighting:
    """The hook of `make_step` for an objective that has `MEASURED`: all terms are scaled alike.

    A step uses the factors of the previous step, since its own losses come from the same kernel call.
    """

    def scale(groups: Groups, batch: Batch) -> dict[str, jax.Array]:
        tokens = jnp.zeros(len(objective.domains), jnp.float32).at[batch.domain].add(batch.weights.sum(-1))
        return dict.fromkeys(objective.terms, factors(groups, tokens)[batch.domain][:, None])

    def after(groups: Groups, metrics: Metrics, step: jax.Array) -> tuple[Groups, Metrics]:
        excess, tokens = (jnp.stack([metrics[f"excess/{name}"][i] for name in objective.domains]) for i in (0, 1))
        used = {f"weight/{name}": (jnp.exp(w), jnp.ones(())) for name, w in zip(objective.domains, groups.log_weights)}
        return update(groups, excess, tokens, step, settings), used

    return Reweighting(scale, after)


def factors(groups: Groups, tokens: jax.Array) -> jax.Array:
    """[domains] factor of a token's weight: f_i = (w_i / s_i) n / sum_j (w_j / s_j) n_j.

    s_i is the sampling probability, not the share in this batch: dividing by the latter would lose the batches that a
    rare domain is absent from. The second factor keeps the batch's total weight n = sum_j n_j, as the authors' code
    does. `tokens` is n [domains], weighted tokens of the whole batch.
    """
    raw = jnp.where(groups.sampling > 0, jnp.exp(groups.log_weights) / groups.sampling, 0.0)
    total = (raw * tokens).sum()
    return raw * jnp.where(total > 0, tokens.sum() / jnp.where(total > 0, total, 1.0), 0.0)


def update(groups: Groups, excess: jax.Array, tokens: jax.Array, step: jax.Array, settings: GroupDRO) -> Groups:
    """One step of exponentiated gradient ascent: w <- (1 - c) softmax(log w + eta lambda) + c / N.

    Args:
        excess: [domains] sum over a batch's tokens of max(loss - reference loss, 0), clipped per token.
        tokens: [domains] weighted tokens of the batch; a domain without any keeps its last score.
        step: updates made before this one, which the average is over.

    Source: DoReMi (arXiv 2305.10429), Algorithm 1, step 2; absent domains and c = 1e-4 as in the authors' code.
    """
    score = jnp.where(tokens > 0, excess / jnp.where(tokens > 0, tokens, 1.0), groups.score)
    log_weights = jax.nn.log_softmax(groups.log_weights + settings.eta * score)
    floor = jnp.log(jnp.asarray(settings.floor / len(score), jnp.float32))  # -inf for none
    log_weights = jnp.logaddexp(jnp.log1p(-jnp.asarray(settings.floor, jnp.float32)) + log_weights, floor)
    average = groups.average + (jnp.exp(log_weights) - groups.average) / (step + 1)
    return groups._replace(log_weights=log_weights, score=score, average=average)


def columns(groups: Groups | None) -> dict[str, list[float]]:
    """Weights and their averages by domain, for a run's files; empty without Group DRO."""
    if groups is None:
        return {}
    return {"weight": np.exp(np.asarray(groups.log_weights)).tolist(), "average": np.asarray(groups.average).tolist()}
