"""The fused head and divergences as Pallas TPU kernels: logits exist only as tiles in VMEM.

Four kernels over blocks of tokens and tiles of the vocabulary; each recomputes its tiles of logits:

1. `_normalise`: running maximum and sum of exponentials of both heads, at every temperature;
2. `_sum`: the sums of each term's contributions `phi_m` and of their derivatives `dphi_m / dlog q`;
3. `_pull_hidden`: d hidden; a block of tokens stays while the vocabulary streams;
4. `_pull_unembed`: d unembed and d bias; a tile of the vocabulary stays while the tokens stream.

The gradient in the logits of D = combine(s_1 .. s_M), with s_m = sum_v phi_m, at temperature T is

    dz_v = (g_v - q_v sum_u g_u) / T,    g_v = sum_m (dD/ds_m) dphi_m(v)/dlog q_v,

and sum_u g_u = sum_m (dD/ds_m) times the sum of derivatives from 2, so it needs no further pass. After 1 and after 2,
a mesh exchanges a few numbers per token; residuals are a few rows of N numbers. `kernels/tiling.py` counts the cost of
computing the logits four times.

`forward` and `backward` are one device's part; `kernels/recompute.py` makes them differentiable.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxkd.core.types import LOG_FLOOR, Head, Side
from jaxkd.kernels.pointwise import activate, dot

_LOWEST = float(jnp.finfo(jnp.float32).min)  # initial maximum; finite, since -inf minus -inf is NaN


class Plan(NamedTuple):
    """Static parameters of a call."""

    terms: tuple[Any, ...]
    slots: tuple[int, ...]  # per term, which of the distinct temperatures it uses
    vocab: int
    rows: tuple[int, int]  # (tokens, columns) of a tile where tokens stay and the vocabulary streams
    columns: tuple[int, int]  # the same where columns stay and tokens stream
    vmem: int | None = None  # limit in bytes; None is the compiler's default
    interpret: bool = False  # run on any platform, for tests


def _unactivated(head: dict) -> tuple[Callable, jax.Array, jax.Array | None]:
    """`activate(raw, bias) -> z` with the head's scalars bound, and its two arguments."""
    scalars: dict[str, Any] = {name: head[name][0] if name in head else None for name in ("scale", "softcap")}
    raw = dot(head["hidden"][...], head["unembed"][...], (1, 0))
    return partial(activate, **scalars), raw, head["bias"][...] if "bias" in head else None


def _logits(inputs: dict, name: str) -> Any:
    """[n v] float32 logits of a tile, or None if there is no such head."""
    if name not in inputs:
        return None
    to_logits, raw, bias = _unactivated(inputs[name])
    return to_logits(raw, bias)


class _Tile(NamedTuple):
    """A tile's position in this device's vocabulary."""

    ids: jax.Array  # [n v]
    valid: jax.Array  # [n v] bool: below the true vocabulary

    def sum(self, x: jax.Array) -> jax.Array:
        """[n v] -> [n 1] over the valid entries."""
        return jnp.sum(jnp.where(self.valid, x, 0.0), axis=1, keepdims=True)


def _tile(inputs: dict, shape: tuple[int, int], axis: int) -> _Tile:
    ids = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + pl.program_id(axis) * shape[1]
    return _Tile(ids, ids < inputs["limit"][0])


class _Rows(NamedTuple):
    """Numbers per token, each [N] outside a kernel and [n 1] inside; packed as [R N], tokens along lanes."""

    target: Any
    student: tuple  # largest logit, and the log of sum exp((z - largest) / T) at each temperature
    teacher: tuple
    total: tuple = ()  # sum over the vocabulary of the weighted slopes, at each temperature
    weights: tuple = ()  # of each term
    d_sums: tuple = ()  # dD/ds of each contribution

    def pack(self) -> jax.Array:
        return jnp.stack([x.astype(jnp.float32) for x in jax.tree.leaves(self)])

    def unpack(self, packed: jax.Array) -> "_Rows":
        """The rows of a block [R n], in this structure."""
        across = packed.T
        columns = [across[:, i : i + 1] for i in range(packed.shape[0])]
        return jax.tree.unflatten(jax.tree.structure(self), columns)


def _contributions(plan: Plan, tile: _Tile, temperatures, rows: _Rows, z, z_teacher) -> Iterator[tuple]:
    """Per term: log q [n v], its contributions and their derivatives in log q, tuples of [n v]."""
    # Ids are exact in float32 up to 2^24.
    side = Side(is_target=rows.target.astype(jnp.int32) == tile.ids)

    def log_probs(z, slot, normaliser):
        # Subtracted separately: their sum is as large as the logits and would lose precision.
        top, *log_mass = normaliser
        shifted = jnp.where(tile.valid, (z - top) / temperatures[slot], -jnp.inf)
        return jnp.maximum(shifted - log_mass[slot], LOG_FLOOR)

    by_slot: dict[int, tuple[jax.Array, jax.Array]] = {}
    for term, slot in zip(plan.terms, plan.slots, strict=True):
        if slot not in by_slot:
            lq = log_probs(z, slot, rows.student)
            by_slot[slot] = lq, lq if z_teacher is None else log_probs(z_teacher, slot, rows.teacher)
        lq, lp = by_slot[slot]
        # `phi` is pointwise, so one JVP with ones gives all derivatives.
        yield lq, *jax.jvp(lambda x, term=term, lp=lp: term.phi(lp, x, side), (lq,), (jnp.ones_like(lq),))


def _gradient(plan: Plan, tile: _Tile, inputs: dict, rows: _Rows) -> tuple[jax.Array, jax.Array | None]:
    """d value / d (hidden @ unembed) of a tile, [n v], and d bias; zero without weight and outside the vocabulary."""
    activate, raw, bias = _unactivated(inputs["student"])
    live = tile.valid & _live(rows)
    # Zero times the derivative at a NaN is NaN: tokens without weight are zeroed before and after it.
    z, pull = jax.vjp(activate, jnp.where(live, raw, 0.0), bias)
    temperatures = inputs["temperatures"]
    slopes: dict[int, Any] = {}
    log_qs: dict[int, jax.Array] = {}
    d_sums = iter(rows.d_sums)
    terms = _contributions(plan, tile, temperatures, rows, z, _logits(inputs, "teacher"))
    for slot, weight, (lq, _, derivatives) in zip(plan.slots, rows.weights, terms, strict=True):
        slope = sum(d * next(d_sums) for d in derivatives)
        # `where` before multiply: a divergence without weight may be infinite or NaN.
        slope = jnp.where(weight != 0, jnp.where(weight != 0, slope, 0.0) * weight, 0.0)
        slopes[slot] = slopes.get(slot, 0.0) + slope
        log_qs[slot] = lq
    # The Jacobian d log q / d z maps g to g - q sum(g).
    dz = sum((slopes[s] - jnp.exp(log_qs[s]) * rows.total[s]) / temperatures[s] for s in sorted(slopes))
    raw, dbias = pull(jnp.where(live, dz, 0.0))
    return jnp.where(live, raw, 0.0), dbias


def _live(rows: _Rows) -> jax.Array:
    live = rows.weights[0] != 0
    for weight in rows.weights[1:]:
        live = live | (weight != 0)
    return live


def _at_start(*references) -> None:
    """Zero accumulators at the start of the inner grid axis."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        for reference in references:
            reference[...] = jnp.zeros_like(reference)


def _at_end(out, running, turn: bool = True) -> None:
    """Write the accumulator at the end of the inner grid axis: per-token numbers [n R] as rows [R n], or as it is."""

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        out[...] = (running[...].T if turn else running[...]).astype(out.dtype)


def _normalise_kernel(plan: Plan, inputs: dict, out, running):
    """Per head a row of the maxima of z, then at each temperature sum exp((z - maximum) / T)."""
    tile = _tile(inputs, plan.rows, 1)
    temperatures = inputs["temperatures"]
    width = 1 + temperatures.shape[0]
    names = [name for name in ("student", "teacher") if name in inputs]
    _at_start(running)

    @pl.when(pl.program_id(1) == 0)
    def _():
        for side in range(len(names)):
            running[:, side * width : side * width + 1] = jnp.full((plan.rows[0], 1), _LOWEST)

    for side, name in enumerate(names):
        start = side * width
        z = jnp.where(tile.valid, _logits(inputs, name), -jnp.inf)
        before = running[:, start : start + 1]
        top = jnp.maximum(before, jnp.max(z, axis=1, keepdims=True))
        running[:, start : start + 1] = top
        for slot in range(width - 1):
            index, temperature = start + 1 + slot, temperatures[slot]
            mass = jnp.sum(jnp.exp((z - top) / temperature), axis=1, keepdims=True)
            previous = running[:, index : index + 1] * jnp.exp((before - top) / temperature)
            running[:, index : index + 1] = previous + mass
    _at_end(out, running)


def _sum_kernel(plan: Plan, like: _Rows, slopes: bool, inputs: dict, out, running):
    """Sums over the vocabulary of all contributions, term by term, then of their derivatives."""
    tile = _tile(inputs, plan.rows, 1)
    _at_start(running)
    rows = like.unpack(inputs["rows"][...])
    z, z_teacher = _logits(inputs, "student"), _logits(inputs, "teacher")
    index = 0
    for _, values, derivatives in _contributions(plan, tile, inputs["temperatures"], rows, z, z_teacher):
        for value, derivative in zip(values, derivatives, strict=True):
            running[:, index : index + 1] += tile.sum(value)
            if slopes:
                half = running.shape[1] // 2 + index
                running[:, half : half + 1] += tile.sum(derivative)
            index += 1
    _at_end(out, running)


def _pull_hidden_kernel(plan: Plan, like: _Rows, columns: int, inputs: dict, out, running):
    """d hidden of a block of tokens: sum over the vocabulary of raw gradient times unembedding."""
    tile = _tile(inputs, plan.rows, 1)
    _at_start(running)
    raw, _ = _gradient(plan, tile, inputs, like.unpack(inputs["rows"][...]))
    unembed = inputs["student"]["unembed"][...]
    if columns % plan.rows[1]:
        # Beyond the array's edge a tile has arbitrary values, even NaN.
        ids = jax.lax.broadcasted_iota(jnp.int32, unembed.shape, 1) + pl.program_id(1) * plan.rows[1]
        unembed = jnp.where(ids < columns, unembed, jnp.zeros_like(unembed))
    running[...] += dot(raw.astype(unembed.dtype), unembed, (1, 1))
    _at_end(out, running, turn=False)


def _pull_unembed_kernel(plan: Plan, like: _Rows, tokens: int, inputs: dict, out: dict):
    """d unembed and d bias of a tile of the vocabulary, float32, accumulated in the output."""
    tile = _tile(inputs, plan.columns, 0)
    _at_start(*out.values())
    rows = like.unpack(inputs["rows"][...])
    if tokens % plan.columns[0]:
        number = jax.lax.broadcasted_iota(jnp.int32, rows.target.shape, 0) + pl.program_id(1) * plan.columns[0]
        rows = rows._replace(weights=tuple(jnp.where(number < tokens, w, 0.0) for w in rows.weights))
    raw, dbias = _gradient(plan, tile, inputs, rows)
    hidden = inputs["student"]["hidden"][...]
    # Hidden states without weight may be NaN and must not reach the head's gradient.
    hidden = jnp.where(_live(rows), hidden, jnp.zeros_like(hidden))
    out["unembed"][...] += dot(hidden, raw.astype(hidden.dtype), (0, 0))
    if dbias is not None:
        out["bias"][...] += dbias


def _prepared(plan: Plan, axis: str | None, student: Head, teacher: Head | None, targets, temperatures):
    """The inputs of every kernel, without absent arrays; and targets as indices into this device's columns."""
    local = student.unembed.shape[1]
    offset = 0 if axis is None else jax.lax.axis_index(axis) * local

    def prepare(head: Head) -> dict:
        # The parameter, and so its gradient, stays float32; the product runs in the activations' dtype.
        arrays = {"hidden": head.hidden, "unembed": head.unembed.astype(head.hidden.dtype)}
        if head.bias is not None:
            arrays["bias"] = head.bias.astype(jnp.float32)[None]
        scalars = {"scale": head.scale, "softcap": head.softcap}
        return arrays | {k: jnp.asarray(x, jnp.float32)[None] for k, x in scalars.items() if x is not None}

    limit = jnp.clip(jnp.asarray(plan.vocab - offset, jnp.int32), 0, local)[None]
    inputs = {"student": prepare(student), "temperatures": temperatures, "limit": limit}
    if teacher is not None and any(term.uses_teacher for term in plan.terms):
        inputs["teacher"] = prepare(teacher)
    return inputs, targets - offset


def _blocks(inputs: dict, tiles: tuple[int, int], order: tuple[int, int]) -> dict:
    """The block specs of the inputs; `order` is the grid axes of tokens and of the vocabulary."""
    (tokens, columns), (over_tokens, over_columns) = tiles, order
    by_token, by_column = (lambda *at: (at[over_tokens], 0)), (lambda *at: (0, at[over_columns]))
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    specs: dict[str, Any] = {"temperatures": smem, "limit": smem}
    if "rows" in inputs:
        rows = inputs["rows"].shape[0]
        specs["rows"] = pl.BlockSpec((rows, tokens), lambda *at: (0, at[over_tokens]))
    for name in (name for name in ("student", "teacher") if name in inputs):
        width = inputs[name]["hidden"].shape[1]
        head = {"scale": smem, "softcap": smem, "bias": pl.BlockSpec((1, columns), by_column)}
        head["hidden"] = pl.BlockSpec((tokens, width), by_token)
        head["unembed"] = pl.BlockSpec((width, columns), by_column)
        specs[name] = {k: head[k] for k in inputs[name]}
    return specs


def _call(kernel: Callable, plan: Plan, inputs: dict, out: Any, blocks: Any, scratch=(), stay: str = "tokens"):
    """Run a kernel over all tiles; the axis that stays is the outer, parallel axis of the grid."""
    tokens, columns = inputs["student"]["hidden"].shape[0], inputs["student"]["unembed"].shape[1]
    tiles, order = (plan.rows, (0, 1)) if stay == "tokens" else (plan.columns, (1, 0))
    counts = pl.cdiv(tokens, tiles[0]), pl.cdiv(columns, tiles[1])
    return pl.pallas_call(
        kernel,
        grid=counts if stay == "tokens" else counts[::-1],
        in_specs=(_blocks(inputs, tiles, order),),
        out_specs=blocks,
        out_shape=out,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.vmem),
        interpret=plan.interpret,
        name=getattr(kernel, "func", kernel).__name__.strip("_").removesuffix("_kernel"),
    )(inputs)


def _per_token(kernel: Callable, plan: Plan, inputs: dict, count: int) -> jax.Array:
    """[count N] from a kernel that returns `count` numbers per token."""
    tokens = inputs["student"]["hidden"].shape[0]
    out = jax.ShapeDtypeStruct((count, tokens), jnp.float32)
    block = pl.BlockSpec((count, plan.rows[0]), lambda i, j: (0, i))
    return _call(kernel, plan, inputs, out, block, [pltpu.VMEM((plan.rows[0], count), jnp.float32)])


def _fitted(plan: Plan, student: Head) -> Plan:
    """The plan with tiles clipped to the call's sizes."""
    tokens, columns = student.hidden.shape[0], student.unembed.shape[1]
    rows, across = ((min(t, tokens), min(v, columns)) for t, v in (plan.rows, plan.columns))
    return plan._replace(rows=rows, columns=across)


def _normalisers(plan: Plan, axis: str | None, inputs: dict) -> list[tuple]:
    """Per head its largest logit and log sum exp((z - largest) / T) at each temperature, [N] each."""
    temperatures = inputs["temperatures"]
    width, heads = 1 + temperatures.shape[0], 2 if "teacher" in inputs else 1
    running = _per_token(partial(_normalise_kernel, plan), plan, inputs, heads * width)
    tops, masses = running[::width], [running[side * width + 1 : (side + 1) * width] for side in range(heads)]
    if axis is not None:
        local, tops = tops, jax.lax.pmax(tops, axis)
        shares = [jnp.exp((local[side] - tops[side]) / temperatures[:, None]) for side in range(heads)]
        masses = jax.lax.psum([m * s for m, s in zip(masses, shares, strict=True)], axis)
    return [(tops[side], *jnp.log(masses[side])) for side in range(heads)]


def _sizes(plan: Plan) -> list[int]:
    """Number of contributions of each term."""
    x, is_target = (jax.ShapeDtypeStruct((8, 128), dtype) for dtype in (jnp.float32, jnp.bool_))
    return [
        len(jax.eval_shape(lambda x, is_target, t=term: t.phi(x, x, Side(is_target)), x, is_target))
        for term in plan.terms
    ]


def forward(plan: Plan, slopes: bool, tokens, axis, student: Head, teacher, targets, temperatures):
    """(fields [terms N], residuals [R N] besides the inputs) of one device's tokens.

    `tokens` and `axis` are as in `mesh.run`; `slopes`: whether a backward pass will follow.
    """
    plan, sizes = _fitted(plan, student), _sizes(plan)
    inputs, targets = _prepared(plan, axis, student, teacher, targets, temperatures)
    normalisers = _normalisers(plan, axis, inputs)
    rows = _Rows(targets, *normalisers, *[()] * (2 - len(normalisers)))
    inputs["rows"] = rows.pack()
    kernel = partial(_sum_kernel, plan, jax.tree.map(lambda _: 0, rows), slopes)
    count = sum(sizes) * (2 if slopes else 1)
    sums = _per_token(kernel, plan, inputs, count) if count else jnp.zeros((0, targets.shape[0]))
    sums = sums if axis is None else jax.lax.psum(sums, axis)
    fields, all_d_sums, totals, start = [], [], [], 0
    for term, slot, size in zip(plan.terms, plan.slots, sizes, strict=True):
        top, *log_mass = normalisers[0]
        extra = [top / temperatures[slot] + log_mass[slot]] if term.normaliser else []
        field, pull = jax.vjp(term.combine, *sums[start : start + size], *extra)
        d_sums = pull(jnp.ones_like(field))
        fields.append(field)
        if slopes:
            slope = sums[sum(sizes) + start : sum(sizes) + start + size]
            total = sum((s * g for s, g in zip(d_sums, slope, strict=False)), jnp.zeros_like(field))
            # The normaliser's derivative is q, with the opposite sign of the correction.
            totals.append(total - d_sums[-1] if extra else total)
            all_d_sums += d_sums[:size]
        start += size
    flat = [row for head in normalisers for row in head]
    return jnp.stack(fields), jnp.stack([*flat, *totals, *all_d_sums])


def backward(plan: Plan, tokens, axis, student: Head, teacher, targets, weights, temperatures, saved):
    """The gradient of `sum(weights * fields)` in (hidden, unembed, bias), reduced over the mesh axes."""
    plan = _fitted(plan, student)
    inputs, targets = _prepared(plan, axis, student, teacher, targets, temperatures)
    slots, terms, heads = temperatures.shape[0], len(plan.terms), 2 if "teacher" in inputs else 1
    width = 1 + slots  # rows of a head's normaliser
    of_student, of_teacher = tuple(saved[:width]), tuple(saved[width : heads * width])
    totals, d_sums = saved[heads * width :][:terms], tuple(saved[heads * width + terms :])
    weighted = jnp.where(weights != 0, jnp.where(weights != 0, totals, 0.0) * weights, 0.0)
    total = [sum(weighted[i] for i in range(terms) if plan.slots[i] == slot) for slot in range(slots)]
    rows = _Rows(targets, of_student, of_teacher, tuple(total), tuple(weights), d_sums)
    inputs["rows"], like = rows.pack(), jax.tree.map(lambda _: 0, rows)
    (count, width), columns = student.hidden.shape, student.unembed.shape[1]

    # Partial sums of devices stay float32 until they are reduced.
    hidden = jax.ShapeDtypeStruct((count, width), student.hidden.dtype if axis is None else jnp.float32)
    block = pl.BlockSpec((plan.rows[0], width), lambda i, j: (i, 0))
    kernel = partial(_pull_hidden_kernel, plan, like, columns)
    dhidden = _call(kernel, plan, inputs, hidden, block, [pltpu.VMEM((plan.rows[0], width), jnp.float32)])
    dhidden = dhidden if axis is None else jax.lax.psum(dhidden, axis)

    heights = {"unembed": width} | ({} if student.bias is None else {"bias": 1})
    out = {k: jax.ShapeDtypeStruct((h, columns), jnp.float32) for k, h in heights.items()}
    blocks = {k: pl.BlockSpec((h, plan.columns[1]), lambda j, i: (0, j)) for k, h in heights.items()}
    kernel = partial(_pull_unembed_kernel, plan, like, count)
    reduced = _call(kernel, plan, inputs, out, blocks, stay="columns")
    reduced = jax.lax.psum(reduced, tokens) if tokens else reduced
    return dhidden, reduced["unembed"], reduced["bias"][0] if "bias" in reduced else None
