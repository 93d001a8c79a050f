"""From one device's forward and backward pass to a differentiable loss on a mesh, for kernels that recompute logits.

Residuals are the inputs and a few numbers per token. `custom_vjp` is outside `shard_map`: see `mesh.run`.
"""

from collections.abc import Callable
from functools import partial

import jax

from jaxkd.core.types import Head
from jaxkd.kernels import mesh
from jaxkd.kernels.pointwise import weighted_sum


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """`divergence(plan, student, teacher, targets, weights, temperatures) -> (value, fields)` of two passes.

        value = sum_i sum_n weights[i, n] fields[i, n]

    Differentiable in the student's hidden states, unembedding and bias, and linear in the weights. Its arguments are
    those of `kernels.api.linear_divergence` with tokens flattened to N; `plan` is static. Both passes run on one
    device; `tokens` and `axis` are as in `mesh.run`.

    Args:
        forward: `(plan, slopes, tokens, axis, student, teacher, targets, temperatures) -> (fields [terms N], saved
            [R N])`; `slopes`: whether `saved` will be used.
        backward: `(plan, tokens, axis, student, teacher, targets, weights, temperatures, saved) -> (d hidden, d
            unembed, d bias)` of `sum(weights * fields)`, reduced over those axes.
    """

    def fields_on_mesh(plan, slopes: bool, student: Head, teacher, targets, temperatures):
        inputs = [("signal", student), ("signal", teacher), ("tokens", targets), ("replicated", temperatures)]
        return mesh.run(partial(forward, plan, slopes), inputs, ("rows", "rows"))

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def divergence(plan, student: Head, teacher: Head | None, targets, weights, temperatures):
        fields, _ = fields_on_mesh(plan, False, student, teacher, targets, temperatures)
        return weighted_sum(weights, fields), fields

    def run(plan, student, teacher, targets, weights, temperatures):
        fields, saved = fields_on_mesh(plan, True, student, teacher, targets, temperatures)
        residuals = student, teacher, targets, weights, temperatures, saved, fields
        return (weighted_sum(weights, fields), fields), residuals

    def pull(plan, residuals, cotangents):
        student, teacher, targets, weights, temperatures, saved, fields = residuals
        scale = cotangents[0]
        inputs = [("signal", student), ("signal", teacher), ("tokens", targets), ("rows", weights * scale)]
        inputs += [("replicated", temperatures), ("rows", saved)]
        outputs = ("hidden", "unembed", "nothing" if student.bias is None else "bias")
        gradient = mesh.run(partial(backward, plan), inputs, outputs)
        primals = (student.hidden, student.unembed, student.bias)
        gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, primals)
        return Head(*gradient), None, None, fields * scale, None

    divergence.defvjp(run, pull)
    return divergence
