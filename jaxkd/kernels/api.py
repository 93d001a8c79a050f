"""Entry points of the loss kernels: argument checks, choice of implementation, chunk sizes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxkd.core.types import Divergence, Ensemble, Head, Sampled, Scalar, Side, TopK
from jaxkd.kernels import mesh, pallas_tpu, recompute, reference, tiling, xla
from jaxkd.kernels.mesh import AXES, Axes
from jaxkd.kernels.pointwise import Softening

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
CHUNK_BYTES = 448 * 2**20
"""Memory of a chunk's logits and gradients on a device, if the head's gradient is smaller."""
_ENOUGH = 256  # tokens of a chunk, for any head
_BUFFERS = 2  # float32 [tokens, columns]: the student's logits and their gradient, beside the teachers' logits


def chunk_size(tokens: int, columns: int, width: int, budget: int = CHUNK_BYTES, teachers: int = 1) -> int:
    """Tokens per chunk, a multiple of eight that divides the tokens if possible.

    Every chunk adds a product of the head's size to the head's gradient, so larger chunks are faster, up to half as
    many tokens as the head is wide; beyond, the logits dominate and smaller chunks use caches better. The budget is at
    least the size of the head's gradient, since the two do not peak together. A chunk that divides the tokens avoids
    padded copies of the hidden states, the only memory that would grow with them.

    Args:
        tokens, columns: on one device.
        width: of the student's hidden states.
        budget: bytes.
        teachers: heads whose logits a chunk holds.
    """
    budget = max(budget, 4 * width * columns)
    limit = min(max(8, budget // (4 * (_BUFFERS + teachers) * columns) // 8 * 8), max(_ENOUGH, width // 16 * 8))
    divisors = [size for size in range(limit, limit // 2, -8) if tokens % size == 0]
    if divisors:
        return divisors[0]
    blocks = -(-tokens // limit)
    return min(limit, -(-tokens // (blocks * 8)) * 8)


def _softenings(
    temperatures: tuple, standardized: tuple[bool, ...], tails: tuple[int, ...]
) -> tuple[list, tuple[Softening, ...], tuple[int, ...]]:
    """Distinct temperatures, distinct softenings, and the index of each term's softening."""
    distinct: list[Scalar | jax.Array] = []
    of_terms = []
    for temperature, standardize, tail in zip(temperatures, standardized, tails, strict=True):
        matches = [i for i, value in enumerate(distinct) if value is temperature or _equal(value, temperature)]
        if not matches:
            distinct.append(temperature)
        of_terms.append(Softening(matches[0] if matches else len(distinct) - 1, standardize, tail))
    softenings = tuple(dict.fromkeys(of_terms))
    return distinct, softenings, tuple(map(softenings.index, of_terms))


_pallas = recompute.differentiable(pallas_tpu.forward, pallas_tpu.backward)


def _flat(signal: Any, tokens: tuple[int, ...], axes: Axes = AXES) -> Any:
    """The signal with its token axes flattened to one."""
    if isinstance(signal, Head):
        return signal._replace(hidden=mesh.flatten(signal.hidden, tokens, axes=axes))
    if isinstance(signal, Ensemble):
        weights = mesh.flatten(signal.weights, tokens, axes=axes).astype(jnp.float32)
        heads = tuple(_flat(head, tokens, axes) for head in signal.heads)
        return dataclasses.replace(signal, heads=heads, weights=weights)
    return jax.tree.map(lambda x: mesh.flatten(jnp.asarray(x), tokens, axes=axes), signal)


def linear_divergence(
    terms: tuple,
    student: Head,
    teacher: Head | Ensemble | TopK | Sampled | None,
    targets: Int[jax.Array, "*tokens"],
    weights: Float[jax.Array, " terms *tokens"],
    temperatures: tuple[Scalar | jax.Array, ...],
    *,
    vocab: int,
    standardized: tuple[bool, ...] = (),
    tails: tuple[float, ...] = (1.0,),
    chunk: int | None = None,
    implementation: str | None = None,
    axes: Axes = AXES,
) -> tuple[Float[jax.Array, ""], Float[jax.Array, " terms *tokens"]]:
    """Weighted sum of divergences between a teacher's signal and a head, fused with the heads' matrix products.

        value = sum_i sum_n weights[i, n] D_i(p_n^(T_i), q_n^(T_i)),   fields[i, n] = D_i(...)

    `value` is differentiable in the student's hidden states, unembedding and bias and linear in the weights; the
    teacher, the temperatures and `fields` carry no gradient. A head that is not differentiated costs no product for its
    gradient. T^2 is not applied: it belongs to the weights. Log-probabilities are floored at `types.LOG_FLOOR`. On a
    mesh (under `jax.set_mesh`) rows of [B L] tokens are sharded over `replica` and `data`, their length over `context`
    and the vocabulary over `model`, or as `axes` says. A head's `scale` and `softcap` are constants.

    Args:
        terms: a `Divergence` each.
        student: hidden [*tokens D] in the compute dtype, unembed [D V].
        teacher: a head of its own width, several with their weights, stored entries, draws, or None if no term uses it.
        targets: [*tokens] next-token ids, below `vocab` where they have weight.
        weights: [terms *tokens], unnormalised; tokens with weight zero have no effect, even NaN.
        temperatures: one per term, numbers or traced scalars.
        vocab: true vocabulary; later columns have no probability and no gradient.
        standardized: per term, whether logits are first divided by their standard deviation over the vocabulary
            (student's and teacher's each by its own, without a gradient; arXiv 2403.01427); () is no.
        tails: the temperatures of `TopK.tail`, in its order.
        chunk: tokens per chunk on a device; None derives it from the shapes and `CHUNK_BYTES`.
        implementation: "reference" (dense, autodiff), "xla" (the default), or "pallas_tpu", never chosen by default:
            it has not been timed on a TPU.

    Raises ValueError (TypeError for a wrong kind of argument): an unknown implementation, a missing teacher, sizes that
    disagree, or a term that the teacher's signal cannot serve.
    """
    call = _Call.of(terms, student, teacher, targets, temperatures, vocab, standardized, tails, axes, weights)
    flat_weights = mesh.flatten(weights, targets.shape, 1, axes).astype(jnp.float32)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"unknown kernel implementation '{implementation}'; there are {', '.join(IMPLEMENTATIONS)}")
    arrays = call.student, call.teacher, call.targets, flat_weights
    if implementation == "reference":
        value, fields = reference.linear_divergence(terms, vocab, *arrays, *call.per_term)
    elif implementation == "pallas_tpu":
        value, fields = _pallas(call.tiled(), *arrays, call.temperatures)
    else:
        value, fields = xla.divergence(call.plan(chunk), *arrays, call.temperatures)
    return value, mesh.unflatten(jax.lax.stop_gradient(fields), targets.shape, 1, axes)


def token_values(
    terms: tuple,
    student: Head,
    teacher: Head | Ensemble | TopK | Sampled | None,
    targets: Int[jax.Array, "*tokens"],
    temperatures: tuple[Scalar | jax.Array, ...] = (),
    *,
    vocab: int,
    standardized: tuple[bool, ...] = (),
    tails: tuple[float, ...] = (1.0,),
    chunk: int | None = None,
    axes: Axes = AXES,
) -> Float[jax.Array, " terms *tokens"]:
    """Divergences of every token, differentiable: for losses that are not linear in them.

        values[i, n] = D_i(p_n^(T_i), q_n^(T_i))

    Examples are DPO, PPO's clipped ratio, SimPO and likelihood matching, where a token's weight depends on a sequence's
    sum. The cotangent of `values` takes the place of `linear_divergence`'s weights: the backward pass is its one pass,
    which recomputes the logits, at the cost of one product of each head more and without more memory. A token whose
    cotangent is zero has no effect on the gradient, even NaN. Differentiable once.

    Arguments and errors are those of `linear_divergence`; `temperatures` () is 1 for all terms.
    """
    temperatures = temperatures or (1.0,) * len(terms)
    call = _Call.of(terms, student, teacher, targets, temperatures, vocab, standardized, tails, axes)
    fields = xla.values(call.plan(chunk), call.student, call.teacher, call.targets, call.temperatures)
    return mesh.unflatten(fields, targets.shape, 1, axes)


class _Call(NamedTuple):
    """A checked call with flattened tokens and its static parameters."""

    terms: tuple
    student: Head
    teacher: Any
    targets: jax.Array
    temperatures: jax.Array  # the distinct ones
    slots: tuple[int, ...]
    softenings: tuple[Softening, ...]
    per_term: tuple[tuple, tuple[bool, ...], tuple[int, ...]]  # temperature, standardised, index of the tail
    vocab: int
    axes: Axes

    @classmethod
    def of(cls, terms, student, teacher, targets, temperatures, vocab, standardized, tails, axes, weights=None):
        standardized = standardized or (False,) * len(terms)
        _check(terms, student, teacher, vocab)
        _check_counts(terms, student, teacher, targets, weights, temperatures, standardized)
        tail_slots = tuple(_tail(teacher, tails, *each) for each in zip(terms, temperatures, standardized, strict=True))
        distinct, softenings, slots = _softenings(temperatures, standardized, tail_slots)
        scalars = jnp.stack([jnp.asarray(t, jnp.float32) for t in distinct])
        student, teacher = (_flat(signal, targets.shape, axes) for signal in (student, teacher))
        flat_targets = mesh.flatten(targets, targets.shape, axes=axes)
        per_term = (tuple(temperatures), tuple(standardized), tail_slots)
        return cls(tuple(terms), student, teacher, flat_targets, scalars, slots, softenings, per_term, vocab, axes)

    def plan(self, chunk: int | None) -> xla.Plan:
        """Plan of the XLA implementation."""
        device = mesh.share(self.targets.shape[0], self.student.unembed.shape[1], self.axes)
        teachers = len(_heads(self.teacher)) or 1
        chunk = chunk or chunk_size(device.tokens, device.columns, self.student.unembed.shape[0], teachers=teachers)
        return xla.Plan(self.terms, self.slots, self.softenings, self.vocab, chunk, axes=self.axes)

    def tiled(self) -> pallas_tpu.Plan:
        """Plan of the Pallas implementation; ValueError if it does not support this call or device."""
        chip = tiling.current_chip()
        if chip is None:
            raise ValueError(f"pallas_tpu needs a TPU that it knows, and here is '{tiling.device()[1]}': use 'xla'")
        if self.axes != AXES:
            raise ValueError("pallas_tpu knows the axes of core.sharding.make_mesh alone: use 'xla'")
        if any(softening.standardized for softening in self.softenings):
            raise ValueError("pallas_tpu has no standardised logits: use 'xla'")
        head, teacher = self.student, self.teacher
        device, width = mesh.share(self.targets.shape[0], head.unembed.shape[1]), head.unembed.shape[0]
        sizes = tiling.Sizes(
            device.tokens,
            device.columns,
            width,
            teacher.unembed.shape[0] if isinstance(teacher, Head) and any(t.uses_teacher for t in self.terms) else 0,
            head.hidden.dtype.itemsize,
            split=device.split,
            terms=len(self.terms),
        )
        if (tiles := tiling.tiling(sizes, chip)) is None:
            raise ValueError(f"pallas_tpu has no tile of {width}-wide hidden states that fits in VMEM: use 'xla'")
        slots = tuple(self.softenings[slot].temperature for slot in self.slots)
        plan = pallas_tpu.Plan(self.terms, slots, self.vocab, *tiles)
        if (reason := tiling.supports(plan, head, teacher)) is not None:
            raise ValueError(reason)
        return plan


def refusal(term: Divergence, signal: type, standardized: bool = False) -> str | None:
    """Why a term cannot learn from a `signal` (Head, Ensemble, TopK or Sampled), or None if it can."""
    if term.normaliser and standardized:
        return "it is about the size of logits, which standardising takes away"
    if not term.uses_teacher:
        return None
    if signal in (Head, Ensemble):
        if term.support is not None:
            return f"its '{term.support}' form is for a top-k teacher; a full distribution has no entries to leave out"
        return None
    if standardized:
        return "standardising needs all of the teacher's logits, and this teacher keeps a few entries"
    if signal is Sampled and (not term.unbiased or term.support is not None):
        return "draws stand for the teacher only where the term is linear in p: use cross_entropy()"
    return None


def unstored(term: Divergence, signal: type, temperature: Any, entries: int, tails: tuple[float, ...]) -> str | None:
    """What a term needs that a sparse teacher has not stored, or None; the signal must pass `refusal`.

    `temperature` is the term's, None or an array for a schedule; `entries` is K of a top-k teacher; `tails` are the
    temperatures of its stored tails.
    """
    if signal is Sampled:
        return None if _equal(temperature, 1.0) else "draws at temperature 1 serve no other temperature"
    if term.top_set is not None and term.top_set.entries > entries:
        return f"a term asks for the teacher's {term.top_set.entries} leading entries, and {entries} are stored"
    if term.support in ("conditional", "renormalized") or any(_equal(tail, temperature) for tail in tails):
        return None  # renormalised forms need no tail
    wanted = temperature if isinstance(temperature, int | float) else "a schedule"
    return (
        f"the teacher's tail is stored at temperature {', '.join(map(str, tails))}, not at {wanted}: its mass "
        "cannot be recovered from another temperature; store it, or use one that is"
    )


def _tail(teacher: Any, tails: tuple[float, ...], term: Divergence, temperature, standardized: bool) -> int:
    """Index of the stored tail that a term uses."""
    if not term.uses_teacher or not isinstance(teacher, TopK | Sampled):
        return 0
    if (reason := refusal(term, type(teacher), standardized)) is not None:
        raise ValueError(f"this term cannot learn from a {type(teacher).__name__} signal: {reason}")
    if (reason := unstored(term, type(teacher), temperature, teacher.ids.shape[-1], tails)) is not None:
        raise ValueError(reason)
    return next((i for i, tail in enumerate(tails) if _equal(tail, temperature)), 0)


RANKED = ("student_top", "teacher_top", "agreement", "student_right", "teacher_right")
"""Rows of `linear_comparison` after the terms'."""


def linear_comparison(
    terms: tuple,
    student: Head,
    teacher: Head | Ensemble,
    targets: Int[jax.Array, "*tokens"],
    *,
    vocab: int,
    chunk: int | None = None,
) -> Float[jax.Array, " rows *tokens"]:
    """Per-token divergences at temperature 1, and the top-1 statistics of student and teacher.

    Returns [len(terms) + 5, *tokens], the last five as in `RANKED`: each model's largest probability, whether both
    argmax agree, and whether each is the target, 1 or 0. Arguments as `linear_divergence`.
    """
    call = _Call.of(terms, student, teacher, targets, (1.0,) * len(terms), vocab, (), (), AXES)
    rows = xla.compare(call.plan(chunk), call.student, call.teacher, call.targets)
    return mesh.unflatten(rows, targets.shape, 1)


def _heads(teacher: Any) -> tuple[Head, ...]:
    return teacher.heads if isinstance(teacher, Ensemble) else (teacher,) if isinstance(teacher, Head) else ()


def _equal(a, b) -> bool:
    number = int | float | np.number
    return isinstance(a, number) and isinstance(b, number) and bool(a == b)


def _check_kinds(terms: Any, student: Any, teacher: Any) -> None:
    """Check types before shapes.

    Raises:
        TypeError: logits instead of a head, or a term that is no divergence or was not called.
        ValueError: an unembedding [V D], or a `phi` or `combine` that returns wrong shapes.
    """
    for name, head in (("student", student), ("teacher", teacher)):
        if hasattr(head, "shape"):
            raise TypeError(
                f"{name} is an array {tuple(head.shape)}: give Head(hidden [*tokens D], unembed [D V]), whose logits "
                "are made in chunks, and not logits"
            )
    if not isinstance(student, Head):
        raise TypeError(f"student is a {type(student).__name__}: give a Head")
    if teacher is not None and not isinstance(teacher, Head | Ensemble | TopK | Sampled):
        raise TypeError(f"teacher is a {type(teacher).__name__}: give a Head, Ensemble, TopK, Sampled or None")
    for name, head in (("student", student), *(("teacher", head) for head in _heads(teacher))):
        width, shape = head.hidden.shape[-1], tuple(head.unembed.shape)
        if len(shape) != 2 or shape[0] != width:
            hint = "; it is [V D]: transpose it" if len(shape) == 2 and shape[1] == width else ""
            raise ValueError(
                f"{name}.unembed is {list(shape)}, and hidden states of width {width} need [D V], [{width}, V]{hint}"
            )
    for term in terms:
        _check_divergence(term)


def _check_divergence(term: Any) -> None:
    if not isinstance(term, Divergence):
        name = getattr(term, "__name__", type(term).__name__)
        hint = f": call it, {name}()" if callable(term) else ""
        raise TypeError(f"a term is {name}, and not a Divergence{hint}")
    array, flags = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3), bool)
    sums = jax.eval_shape(lambda lp, lq, flag: term.phi(lp, lq, Side(flag, flag)), array, array, flags)
    if not isinstance(sums, tuple) or any(getattr(x, "shape", None) != (2, 3) for x in sums):
        got = [list(getattr(x, "shape", ())) for x in sums] if isinstance(sums, tuple) else type(sums).__name__
        raise ValueError(f"phi must return a tuple of arrays like lp, [N v] each, and returned {got} for [2, 3]")
    rows = [jax.ShapeDtypeStruct((2,), jnp.float32)] * (len(sums) + term.normaliser)
    value = jax.eval_shape(term.combine, *rows)
    if getattr(value, "shape", None) != (2,):
        got = list(value.shape) if hasattr(value, "shape") else type(value).__name__
        raise ValueError(f"combine maps {len(rows)} sums [N] to nats [N], and returned {got} for sums of [2]")


def _check(terms, student: Head, teacher: Any, vocab: int) -> None:
    _check_kinds(terms, student, teacher)
    if teacher is None and any(term.uses_teacher for term in terms):
        raise ValueError("a divergence from the teacher was asked for, but there is no teacher head")
    columns = student.unembed.shape[1]
    heads = _heads(teacher)
    if isinstance(teacher, Ensemble) and (not heads or teacher.weights.shape[-1] != len(heads)):
        raise ValueError(f"a blend of {len(heads)} heads has weights for {teacher.weights.shape[-1]}")
    for head in heads:
        if head.unembed.shape[1] != columns:
            raise ValueError(
                f"student and teacher heads have {columns} and {head.unembed.shape[1]} columns; "
                "pad both to one multiple"
            )
    if heads:
        for term in terms:
            if (reason := refusal(term, Head)) is not None:
                raise ValueError(f"this term cannot learn from a teacher's head: {reason}")
    if vocab > columns:
        raise ValueError(f"the true vocabulary is {vocab}, but the heads have only {columns} columns")


def _check_counts(terms, student: Head, teacher: Any, targets, weights, temperatures, standardized) -> None:
    counts = {"temperatures": len(temperatures), "standardized": len(standardized)}
    counts |= {} if weights is None else {"weights": weights.shape[0]}
    for name, count in counts.items():
        if count != len(terms):
            raise ValueError(f"{len(terms)} terms need as many {name}, got {count}")
    tokens = [("the student's hidden states", student.hidden.shape[:-1])]
    tokens += [] if weights is None else [("weights", weights.shape[1:])]
    signal = [teacher.hidden] if isinstance(teacher, Head) else teacher
    if isinstance(teacher, Ensemble):
        signal = [teacher.weights, *(head.hidden for head in teacher.heads)]
    tokens += [("the teacher's signal", jnp.shape(leaf)[:-1]) for leaf in jax.tree.leaves(signal)]
    for name, shape in tokens:
        if shape != targets.shape:
            raise ValueError(f"there are {targets.shape} targets, but {shape} tokens of {name}")
    for term, temperature, standard in zip(terms, temperatures, standardized, strict=True):
        if (reason := refusal(term, Head, standard)) is not None and not term.uses_teacher:
            raise ValueError(f"this term cannot be standardised: {reason}")
        if term.normaliser and not _equal(temperature, 1.0):
            raise ValueError("a term on the logits' normaliser (z_loss) is for temperature 1")
