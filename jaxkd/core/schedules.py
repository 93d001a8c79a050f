"""Scalars that may change with the step: a number, or a function `step -> value`."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxkd.core.types import Scalar

__all__ = ["constant", "cosine", "linear"]


def value(scalar: Scalar, step):
    """The scalar at `step`; a number is returned as it is and stays a compile-time constant."""
    return scalar(step) if callable(scalar) else scalar


def constant(peak: float, steps: int, warmup: int = 0, end: float = 0.0) -> Scalar:
    """Rise linearly to `peak` over `warmup` steps, then stay; `steps` and `end` are ignored."""
    return _after_warmup(peak, warmup, lambda count: peak) if warmup else peak


def linear(peak: float, steps: int, warmup: int = 0, end: float = 0.0) -> Scalar:
    """Rise linearly to `peak` over `warmup` steps, then fall linearly to `end` at `steps`."""
    return _after_warmup(peak, warmup, lambda count: peak + (end - peak) * _progress(count, steps - warmup))


def cosine(peak: float, steps: int, warmup: int = 0, end: float = 0.0) -> Scalar:
    """Rise linearly to `peak` over `warmup` steps, then `end + (peak - end) (1 + cos(pi t)) / 2`."""

    def fall(count):
        return end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(count, steps - warmup)))

    return _after_warmup(peak, warmup, fall)


def _progress(count, span: int):
    return jnp.clip(count / max(span, 1), 0.0, 1.0)


def _after_warmup(peak: float, warmup: int, fall: Callable) -> Scalar:
    """Linear warm-up; the first step gets 1/warmup of the peak, since an update of size zero would be wasted."""

    def value(step):
        return jnp.where(step < warmup, peak * (step + 1) / max(warmup, 1), fall(step - warmup))

    return value
