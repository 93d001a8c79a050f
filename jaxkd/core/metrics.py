"""Metrics as (sum, weight) pairs, so that micro-batches, devices and steps add up without a mean of means."""

import jax
import jax.numpy as jnp

from jaxkd.core.types import Metrics


def per_domain(name: str, sums: jax.Array, weights: jax.Array, domain: jax.Array, domains: tuple[str, ...]) -> Metrics:
    """One metric over all rows and one per domain, under `name` and `name/domain`.

    Args:
        name: of the metric.
        sums: [B] a row's weighted sum.
        weights: [B] a row's total weight.
        domain: [B] a row's domain, an index into `domains`.
        domains: the domains' names.
    """
    member = domain[:, None] == jnp.arange(len(domains))
    metrics = {name: (sums.sum(), weights.sum())}
    for i, label in enumerate(domains):
        metrics[f"{name}/{label}"] = (
            jnp.where(member[:, i], sums, 0.0).sum(),
            jnp.where(member[:, i], weights, 0.0).sum(),
        )
    return metrics


def add(left: Metrics, right: Metrics) -> Metrics:
    """Sums and weights added name by name; both must have the same names."""
    return jax.tree.map(jnp.add, left, right)


def read(metrics: Metrics) -> dict[str, float]:
    """Divide each sum by its weight on the host; what has no weight (a domain not drawn) is left out."""
    fetched = jax.device_get(metrics)
    return {name: float(total) / float(weight) for name, (total, weight) in fetched.items() if float(weight) > 0}
