"""Metrics as (sum, weight) pairs, which add up over micro-batches, devices and steps."""

import jax
import jax.numpy as jnp

from jaxkd.core.types import Metrics


def per_domain(name: str, sums: jax.Array, weights: jax.Array, domain: jax.Array, domains: tuple[str, ...]) -> Metrics:
    """Metrics `name` over all rows and `name/domain` per domain; sums, weights and domain index are per row [B]."""
    member = domain[:, None] == jnp.arange(len(domains))
    metrics = {name: (sums.sum(), weights.sum())}
    for i, label in enumerate(domains):
        metrics[f"{name}/{label}"] = (
            jnp.where(member[:, i], sums, 0.0).sum(),
            jnp.where(member[:, i], weights, 0.0).sum(),
        )
    return metrics


def add(left: Metrics, right: Metrics) -> Metrics:
    """Sums and weights added by name; both must have the same names."""
    return jax.tree.map(jnp.add, left, right)


def read(metrics: Metrics) -> dict[str, float]:
    """Each sum divided by its weight on the host; metrics without weight (a domain not drawn) are left out."""
    fetched = jax.device_get(metrics)
    return {name: float(total) / float(weight) for name, (total, weight) in fetched.items() if float(weight) > 0}
