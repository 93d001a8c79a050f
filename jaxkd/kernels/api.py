"""The door to the loss kernels: shapes in, the right implementation chosen, chunks sized."""

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
"""What the logits of one chunk and what is made of them may take on a device, where the head's gradient takes less."""
_ENOUGH = 256  # tokens of a chunk, for any head
_BUFFERS = 2  # the student's logits and the gradient, live at once with every teacher's logits, float32


def chunk_size(tokens: int, columns: int, width: int, budget: int = CHUNK_BYTES, teachers: int = 1) -> int:
    """Tokens per chunk: as many as help and the budget allows, in multiples of eight that divide the tokens if any do.

    Every chunk adds a product of the head's size to the head's gradient, so fewer are faster, until a chunk has half as
    many tokens as the head is wide: then its logits are the larger tiling, and the smaller they are the more of them
    stays in caches. The budget grows with the head's gradient (the two do not need all of their memory at once). A
    chunk that divides the tokens spares padded copies of the hidden states, the only memory that would grow with them.

    Args:
        tokens: on one device.
        columns: vocabulary entries on one device.
        width: of the student's hidden states.
        budget: bytes; at least what the head's gradient takes is used.
        teachers: heads whose logits a chunk holds.
    """
    budget = max(budget, 4 * width * columns)
    most = min(max(8, budget // (4 * (_BUFFERS + teachers) * columns) // 8 * 8), max(_ENOUGH, width // 16 * 8))
    dividing = [size for size in range(most, most // 2, -8) if tokens % size == 0]
    if dividing:
        return dividing[0]
    blocks = -(-tokens // most)
    return min(most, -(-tokens // (blocks * 8)) * 8)


def _softenings(
    temperatures: tuple, standardized: tuple[bool, ...], tails: tuple[int, ...]
) -> tuple[list, tuple[Softening, ...], tuple[int, ...]]:
    """Distinct temperatures, distinct ways to soften, and each term's place among those."""
    distinct: list[Scalar | jax.Array] = []
    softenings: list[Softening] = []
    slots = []
    for temperature, standard, tail in zip(temperatures, standardized, tails, strict=True):
        same = [i for i, seen in enumerate(distinct) if seen is temperature or _equal(seen, temperature)]
        if not same:
            distinct.append(temperature)
        softening = Softening(same[0] if same else len(distinct) - 1, standard, tail)
        if softening not in softenings:
            softenings.append(softening)
        slots.append(softenings.index(softening))
    return distinct, tuple(softenings), tuple(slots)


_pallas = recompute.differentiable(pallas_tpu.forward, pallas_tpu.backward)


def _flat(signal: Any, tokens: tuple[int, ...], axes: Axes = AXES) -> Any:
    """With one token axis instead of several."""
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

    `value` is differentiable in the student's hidden states, unembedding and bias and linear in the
    weights; nothing flows to the teacher, the temperatures or through `fields`. A head that is not
    differentiated costs no product for its gradient. No T^2: that belongs to the weights. Log-probabilities
    are floored at `types.LOG_FLOOR`. On a mesh (under `jax.set_mesh`) rows of [B L] tokens lie over `replica` and
    `data`, their length over `context` and the vocabulary over `model`. A head's `scale` and `softcap` are constants.

    Args:
        terms: a `Divergence` each.
        student: hidden [*tokens D] in the compute dtype, unembed [D V].
        teacher: a head with its own width, several with their weights, stored entries, draws, or None when no term
            uses it.
        targets: [*tokens] next-token ids, below `vocab` where they have weight.
        weights: [terms *tokens], unnormalised; what stands under a weight of zero, NaN included, changes nothing.
        temperatures: one a term, numbers or scalars of the program.
        vocab: true vocabulary; columns from there on have no probability and no gradient.
        standardized: per term, whether logits are first divided by their standard deviation over the vocabulary
            (each side its own, without a gradient; arXiv 2403.01427); () is no.
        tails: the temperatures of `TopK.tail`, in its order.
        chunk: tokens at a time on a device; None sizes it from the shapes and `CHUNK_BYTES`.
        implementation: "reference" (dense, autodiff), "xla" (None is the same), or "pallas_tpu", taken by name
            alone: no TPU has timed it yet.
        axes: which axes of the current mesh split tokens and vocabulary.

    Raises:
        ValueError: for an unknown implementation, a missing teacher, sizes that disagree, or a term that the
            teacher's signal cannot serve.
    """
    call = _Call.of(terms, student, teacher, targets, temperatures, vocab, standardized, tails, axes, weights)
    flat_weights = mesh.flatten(weights, targets.shape, 1, axes).astype(jnp.float32)
    if implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown kernel implementation '{implementation}'; there are {known}")
    if implementation == "reference":
        value, fields = reference.linear_divergence(
            terms, vocab, call.student, call.teacher, call.targets, flat_weights, *call.per_term
        )
    elif implementation == "pallas_tpu":
        value, fields = _pallas(call.tiled(), call.student, call.teacher, call.targets, flat_weights, call.temperatures)
    else:
        value, fields = xla.divergence(
            call.plan(chunk), call.student, call.teacher, call.targets, flat_weights, call.temperatures
        )
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

    Such are DPO, PPO's clipped ratio, SimPO and likelihood matching, which need a sequence's sum before they know a
    token's weight. The cotangent of `values` is exactly what `linear_divergence` calls weights, so the backward pass is
    its one pass, with the logits made a second time: one product of the student's (and the teacher's) head more, and
    memory as flat. A token whose cotangent is zero has no part in the gradient, whatever stands there. Differentiable
    once.

    Args:
        terms, student, teacher, targets, vocab, standardized, tails, chunk, axes: as `linear_divergence`.
        temperatures: one a term; () is 1 for all.

    Raises:
        ValueError: as `linear_divergence`.
    """
    temperatures = temperatures or (1.0,) * len(terms)
    call = _Call.of(terms, student, teacher, targets, temperatures, vocab, standardized, tails, axes)
    fields = xla.values(call.plan(chunk), call.student, call.teacher, call.targets, call.temperatures)
    return mesh.unflatten(fields, targets.shape, 1, axes)


class _Call(NamedTuple):
    """A checked call with one token axis, and what is static about it."""

    terms: tuple
    student: Head
    teacher: Any
    targets: jax.Array
    temperatures: jax.Array  # the distinct ones
    slots: tuple[int, ...]
    softenings: tuple[Softening, ...]
    per_term: tuple[tuple, tuple[bool, ...], tuple[int, ...]]  # temperature, standardised, place of the tail
    vocab: int
    axes: Axes

    @classmethod
    def of(cls, terms, student, teacher, targets, temperatures, vocab, standardized, tails, axes, weights=None):
        standardized = standardized or (False,) * len(terms)
        _check(terms, student, teacher, vocab)
        _check_counts(terms, student, teacher, targets, weights, temperatures, standardized)
        stored = tuple(
            _tail(term, teacher, temperature, standard, tails)
            if term.uses_teacher and isinstance(teacher, TopK | Sampled)
            else 0
            for term, temperature, standard in zip(terms, temperatures, standardized, strict=True)
        )
        distinct, softenings, slots = _softenings(temperatures, standardized, stored)
        scalars = jnp.stack([jnp.asarray(t, jnp.float32) for t in distinct])
        student, teacher = (_flat(signal, targets.shape, axes) for signal in (student, teacher))
        flat_targets = mesh.flatten(targets, targets.shape, axes=axes)
        per_term = (tuple(temperatures), tuple(standardized), stored)
        return cls(tuple(terms), student, teacher, flat_targets, scalars, slots, softenings, per_term, vocab, axes)

    def plan(self, chunk: int | None) -> xla.Plan:
        """Of the XLA form."""
        device = mesh.share(self.targets.shape[0], self.student.unembed.shape[1], self.axes)
        heads = len(self.teacher.heads) if isinstance(self.teacher, Ensemble) else 1
        chunk = chunk or chunk_size(device.tokens, device.columns, self.student.unembed.shape[0], teachers=heads)
        return xla.Plan(self.terms, self.slots, self.softenings, self.vocab, chunk, axes=self.axes)

    def tiled(self) -> pallas_tpu.Plan:
        """Of the Pallas form.

        Raises:
            ValueError: it cannot serve this call, or not on this device.
        """
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
            cast=head.unembed.dtype != head.hidden.dtype,
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
    """Why a term cannot learn from a kind of teacher signal, or None when it can.

    Args:
        term: the divergence.
        signal: `Head`, `Ensemble`, `TopK` or `Sampled`.
        standardized: whether its logits are standardised.
    """
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
    """What a term asks of a sparse teacher that is not stored, or None when all of it is.

    Args:
        term: one that the signal's kind can serve (`refusal`).
        signal: `TopK` or `Sampled`.
        temperature: the term's, None or an array where it is a schedule.
        entries: K of a top-k teacher.
        tails: temperatures at which its tail is stored.
    """
    if signal is Sampled:
        return None if _equal(temperature, 1.0) else "draws at temperature 1 serve no other temperature"
    if term.top_set is not None and term.top_set.entries > entries:
        return f"a term asks for the teacher's {term.top_set.entries} leading entries, and {entries} are stored"
    if term.support in ("conditional", "renormalized") or any(_equal(tail, temperature) for tail in tails):
        return None  # what is renormalised needs no tail
    said = temperature if isinstance(temperature, int | float) else "a schedule"
    return (
        f"the teacher's tail is stored at temperature {', '.join(map(str, tails))}, not at {said}: its mass "
        "cannot be recovered from another temperature; store it, or use one that is"
    )


def _tail(term: Divergence, teacher: TopK | Sampled, temperature, standardized: bool, tails: tuple[float, ...]) -> int:
    """The place of the stored tail that a term uses."""
    if (reason := refusal(term, type(teacher), standardized)) is not None:
        raise ValueError(f"this term cannot learn from a {type(teacher).__name__} signal: {reason}")
    if (reason := unstored(term, type(teacher), temperature, teacher.ids.shape[-1], tails)) is not None:
        raise ValueError(reason)
    return next((i for i, tail in enumerate(tails) if _equal(tail, temperature)), 0)


RANKED = ("student_top", "teacher_top", "agreement", "student_right", "teacher_right")
"""What `linear_comparison` says of each token beside the terms."""


def linear_comparison(
    terms: tuple,
    student: Head,
    teacher: Head | Ensemble,
    targets: Int[jax.Array, "*tokens"],
    *,
    vocab: int,
    chunk: int | None = None,
) -> Float[jax.Array, " rows *tokens"]:
    """Per-token divergences at temperature 1, and what both sides rank first.

    Args:
        terms: a `Divergence` each.
        student: hidden [*tokens D], unembed [D V].
        teacher: the same with its own width, or several.
        targets: [*tokens].
        vocab: true vocabulary.
        chunk: tokens at a time on a device, None to size it.

    Returns:
        [len(terms) + 5, *tokens], the last five as `RANKED` names them: each side's largest probability, whether both
        have it at one id, and whether that id is the target, 1 or 0.
    """
    _check(terms, student, teacher, vocab)
    shape: tuple[int, ...] = targets.shape
    flat_targets = mesh.flatten(targets, shape)
    device = mesh.share(flat_targets.shape[0], student.unembed.shape[1])
    heads = len(teacher.heads) if isinstance(teacher, Ensemble) else 1
    chunk = chunk or chunk_size(device.tokens, device.columns, student.unembed.shape[0], teachers=heads)
    plan = xla.Plan(tuple(terms), (0,) * len(terms), (Softening(0),), vocab, chunk)
    rows = xla.compare(plan, _flat(student, shape), _flat(teacher, shape), flat_targets)
    return mesh.unflatten(rows, shape, 1)


def _equal(a, b) -> bool:
    number = int | float | np.number
    return isinstance(a, number) and isinstance(b, number) and bool(a == b)


def _check_kinds(terms: Any, student: Any, teacher: Any) -> None:
    """See that each argument is of the kind that its place asks for, before shapes are compared.

    Raises:
        TypeError: logits instead of a head, a divergence that was not called, or what is none.
        ValueError: an unembedding [V D], or a `phi` or `combine` that returns other shapes than it must.
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
    heads = teacher.heads if isinstance(teacher, Ensemble) else (teacher,) if isinstance(teacher, Head) else ()
    for name, head in (("student", student), *(("teacher", head) for head in heads)):
        width, shape = head.hidden.shape[-1], tuple(head.unembed.shape)
        if len(shape) != 2 or shape[0] != width:
            turned = "; it is [V D]: transpose it" if len(shape) == 2 and shape[1] == width else ""
            raise ValueError(
                f"{name}.unembed is {list(shape)}, and hidden states of width {width} need [D V], [{width}, V]{turned}"
            )
    for term in terms:
        _check_divergence(term)


def _check_divergence(term: Any) -> None:
    if not isinstance(term, Divergence):
        name = getattr(term, "__name__", type(term).__name__)
        called = f": call it, {name}()" if callable(term) else ""
        raise TypeError(f"a term is {name}, and not a Divergence{called}")
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
    heads = teacher.heads if isinstance(teacher, Ensemble) else (teacher,)
    if isinstance(teacher, Ensemble) and (not heads or teacher.weights.shape[-1] != len(heads)):
        raise ValueError(f"a blend of {len(heads)} heads has weights for {teacher.weights.shape[-1]}")
    if isinstance(teacher, Head | Ensemble):
        for head in heads:
            if head.unembed.shape[1] != columns:
                raise ValueError(
                    f"student and teacher heads have {columns} and {head.unembed.shape[1]} columns; "
                    "pad both to one multiple"
                )
        for term in terms:
            if (reason := refusal(term, Head)) is not None:
                raise ValueError(f"this term cannot learn from a teacher's head: {reason}")
    if vocab > columns:
        raise ValueError(f"the true vocabulary is {vocab}, but the heads have only {columns} columns")


def _check_counts(terms, student: Head, teacher: Any, targets, weights, temperatures, standardized) -> None:
    given = {"temperatures": len(temperatures), "standardized": len(standardized)}
    given |= {} if weights is None else {"weights": weights.shape[0]}
    for name, count in given.items():
        if count != len(terms):
            raise ValueError(f"{len(terms)} terms need as many {name}, got {count}")
    tokens = [("the student's hidden states", student.hidden.shape[:-1])]
    tokens += [] if weights is None else [("weights", weights.shape[1:])]
    signal = [teacher.hidden] if isinstance(teacher, Head) else teacher
    if isinstance(teacher, Ensemble):
        signal = [teacher.weights, *(head.hidden for head in teacher.heads)]
    for leaf in jax.tree.leaves(signal):
        tokens.append(("the teacher's signal", jnp.shape(leaf)[:-1]))
    for name, shape in tokens:
        if shape != targets.shape:
            raise ValueError(f"there are {targets.shape} targets, but {shape} tokens of {name}")
    for term, temperature, standard in zip(terms, temperatures, standardized, strict=True):
        if (reason := refusal(term, Head, standard)) is not None and not term.uses_teacher:
            raise ValueError(f"this term cannot be standardised: {reason}")
        if term.normaliser and not _equal(temperature, 1.0):
            raise ValueError("a term on the logits' normaliser (z_loss) is for temperature 1")
