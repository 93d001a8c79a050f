"""The door to the loss kernels: shapes in, the right implementation chosen, chunks sized."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxkd.kernels import reference, xla
from jaxkd.types import Head, Scalar

IMPLEMENTATIONS = ("reference", "xla")
CHUNK_BYTES = 192 * 2**20
"""What the logits of one chunk and what is made of them may take on a device."""
_BUFFERS = 5  # student and teacher logits, their log-probabilities, the gradient: live at once, float32


def chunk_size(tokens: int, columns: int, budget: int = CHUNK_BYTES) -> int:
    """Tokens per chunk: as many as the byte budget allows, spread evenly, in multiples of eight.

    Args:
        tokens: on one device.
        columns: vocabulary entries on one device.
        budget: bytes.
    """
    most = max(8, budget // (4 * _BUFFERS * columns) // 8 * 8)
    blocks = -(-tokens // most)
    return min(most, -(-tokens // (blocks * 8)) * 8)


def _local_shape(tokens: int, columns: int) -> tuple[int, int]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tokens, columns
    return tokens // mesh.shape.get("data", 1), columns // mesh.shape.get("model", 1)


def _flat(head: Head | None) -> Head | None:
    return None if head is None else head._replace(hidden=head.hidden.reshape(-1, head.hidden.shape[-1]))


def linear_divergence(
    terms: tuple,
    student: Head,
    teacher: Head | None,
    targets: Int[jax.Array, "*tokens"],
    weights: Float[jax.Array, "terms *tokens"],
    temperatures: tuple[Scalar | jax.Array, ...],
    *,
    vocab: int,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[jax.Array, ""], Float[jax.Array, "terms *tokens"]]:
    """Weighted sum of divergences between two heads, fused with the heads' matrix products.

        value = sum_i sum_n weights[i, n] D_i(p_n^(T_i), q_n^(T_i)),   fields[i, n] = D_i(...)

    `value` is differentiable in the student's hidden states, unembedding and bias and linear in the
    weights; nothing flows to the teacher, the temperatures or through `fields`. No T^2: that belongs to the
    weights. Log-probabilities are floored at `types.LOG_FLOOR`.

    Args:
        terms: a `Divergence` each.
        student: hidden [*tokens D] in the compute dtype, unembed [D V].
        teacher: the same with its own width, or None when no term uses it.
        targets: [*tokens] next-token ids.
        weights: [terms *tokens], unnormalised; entries of weight zero cost and count nothing.
        temperatures: one a term, numbers or scalars of the program.
        vocab: true vocabulary; columns from there on have no probability and no gradient.
        chunk: tokens at a time on a device; None sizes it from the shapes and `CHUNK_BYTES`.
        implementation: "reference", "xla", or None for the best that the platform has.

    Raises:
        ValueError: for an unknown implementation, a missing teacher, or sizes that disagree.
    """
    _check(terms, student, teacher, vocab, implementation)
    flat_student, flat_teacher, flat_targets = _flat(student), _flat(teacher), targets.reshape(-1)
    flat_weights = weights.reshape(len(terms), -1).astype(jnp.float32)
    if implementation == "reference":
        value, fields = reference.linear_divergence(
            terms, vocab, chunk, flat_student, flat_teacher, flat_targets, flat_weights, temperatures
        )
        return value, fields.reshape(weights.shape)
    distinct: list[Scalar | jax.Array] = []
    slots = []
    for temperature in temperatures:
        same = [i for i, seen in enumerate(distinct) if seen is temperature or _equal(seen, temperature)]
        slots.append(same[0] if same else len(distinct))
        if not same:
            distinct.append(temperature)
    chunk = chunk or chunk_size(*_local_shape(flat_targets.shape[0], student.unembed.shape[1]))
    plan = xla.Plan(tuple(terms), tuple(slots), vocab, chunk)
    scalars = jnp.stack([jnp.asarray(t, jnp.float32) for t in distinct])
    value, fields = xla.divergence(plan, flat_student, flat_teacher, flat_targets, flat_weights, scalars)
    return value, jax.lax.stop_gradient(fields).reshape(weights.shape)


def linear_comparison(
    terms: tuple,
    student: Head,
    teacher: Head,
    targets: Int[jax.Array, "*tokens"],
    *,
    vocab: int,
    chunk: int | None = None,
) -> Float[jax.Array, "rows *tokens"]:
    """Per-token divergences at temperature 1, and last whether both heads rank the same token first.

    Args:
        terms: a `Divergence` each.
        student: hidden [*tokens D], unembed [D V].
        teacher: the same with its own width.
        targets: [*tokens].
        vocab: true vocabulary.
        chunk: tokens at a time on a device, None to size it.

    Returns:
        [len(terms) + 1, *tokens].
    """
    _check(terms, student, teacher, vocab, None)
    flat_targets = targets.reshape(-1)
    chunk = chunk or chunk_size(*_local_shape(flat_targets.shape[0], student.unembed.shape[1]))
    plan = xla.Plan(tuple(terms), (0,) * len(terms), vocab, chunk)
    heads: Any = (_flat(student), _flat(teacher))
    rows = xla.compare(plan, heads[0], heads[1], flat_targets)
    return rows.reshape(len(terms) + 1, *targets.shape)


def _equal(a, b) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and a == b


def _check(terms, student: Head, teacher: Head | None, vocab: int, implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown kernel implementation '{implementation}'; there are {', '.join(IMPLEMENTATIONS)}")
    if teacher is None and any(term.uses_teacher for term in terms):
        raise ValueError("a divergence from the teacher was asked for, but there is no teacher head")
    widths = [head.unembed.shape[1] for head in (student, teacher) if head is not None]
    if len(set(widths)) > 1:
        raise ValueError(
            f"student and teacher heads have {widths[0]} and {widths[1]} columns; pad both to one multiple"
        )
    if vocab > widths[0]:
        raise ValueError(f"the true vocabulary is {vocab}, but the heads have only {widths[0]} columns")
