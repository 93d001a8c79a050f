"""Scalars that may change with the step: a number, or a function `step -> value`."""

import jax.numpy as jnp
import optax

from jaxkd.types import Scalar

__all__ = ["constant", "cosine", "linear"]


def value(scalar: Scalar, step):
    """The scalar at `step`; numbers are passed through, so that a constant stays a constant of the program."""
    return scalar(step) if callable(scalar) else scalar


def constant(peak: float, steps: int, warmup: int = 0, end: float = 0.0) -> Scalar:
    """Rise linearly to `peak` over `warmup` steps, then stay. `end` is not reached."""
    del steps, end
    return optax.schedules.warmup_constant_schedule(0.0, peak, warmup) if warmup else peak


def linear(peak: float, steps: int, warmup: int = 0, end: float = 0.0) -> Scalar:
    """Rise linearly to `peak` over `warmup` steps, then fall linearly to `end` at `steps`."""
    fall = optax.schedules.linear_schedule(peak, end, max(steps - warmup, 1))
    return _after_warmup(peak, warmup, fall)


def cosine(peak: float, steps: int, warmup: int = 0, end: float = 0.0) -> Scalar:
    """Rise linearly to `peak` over `warmup` steps, then `end + (peak - end) (1 + cos(pi t)) / 2`."""
    span = max(steps - warmup, 1)

    def fall(count):
        t = jnp.clip(count / span, 0.0, 1.0)
        return end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * t))

    return _after_warmup(peak, warmup, fall)


def _after_warmup(peak: float, warmup: int, fall: Scalar) -> Scalar:
    if not warmup:
        return fall
    return optax.schedules.join_schedules([optax.schedules.linear_schedule(0.0, peak, warmup), fall], [warmup])
