"""A loss kernel on a mesh: tokens stay on their device, the vocabulary is split, and a body runs on each share."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from jaxkd.types import Blend, Head, Sampled, TopK

TOKEN_AXIS, VOCAB_AXIS = "data", "model"


class Share(NamedTuple):
    """What one device has of a call: how many tokens and columns."""

    tokens: int
    columns: int
    split: bool  # whether the vocabulary is split over devices


def _sizes() -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def share(tokens: int, columns: int) -> Share:
    """One device's part of a call under the current mesh (`jax.set_mesh`).

    Raises:
        ValueError: the mesh's axes are not known, or do not divide the call.
    """
    sizes = _sizes()
    others = [f"{name}={size}" for name, size in sizes.items() if size > 1 and name not in (TOKEN_AXIS, VOCAB_AXIS)]
    if others:
        raise ValueError(
            f"the loss kernel knows the mesh axes '{TOKEN_AXIS}' (tokens) and '{VOCAB_AXIS}' (vocabulary), and this "
            f"mesh has {', '.join(others)}: see sharding.make_mesh"
        )
    data, model = sizes.get(TOKEN_AXIS, 1), sizes.get(VOCAB_AXIS, 1)
    if tokens % data or columns % model:
        raise ValueError(
            f"{tokens} tokens x {columns} columns do not divide over {TOKEN_AXIS}={data} x {VOCAB_AXIS}={model} devices"
        )
    return Share(tokens // data, columns // model, model > 1)


def run(body: Callable, inputs: list[tuple[str, Any]], outputs: tuple[str, ...]) -> Any:
    """`body(tokens, axis, *arrays)` on each device's share, or plainly where there is one device.

    `tokens` and `axis` name the mesh axes that tokens and the vocabulary are split over, () and None where they are
    not. `custom_vjp` belongs outside: inside, the cotangent of a replicated output would be divided by the axis's size.

    Args:
        body: returns a tuple as `outputs` says.
        inputs: (how it lies, array or signal). "replicated"; "tokens": [N ...]; "rows": [R N]; "signal": a head, a
            sparse teacher's entries, or None.
        outputs: the same words, and "hidden" [N D], "unembed" [D V], "bias" [V], "nothing".
    """
    sizes = _sizes()
    tokens = (TOKEN_AXIS,) if sizes.get(TOKEN_AXIS, 1) > 1 else ()
    axis = VOCAB_AXIS if sizes.get(VOCAB_AXIS, 1) > 1 else None
    arrays = [array for _, array in inputs]
    if not tokens and axis is None:
        return body((), None, *arrays)

    def place(how: str, array: Any) -> Any:
        if how == "signal" and isinstance(array, Head):
            specs = (P(tokens, None), P(None, axis), P(axis), P(), P())
            head: Any = Head
            return head(*[None if x is None else s for x, s in zip(array, specs, strict=True)])
        if how == "signal" and isinstance(array, Blend):
            heads = tuple(place(how, head) for head in array.heads)
            return dataclasses.replace(array, heads=heads, weights=P(tokens, None))
        if how == "signal":
            assert array is None or isinstance(array, TopK | Sampled)
            return jax.tree.map(lambda x: P(tokens, *[None] * (x.ndim - 1)), array)
        return lies[how]

    lies: dict[str, Any] = {
        "replicated": P(),
        "tokens": P(tokens),
        "rows": P(None, tokens),
        "hidden": P(tokens, None),
        "unembed": P(None, axis),
        "bias": P(axis),
        "nothing": None,
    }
    in_specs = tuple(place(*item) for item in inputs)
    out_specs = tuple(lies[how] for how in outputs)
    return jax.shard_map(partial(body, tokens, axis), in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)
