"""Teachers that run in the step: a model, the student itself, or none."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.core.sharding import Rules, constrain, table
from jaxkd.core.types import Batch, Forward, Output, PyTree
from jaxkd.teachers.base import Teacher, untouched

_INPUTS = ("tokens", "segments", "positions")  # fields of a batch that a forward pass reads
_TAPS = {"layer": (None,), "query": ("heads", None), "key": ("kv_heads", None), "value": ("kv_heads", None)}
"""Trailing logical axes of a tap by its kind."""


def viewed(forward: Forward) -> Forward:
    """A forward pass over `batch.view`, where there is one, with outputs at the student's positions.

    Hidden states and taps [B M ...] are gathered to [B L ...]: what the teacher says after the same tokens in its own
    context. Without a view it is `forward`.
    """

    def forward_view(params: PyTree, batch: Batch, **options: Any) -> Output:
        if (view := batch.view) is None:
            return forward(params, batch, **options)
        read = batch._replace(tokens=view.tokens, segments=view.segments, positions=view.positions)
        output = forward(params, read, **options)
        at = lambda x: jnp.take_along_axis(x, view.index.reshape(*view.index.shape, *[1] * (x.ndim - 2)), 1)
        head = output.head._replace(hidden=at(output.head.hidden))
        return output._replace(head=head, taps=jax.tree.map(at, output.taps), aux={})

    return forward_view


def online(params: PyTree, forward: Forward) -> Teacher:
    """The teacher's forward pass on every batch: its exact distribution over the full vocabulary.

    `forward(params, batch) -> Output` takes `taps=names` too if the objective needs features.
    """

    def signal(state: PyTree, batch: Batch, **options: Any) -> Output:
        return jax.lax.stop_gradient(viewed(forward)(state, batch, **options))

    return Teacher(params, untouched, signal, ("taps",))


def within(rules: Rules, forward: Forward) -> Forward:
    """A forward pass traced under its own sharding table `rules`, with outputs sharded as the student's are."""

    def resharded(params: PyTree, batch: Batch, **options: Any) -> Output:
        with table(rules):
            inputs: dict[str, Any] = {name: constrain(getattr(batch, name), "batch", None) for name in _INPUTS}
            # Constrained here too, else the compiler propagates the sharding below into the loop over layers.
            output = constrained(forward(params, batch._replace(**inputs), **options))
        # The student's sharding of rows, since the loss shards the vocabulary over `model` only.
        return constrained(output)

    def constrained(output: Output) -> Output:
        hidden = constrain(output.head.hidden, "batch", "length", None)
        taps = {n: constrain(x, "batch", "length", *_TAPS[n.partition("_")[0]]) for n, x in output.taps.items()}
        return output._replace(head=output.head._replace(hidden=hidden), taps=taps)

    return resharded


def self_teacher(forward: Forward) -> Teacher:
    """The running average of the student's parameters (`TrainState.ema`) as the teacher.

    Mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780): ema <- d ema + (1 - d) params after every step. With
    d = 1 it is the initial student (self-distillation), with d = 0 the current student. `forward` is the student's.
    """

    def signal(state: PyTree, batch: Batch, *, own: PyTree, **options: Any) -> Output:
        return jax.lax.stop_gradient(viewed(forward)(own, batch, **options))

    return Teacher({}, untouched, signal, ("taps", "own"))


def no_teacher() -> Teacher:
    """No teacher, for objectives without a term that uses one."""
    return Teacher({}, untouched, lambda state, batch: None)
