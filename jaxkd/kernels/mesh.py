"""Loss kernels on a mesh: tokens and vocabulary are sharded, and a body runs on each shard."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxkd.core.types import Ensemble, Head, Sampled, TopK


class Axes(NamedTuple):
    """Mesh axes that shard a loss's arrays; axes that the current mesh does not have are ignored.

    Rows of tokens (or flat tokens) are sharded over `tokens`, a row's length over `length`, the vocabulary over
    `vocab`.
    """

    tokens: tuple[str, ...] = ("replica", "data", "teacher")
    vocab: str = "model"
    length: str = "context"

    @property
    def over(self) -> tuple[str, ...]:
        """The axes that shard flat tokens, in the order of `flatten`."""
        return (self.length, *self.tokens)


AXES = Axes()
"""Axes of the meshes of `core.sharding.make_mesh`."""


class Share(NamedTuple):
    """One device's part of a call."""

    tokens: int
    columns: int
    split: bool  # whether the vocabulary is split over devices


def _sizes() -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def share(tokens: int, columns: int, axes: Axes = AXES) -> Share:
    """One device's part of a call under the current mesh (`jax.set_mesh`).

    Raises ValueError: the mesh has other axes, or its axes do not divide the call.
    """
    sizes = _sizes()
    others = [f"{name}={size}" for name, size in sizes.items() if size > 1 and name not in (*axes.over, axes.vocab)]
    if others:
        raise ValueError(
            f"this mesh has {', '.join(others)}, and {axes} does not name them: say which axes tokens and the "
            "vocabulary lie over, such as axes=Axes(tokens=('fsdp',), vocab='tensor')"
        )
    over, model = _token_axes(sizes, axes), sizes.get(axes.vocab, 1)
    parts = math.prod(sizes[name] for name in over)
    if tokens % parts or columns % model:
        axis_sizes = " x ".join(f"{name}={sizes[name]}" for name in over or axes.tokens[:1] if name in sizes)
        raise ValueError(
            f"{tokens} tokens x {columns} columns do not divide over {axis_sizes} x {axes.vocab}={model} devices"
        )
    return Share(tokens // parts, columns // model, model > 1)


def _token_axes(sizes: dict[str, int], axes: Axes) -> tuple[str, ...]:
    return tuple(name for name in axes.over if sizes.get(name, 1) > 1)


def flatten(x: jax.Array, tokens: tuple[int, ...], axis: int = 0, axes: Axes = AXES) -> jax.Array:
    """Flatten token axes `tokens`, the first at `axis`, so that every token stays on its device.

    Where the length is sharded, the first part of all rows comes first, then the second, and so on: concatenating rows
    would move tokens between devices.
    """
    before, after = x.shape[:axis], x.shape[axis + len(tokens) :]
    if (parts := _length_parts(tokens, axes)) > 1:
        rows, length = tokens
        x = jnp.moveaxis(x.reshape(*before, rows, parts, length // parts, *after), axis + 1, axis)
    return x.reshape(*before, math.prod(tokens), *after)


def unflatten(x: jax.Array, tokens: tuple[int, ...], axis: int = 0, axes: Axes = AXES) -> jax.Array:
    """The inverse of `flatten`."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if (parts := _length_parts(tokens, axes)) > 1:
        rows, length = tokens
        x = jnp.moveaxis(x.reshape(*before, parts, rows, length // parts, *after), axis, axis + 1)
    return x.reshape(*before, *tokens, *after)


def _length_parts(tokens: tuple[int, ...], axes: Axes) -> int:
    parts = _sizes().get(axes.length, 1)
    return parts if len(tokens) == 2 and tokens[1] % parts == 0 else 1


def run(body: Callable, inputs: list[tuple[str, Any]], outputs: tuple[str, ...], axes: Axes = AXES) -> Any:
    """`body(tokens, axis, *arrays)` on each device's shard, or called directly on one device.

    `tokens` and `axis` are the mesh axes that shard tokens and vocabulary, () and None if unsharded. `custom_vjp`
    belongs outside: inside, the cotangent of a replicated output would be divided by the axis's size.

    Args:
        body: returns a tuple as `outputs` describes.
        inputs: (layout, array or signal). "replicated"; "tokens": [N ...]; "rows": [R N]; "signal": a head, a sparse
            teacher's entries, or None.
        outputs: layouts, also "hidden" [N D], "unembed" [D V], "bias" [V], "nothing".
    """
    sizes = _sizes()
    tokens = _token_axes(sizes, axes)
    axis = axes.vocab if sizes.get(axes.vocab, 1) > 1 else None
    arrays = [array for _, array in inputs]
    if not tokens and axis is None:
        return body((), None, *arrays)

    specs: dict[str, Any] = {
        "replicated": P(),
        "tokens": P(tokens),
        "rows": P(None, tokens),
        "hidden": P(tokens, None),
        "unembed": P(None, axis),
        "bias": P(axis),
        "nothing": None,
    }

    def signal_specs(signal: Any) -> Any:
        if isinstance(signal, Head):
            of_fields = (specs["hidden"], specs["unembed"], specs["bias"], P(), P())
            head: Any = Head
            return head(*[None if x is None else s for x, s in zip(signal, of_fields, strict=True)])
        if isinstance(signal, Ensemble):
            heads = tuple(signal_specs(head) for head in signal.heads)
            return dataclasses.replace(signal, heads=heads, weights=P(tokens, None))
        assert signal is None or isinstance(signal, TopK | Sampled)
        return jax.tree.map(lambda x: P(tokens, *[None] * (x.ndim - 1)), signal)

    in_specs = tuple(signal_specs(array) if layout == "signal" else specs[layout] for layout, array in inputs)
    out_specs = tuple(specs[layout] for layout in outputs)
    return jax.shard_map(partial(body, tokens, axis), in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)
