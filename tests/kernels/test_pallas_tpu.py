"""The Pallas kernels, interpreted on the CPU, against the dense form in float64: value, fields and every gradient."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import FAMILY, cast, close, dense, each_alone, problem

from jaxkd.core.sharding import make_mesh
from jaxkd.core.types import LOG_FLOOR
from jaxkd.kernels import pallas_tpu, recompute, tiling
from jaxkd.losses.divergences import partial_kl

divergence = recompute.differentiable(pallas_tpu.forward, pallas_tpu.backward)
SERVED = {name: term for name, term in FAMILY.items() if term.top_set is None}
FORWARD, REVERSE, NEXT, Z_LOSS = (FAMILY[name] for name in ("forward_kl", "reverse_kl", "next_token", "z_loss"))
FEW = (FORWARD, NEXT, FAMILY["renyi"], Z_LOSS)
TILES = ((8, 128), (16, 128))


def plan_of(terms, temperatures, vocab, tiles=TILES, interpret=True):
    """The plan, and the distinct temperatures."""
    distinct = tuple(dict.fromkeys(temperatures))
    slots = tuple(distinct.index(t) for t in temperatures)
    return pallas_tpu.Plan(terms, slots, vocab, *tiles, interpret=interpret), jnp.asarray(distinct, jnp.float32)


@functools.lru_cache
def program(terms, temperatures, vocab, tiles):
    """One compiled program per static configuration; weights are data."""
    plan, distinct = plan_of(terms, temperatures, vocab, tiles)

    @jax.jit
    def run(student, teacher, targets, weights):
        def value(hidden, unembed, bias):
            head = student._replace(hidden=hidden, unembed=unembed, bias=bias)
            return divergence(plan, head, teacher, targets, weights, distinct)

        return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(student.hidden, student.unembed, student.bias)

    return run


def tiled(terms, student, teacher, targets, weights, temperatures, vocab, tiles=TILES, mesh=None, dtype=jnp.float32):
    """(value, fields, gradients in hidden, unembed and bias) of the kernels."""
    student, teacher = cast((student, teacher), dtype)
    if student.bias is None:
        student = student._replace(bias=jnp.zeros(student.unembed.shape[1]))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        run = program(tuple(terms), tuple(temperatures), vocab, tiles)
        (total, fields), gradient = run(student, teacher, jnp.asarray(targets), jnp.asarray(weights, jnp.float32))
        return jax.tree.map(np.asarray, (total, fields, gradient))


# Tiles that divide tokens and vocabulary, that do not, and that are larger than both.
@pytest.mark.parametrize(
    ("terms", "tokens", "columns", "vocab", "tiles"),
    [
        (FEW, 16, 256, 256, TILES),
        pytest.param(tuple(SERVED.values()), 19, 300, 271, TILES, marks=pytest.mark.slow),
        (FEW, 12, 200, 200, ((128, 256), (128, 256))),
    ],
)
def test_each_matches_dense_float64(terms, tokens, columns, vocab, tiles):
    student, teacher, targets, one = problem(tokens=tokens, columns=columns)
    temperatures = tuple(1.0 if term.normaliser else 2.0 for term in terms)
    for weights in each_alone(len(terms), one):
        arguments = (terms, student, teacher, targets % vocab, weights, temperatures, vocab)
        close(tiled(*arguments, tiles=tiles), dense(*arguments), weights != 0)


@pytest.mark.parametrize(("data", "model"), [(8, 1), (1, 8), (4, 2)])
def test_sharded_matches_dense_float64(data, model):
    student, teacher, targets, weights = problem(columns=1280 if model == 8 else 320, terms=len(FEW))
    vocab = student.unembed.shape[1] * 3 // 4  # with `model` 8, two devices have padding only
    arguments = (FEW, student, teacher, targets % vocab, weights, (2.0, 1.0, 2.0, 1.0), vocab)
    close(tiled(*arguments, mesh=make_mesh(data, model)), dense(*arguments), weights != 0)


def test_several_terms_and_temperatures_share_one_call():
    student, teacher, targets, weights = problem(columns=256, terms=4)
    terms = (FORWARD, REVERSE, FAMILY["jsd_0.1"], NEXT)
    arguments = (terms, student, teacher, targets, weights, (2.0, 1.0, 3.0, 1.0), 256)
    close(tiled(*arguments), dense(*arguments), weights != 0)


@pytest.mark.parametrize("mesh", [None, (4, 2)])
def test_bias_scale_and_softcap(mesh):
    student, teacher, targets, weights = problem(columns=300, terms=2, spread=3.0)
    bias = np.random.default_rng(1).normal(size=300)
    student = student._replace(bias=bias, scale=0.5, softcap=6.0)
    teacher = teacher._replace(bias=bias[::-1].copy(), scale=2.0, softcap=9.0)
    arguments = ((FORWARD, NEXT), student, teacher, targets, weights, (1.0, 1.0), 290)
    close(tiled(*arguments, mesh=None if mesh is None else make_mesh(*mesh)), dense(*arguments), weights != 0)


def test_without_a_teacher():
    student, _, targets, weights = problem(columns=256, terms=2)
    arguments = ((NEXT, Z_LOSS), student, None, targets, weights, (1.0, 1.0), 250)
    close(tiled(*arguments), dense(*arguments), weights != 0)


def test_unused_teacher_is_not_read():
    student, teacher, targets, weights = problem(columns=256)
    without = tiled((NEXT,), student, None, targets, weights, (1.0,), 256)
    given = tiled((NEXT,), student, teacher._replace(hidden=teacher.hidden * np.nan), targets, weights, (1.0,), 256)
    jax.tree.map(np.testing.assert_array_equal, given, without)


def test_padded_columns_have_zero_probability_and_gradient():
    student, teacher, targets, weights = problem(columns=300, terms=2)
    terms = (FORWARD, REVERSE)
    _, _, (_, dunembed, dbias) = tiled(terms, student, teacher, targets, weights, (1.0, 1.0), 271)
    assert not dunembed[:, 271:].any()
    assert not dbias[271:].any()
    assert dunembed[:, :271].all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_without_weight_changes_nothing(softcap):
    student, teacher, targets, weights = problem(tokens=19, columns=300)
    student = student._replace(softcap=softcap)
    clean = tiled((FORWARD,), student, teacher, targets, weights, (1.0,), 290)
    assert all(np.isfinite(g).all() for g in clean[2])  # the last blocks exceed both edges
    dead = weights[0] == 0
    for junk in (1e30, np.inf, np.nan):
        student.hidden[dead], teacher.hidden[dead] = junk, junk
        value, _, gradient = tiled((FORWARD,), student, teacher, targets, weights, (1.0,), 290)
        assert value == clean[0]
        jax.tree.map(np.testing.assert_array_equal, gradient, clean[2])
        assert not gradient[0][dead].any()


def test_logits_far_below_zero():
    student, teacher, targets, weights = problem(columns=256)
    arguments = ((FORWARD,), student._replace(bias=np.full(256, -300.0)), teacher, targets, weights, (1.0,), 256)
    close(tiled(*arguments), dense(*arguments), weights != 0, tolerance=2e-5)  # at -300 float32 has less precision


def test_zero_teacher_probability_gives_a_large_finite_value():
    student, teacher, targets, weights = problem(columns=256)
    bias = np.zeros(256)
    bias[7] = -np.inf
    teacher = teacher._replace(bias=bias)
    value, fields, gradient = tiled((REVERSE,), student, teacher, targets, weights, (1.0,), 256)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradient)
    assert fields.max() < -LOG_FLOOR
    # The gradient passes through the floor and lowers the token's probability.
    assert gradient[2][7] > 0


def test_bfloat16_operands_accumulate_in_float32():
    student, teacher, targets, weights = problem(tokens=64, width=64, teacher_width=64, columns=1024)
    student, teacher = cast(cast((student, teacher), jnp.bfloat16), jnp.float32)
    head = student._replace(hidden=student.hidden.astype(jnp.bfloat16), bias=jnp.zeros(1024))
    guide = cast(teacher, jnp.bfloat16)
    run = program((FORWARD,), (1.0,), 1024, ((16, 128), (16, 128)))
    (total, _), (dhidden, dunembed, _) = run(head, guide, jnp.asarray(targets), jnp.asarray(weights, jnp.float32))
    # With equal rounded inputs only sums differ, and the gradient in the logits is rounded once.
    exact = dense((FORWARD,), student, teacher, targets, weights, (1.0,), 1024)
    np.testing.assert_allclose(total, exact[0], rtol=1e-4)
    assert dhidden.dtype == jnp.bfloat16
    assert dunembed.dtype == jnp.float32
    assert np.linalg.norm(dunembed - exact[2][1]) / np.linalg.norm(exact[2][1]) < 5e-3


def test_value_without_gradient_is_the_same_and_linear_in_the_weights():
    student, teacher, targets, weights = problem(columns=256, terms=2)
    student, teacher = cast((student, teacher), jnp.float32)
    plan, distinct = plan_of((FORWARD, NEXT), (1.0, 1.0), 256)

    def value(weights):
        return divergence(plan, student, teacher, jnp.asarray(targets), weights, distinct)

    weights = jnp.asarray(weights, jnp.float32)
    (total, fields), slope = jax.jit(jax.value_and_grad(value, has_aux=True))(weights)
    np.testing.assert_allclose(slope, fields, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(value)(3 * weights)[0], 3 * total, rtol=1e-6)


# ------------------------------------------------------------------------- supported calls and tiles


def test_cpu_raises():
    student, teacher, targets, weights = jax.tree.map(jnp.asarray, cast(problem(columns=256), jnp.float32))
    plan, distinct = plan_of((FORWARD,), (1.0,), 256, interpret=False)
    assert "needs a TPU" in tiling.supports(plan, student, teacher)
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        divergence(plan, student, teacher, targets, weights, distinct)


def test_unsupported_calls_are_named():
    student, teacher, *_ = cast(problem(columns=256), jnp.float32)
    refuse = lambda term, student=student, teacher=teacher: tiling.supports(
        plan_of((term,), (1.0,), 256)[0], student, teacher
    )
    assert refuse(FORWARD) is None
    assert "top set" in refuse(FAMILY["adaptive_kl"])
    assert "sparse" in refuse(partial_kl())
    assert "float16" in refuse(FORWARD, student=student._replace(hidden=student.hidden.astype(jnp.float16)))


@pytest.mark.parametrize("kind", list(tiling.CHIPS))
@pytest.mark.parametrize("widths", [(512, 1024), (2048, 4096), (4096, 8192)])
def test_tiles_fit_and_spread_tokens_evenly(kind, widths):
    chip, sizes = tiling.CHIPS[kind], tiling.Sizes(1100, 128256, *widths)
    tiles = tiling.tiling(sizes, chip)
    if tiles is None:
        assert (kind, widths) == ("TPU v4", (4096, 8192))  # no tile fits in 16 MiB
        return
    assert tiling.vmem(sizes, tiles.rows, True) <= tiles.vmem <= chip.vmem
    assert tiling.vmem(sizes, tiles.columns, False) <= tiles.vmem
    assert -(-1100 // tiles.rows[0]) * tiles.rows[0] < 1100 + 128 * -(-1100 // tiles.rows[0])
    assert not any(x % 128 for x in (*tiles.rows, *tiles.columns))


def test_plan_from_a_tiling():
    tiles = tiling.Tiling((128, 256), (256, 128), 2**20)
    plan = pallas_tpu.Plan((FORWARD,), (0,), 256, *tiles)
    assert (plan.rows, plan.columns, plan.vmem, plan.interpret) == (*tiles, False)
