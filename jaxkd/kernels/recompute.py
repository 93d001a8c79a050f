"""From one device's two passes to a differentiable loss on a mesh, for kernels that make logits again going back.

Tokens stay on their device and the vocabulary is split over `model`. Residuals are the inputs themselves and a few
rows of one number per token. `custom_vjp` stands outside `shard_map`: inside, the cotangent of a replicated output
would be divided by the size of the axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxkd.kernels.pointwise import weighted_sum
from jaxkd.types import Head

_TOKEN_AXES, _VOCAB_AXIS = ("data",), "model"
_REPLICATED, _PER_TOKEN, _ROWS = "replicated", "per token", "rows of one number per token"


def _on_mesh(body: Callable, out: tuple, student: Head, teacher: Head | None, rest: list[tuple[str, jax.Array]]):
    """Run `body(tokens, axis, student, teacher, *rest)` on each device's share, or plainly where there is one.

    `rest` says of each array how it lies; `out` says it of the results, "head" being gradients in a head's arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(mesh.shape)
    tokens = tuple(a for a in _TOKEN_AXES if sizes.get(a, 1) > 1)
    axis = _VOCAB_AXIS if sizes.get(_VOCAB_AXIS, 1) > 1 else None
    arrays = [array for _, array in rest]
    if mesh.empty or mesh.size == 1:
        return body((), None, student, teacher, *arrays)

    def place(head: Head | None) -> Any:
        specs = (P(tokens, None), P(None, axis), P(axis), P(), P())
        present: list[Any] = [None if x is None else s for x, s in zip(head or (), specs, strict=False)]
        return None if head is None else Head(*present)

    lies = {_REPLICATED: P(), _PER_TOKEN: P(tokens), _ROWS: P(None, tokens), "head": tuple(place(student)[:3])}
    in_specs = (place(student), place(teacher), *(lies[how] for how, _ in rest))
    out_specs: Any = lies[out[0]] if len(out) == 1 else tuple(lies[how] for how in out)
    run = jax.shard_map(partial(body, tokens, axis), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(student, teacher, *arrays)


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """`divergence(plan, student, teacher, targets, weights, temperatures) -> (value, fields)` of two passes.

        value = sum_i sum_n weights[i, n] fields[i, n]

    It is differentiable in the student's hidden states, unembedding and bias, and linear in the weights. Its
    arguments are those of `kernels.api.linear_divergence` with tokens flattened to N, and `plan` is static.

    Args:
        forward: `(plan, slopes, tokens, axis, student, teacher, targets, temperatures) -> (fields [terms N], saved
            [R N])` of one device. `tokens` and `axis` name the mesh axes that tokens and the vocabulary are split
            over, () and None where they are not; `slopes` says whether `saved` will be used.
        backward: `(plan, tokens, axis, student, teacher, targets, weights, temperatures, saved) -> (d hidden, d
            unembed, d bias)` of `sum(weights * fields)`, reduced over those axes.
    """

    def fields_on_mesh(plan, slopes: bool, student: Head, teacher, targets, temperatures):
        rest = [(_PER_TOKEN, targets), (_REPLICATED, temperatures)]
        return _on_mesh(partial(forward, plan, slopes), (_ROWS, _ROWS), student, teacher, rest)

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def divergence(plan, student: Head, teacher: Head | None, targets, weights, temperatures):
        fields, _ = fields_on_mesh(plan, False, student, teacher, targets, temperatures)
        return weighted_sum(weights, fields), fields

    def run(plan, student, teacher, targets, weights, temperatures):
        fields, saved = fields_on_mesh(plan, True, student, teacher, targets, temperatures)
        return (weighted_sum(weights, fields), fields), (
            student,
            teacher,
            targets,
            weights,
            temperatures,
            saved,
            fields,
        )

    def pull(plan, residuals, cotangents):
        student, teacher, targets, weights, temperatures, saved, fields = residuals
        scale = cotangents[0]
        rest = [(_PER_TOKEN, targets), (_ROWS, weights * scale), (_REPLICATED, temperatures), (_ROWS, saved)]
        gradient = _on_mesh(partial(backward, plan), ("head",), student, teacher, rest)
        like = (student.hidden, student.unembed, student.bias)
        gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, like)
        return Head(*gradient), None, None, fields * scale, None

    divergence.defvjp(run, pull)
    return divergence
