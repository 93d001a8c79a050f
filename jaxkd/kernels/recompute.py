"""From one device's two passes to a differentiable loss on a mesh, for kernels that make logits again going back.

Tokens stay on their device and the vocabulary is split over `model`. Residuals are the inputs themselves and a few
rows of one number per token. `custom_vjp` stands outside `shard_map`: inside, the cotangent of a replicated output
would be divided by the size of the axis.
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
        inputs = [("signal", student), ("signal", teacher), ("tokens", targets), ("replicated", temperatures)]
        return mesh.run(partial(forward, plan, slopes), inputs, ("rows", "rows"))

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
        inputs = [("signal", student), ("signal", teacher), ("tokens", targets), ("rows", weights * scale)]
        inputs += [("replicated", temperatures), ("rows", saved)]
        outputs = ("hidden", "unembed", "nothing" if student.bias is None else "bias")
        gradient = mesh.run(partial(backward, plan), inputs, outputs)
        like = (student.hidden, student.unembed, student.bias)
        gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, like)
        return Head(*gradient), None, None, fields * scale, None

    divergence.defvjp(run, pull)
    return divergence
