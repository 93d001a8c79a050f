"""The distribution that a next token is drawn from: a model's logits after penalties, temperature and cut-offs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.core.types import LOG_FLOOR, TopSet
from jaxkd.kernels.pointwise import top_set


class Sampling(NamedTuple):
    """What is done to the logits, in this order; the defaults leave the model's own distribution.

    - `repetition_penalty` r: z / r where z > 0 and z r where z < 0, for ids of the prompt and the completion
      (CTRL, arXiv 1909.05858, section 4.1, in the form that is used everywhere).
    - `presence_penalty` a: z - a for ids of the completion.
    - `temperature` T: z / T; 0 is greedy, and then nothing below applies.
    - `top_k` k: the k largest; 0 is no limit.
    - `top_p` p: the fewest of the most probable that hold p of what is left (arXiv 1904.09751).
    - `min_p` m: those with at least m times the largest probability (arXiv 2407.01082).

    Ties with the last entry that is kept are kept too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    def check(self) -> None:
        """Raises ValueError for a value out of range; names the setting."""
        for name, good, bounds in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("presence_penalty", abs(self.presence_penalty) < float("inf"), "finite"),
        ):
            if not good:
                raise ValueError(f"{name} must be {bounds}, got {getattr(self, name)}")


def penalised(z: jax.Array, sampling: Sampling, seen: jax.Array | None, written: jax.Array | None) -> jax.Array:
    """Logits [B V] after both penalties; `seen` and `written` [B V] bool, each None where its penalty is off."""
    if seen is not None:
        r = sampling.repetition_penalty
        z = jnp.where(seen, jnp.where(z > 0, z / r, z * r), z)
    if written is not None:
        z = jnp.where(written, z - sampling.presence_penalty, z)
    return z


def sampling_logprobs(z: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities [B V] of the draw from penalised logits, -inf for what is cut off; of a temperature above 0."""
    lp = jax.nn.log_softmax(z / sampling.temperature, -1)
    if 0 < sampling.top_k < z.shape[-1]:
        lp = _kept(lp, top_set(jnp.maximum(lp, LOG_FLOOR), TopSet(entries=sampling.top_k)))
    if sampling.top_p < 1:
        lp = _kept(lp, top_set(jnp.maximum(lp, LOG_FLOOR), TopSet(mass=sampling.top_p)))
    if sampling.min_p:
        lp = _kept(lp, lp >= lp.max(-1, keepdims=True) + jnp.log(sampling.min_p))
    return lp


def _kept(lp: jax.Array, keep: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(jnp.where(keep, lp, -jnp.inf), -1)
