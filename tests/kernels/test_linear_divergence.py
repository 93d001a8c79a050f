"""The fused kernel against the dense form in float64: value, fields and every gradient."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.divergences import Divergence, forward_kl, generalized_jsd, next_token, reverse_kl
from jaxkd.kernels.api import chunk_size, linear_divergence
from jaxkd.sharding import make_mesh
from jaxkd.types import LOG_FLOOR, Head


def renyi(alpha: float) -> Divergence:
    """Renyi divergence: a log of a sum, so that `combine` is more than the identity."""
    return Divergence(
        lambda lp, lq, side: (jnp.exp(alpha * lp + (1 - alpha) * lq),), lambda s: jnp.log(s) / (alpha - 1)
    )


def binary() -> Divergence:
    """KL of (hit, not hit): two sums, a side input, and a non-linear combine."""

    def phi(lp, lq, side):
        return jnp.where(side.hit, jnp.exp(lp), 0.0), jnp.where(side.hit, jnp.exp(lq), 0.0)

    def combine(p, q):
        return p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))

    return Divergence(phi, combine)


FAMILY = {
    "forward_kl": forward_kl(),
    "reverse_kl": reverse_kl(),
    "jsd_0.1": generalized_jsd(0.1),
    "jsd_0.5": generalized_jsd(0.5),
    "next_token": next_token(),
    "renyi": renyi(0.5),
    "binary": binary(),
}


def problem(seed=0, tokens=24, width=16, teacher_width=24, columns=64, terms=1, spread=1.0):
    """Heads, targets and weights, with masked tokens among them."""
    rng = np.random.default_rng(seed)
    student = Head(rng.normal(size=(tokens, width)) * spread, rng.normal(size=(width, columns)) * 0.5)
    teacher = Head(rng.normal(size=(tokens, teacher_width)) * spread, rng.normal(size=(teacher_width, columns)) * 0.5)
    weights = rng.uniform(0.1, 2.0, size=(terms, tokens))
    weights[:, 3] = 0.0
    weights[:, tokens // 2 :: 5] = 0.0
    return student, teacher, rng.integers(0, columns - 16, size=tokens), weights


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def dense(terms, student, teacher, targets, weights, temperatures, vocab):
    """The reference in float64: (value, fields, gradients in hidden, unembed and bias)."""
    with jax.enable_x64(True):
        student, teacher = cast((student, teacher), jnp.float64)

        def value(hidden, unembed, bias):
            return linear_divergence(
                terms,
                student._replace(hidden=hidden, unembed=unembed, bias=bias),
                teacher,
                jnp.asarray(targets),
                # The kernel's weights are float32; round the reference's alike.
                jnp.asarray(np.float32(weights), jnp.float64),
                temperatures,
                vocab=vocab,
                implementation="reference",
            )

        bias = jnp.zeros(student.unembed.shape[1]) if student.bias is None else student.bias
        (total, fields), gradient = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(
            student.hidden, student.unembed, bias
        )
        return jax.tree.map(np.asarray, (total, fields, gradient))


@functools.lru_cache
def program(terms, temperatures, vocab, chunk):
    """One compiled program per kind of call: which weights are zero is data, not a reason to compile."""

    @jax.jit
    def run(student, teacher, targets, weights):
        def value(hidden, unembed, bias):
            head = student._replace(hidden=hidden, unembed=unembed, bias=bias)
            return linear_divergence(terms, head, teacher, targets, weights, temperatures, vocab=vocab, chunk=chunk)

        return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(student.hidden, student.unembed, student.bias)

    return run


def fused(terms, student, teacher, targets, weights, temperatures, vocab, chunk=None, mesh=None):
    student, teacher = cast((student, teacher), jnp.float32)
    if student.bias is None:
        student = student._replace(bias=jnp.zeros(student.unembed.shape[1]))
    arguments = (student, teacher, jnp.asarray(targets), jnp.asarray(weights, jnp.float32))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        (total, fields), gradient = program(terms, temperatures, vocab, chunk)(*arguments)
    return jax.tree.map(np.asarray, (total, fields, gradient))


def close(actual, expected, live, tolerance=2e-6):
    """Relative L2 per array; fields where they carry weight."""
    value, fields, gradient = actual
    value_ref, fields_ref, gradient_ref = expected
    np.testing.assert_allclose(value, value_ref, rtol=tolerance * 5, atol=1e-6)
    np.testing.assert_allclose(fields[live], fields_ref[live], rtol=2e-5, atol=2e-6)
    for got, want in zip(gradient, gradient_ref, strict=True):
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)
        assert error < tolerance, error


@pytest.mark.parametrize(("columns", "vocab"), [(64, 64), (64, 51)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [10, 24])  # leaves a remainder; is everything
def test_each_matches_dense_float64(columns, vocab, temperature, chunk):
    student, teacher, targets, one = problem(columns=columns)
    for i in range(len(FAMILY)):
        weights = np.zeros((len(FAMILY), one.shape[1]))
        weights[i] = one[0]
        arguments = (tuple(FAMILY.values()), student, teacher, targets % vocab, weights)
        arguments += ((temperature,) * len(FAMILY), vocab)
        close(fused(*arguments, chunk=chunk), dense(*arguments), weights != 0)


@pytest.mark.parametrize(("data", "model"), [(8, 1), (1, 8), (4, 2)])
def test_sharded_matches_dense_float64(data, model):
    names = ("forward_kl", "next_token", "renyi", "binary")
    student, teacher, targets, weights = problem(columns=64, terms=len(names))
    terms = tuple(FAMILY[n] for n in names)
    arguments = (terms, student, teacher, targets % 51, weights, (2.0, 1.0, 1.0, 2.0), 51)
    mesh = make_mesh(data, model)
    close(fused(*arguments, chunk=2, mesh=mesh), dense(*arguments), weights != 0)


def test_several_terms_share_one_call():
    names = list(FAMILY)
    student, teacher, targets, weights = problem(terms=len(names))
    temperatures = tuple(itertools.islice(itertools.cycle((1.0, 2.0)), len(names)))
    arguments = (tuple(FAMILY.values()), student, teacher, targets, weights, temperatures, 64)
    close(fused(*arguments, chunk=8), dense(*arguments), weights != 0)


def test_bias_scale_and_softcap():
    student, teacher, targets, weights = problem(terms=2, spread=3.0)
    bias = np.random.default_rng(1).normal(size=64)
    student = student._replace(bias=bias, scale=0.5, softcap=6.0)
    teacher = teacher._replace(bias=bias[::-1].copy(), scale=2.0, softcap=9.0)
    arguments = ((forward_kl(), next_token()), student, teacher, targets, weights, (1.0, 1.0), 50)
    close(fused(*arguments, chunk=8), dense(*arguments), weights != 0)
    close(fused(*arguments, chunk=2, mesh=make_mesh(4, 2)), dense(*arguments), weights != 0)


def test_padded_columns_get_exactly_nothing():
    student, teacher, targets, weights = problem(terms=2)
    _, _, (_, dunembed, dbias) = fused((forward_kl(), reverse_kl()), student, teacher, targets, weights, (1.0, 1.0), 51)
    assert not dunembed[:, 51:].any()
    assert not dbias[51:].any()
    assert dunembed[:, :51].all()


@pytest.mark.parametrize("junk", [1e30, np.inf, np.nan])
def test_junk_without_weight_changes_nothing(junk):
    student, teacher, targets, weights = problem()
    clean = fused((forward_kl(),), student, teacher, targets, weights, (1.0,), 64, chunk=8)
    dead = weights[0] == 0
    student.hidden[dead], teacher.hidden[dead] = junk, junk
    value, _, gradient = fused((forward_kl(),), student, teacher, targets, weights, (1.0,), 64, chunk=8)
    assert value == clean[0]
    for got, want in zip(gradient, clean[2], strict=True):
        np.testing.assert_array_equal(got, want)
    assert not gradient[0][dead].any()


def test_all_weights_zero_is_zero():
    student, teacher, targets, weights = problem()
    value, _, gradient = fused((reverse_kl(),), student, teacher, targets, weights * 0, (1.0,), 64)
    assert value == 0
    assert not any(g.any() for g in gradient)


def test_impossible_teacher_token_is_dear_but_finite():
    student, teacher, targets, weights = problem()
    bias = np.zeros(64)
    bias[7] = -np.inf
    teacher = teacher._replace(bias=bias)
    value, fields, gradient = fused((reverse_kl(),), student, teacher, targets, weights, (1.0,), 64)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradient)
    assert fields.max() < -LOG_FLOOR
    # The gradient passes through the floor: the student is pushed off the impossible token.
    assert gradient[2][7] > 0


def test_student_at_the_floor_still_learns():
    student, teacher, targets, weights = problem()
    bias = np.zeros(64)
    bias[7] = -500.0
    _, _, gradient = fused((forward_kl(),), student._replace(bias=bias), teacher, targets, weights, (1.0,), 64)
    assert gradient[2][7] < 0


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_zero_with_no_gradient_at_equality(name):
    student, _, targets, weights = problem(columns=64)
    value, fields, gradient = fused((FAMILY[name],), student, student, targets, weights, (1.5,), 60)
    assert abs(value) < 1e-5
    assert np.abs(fields).max() < 1e-6
    assert max(np.abs(g).max() for g in gradient) < 1e-6


def test_bfloat16_operands_accumulate_in_float32():
    student, teacher, targets, weights = problem(tokens=64, width=64, teacher_width=64, columns=2048)
    student, teacher = cast((student, teacher), jnp.bfloat16)
    arguments = (jnp.asarray(targets), jnp.asarray(weights, jnp.float32), (1.0,))

    def value(hidden, unembed):
        return linear_divergence((forward_kl(),), Head(hidden, unembed), teacher, *arguments, vocab=2048, chunk=16)[0]

    total, (dhidden, dunembed) = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(
        student.hidden, student.unembed.astype(jnp.float32)
    )
    exact = dense((forward_kl(),), cast(student, np.float32), cast(teacher, np.float32), targets, weights, (1.0,), 2048)
    np.testing.assert_allclose(total, exact[0], rtol=1e-4)  # the same rounded inputs: only the sums may differ
    assert dhidden.dtype == jnp.bfloat16
    assert dunembed.dtype == jnp.float32
    assert np.linalg.norm(dunembed - exact[2][1]) / np.linalg.norm(exact[2][1]) < 5e-3


def test_value_is_linear_in_the_weights():
    student, teacher, targets, weights = problem(terms=2)
    student, teacher = cast((student, teacher), jnp.float32)
    weights = jnp.asarray(weights, jnp.float32)

    def value(weights):
        terms = (forward_kl(), next_token())
        return linear_divergence(terms, student, teacher, jnp.asarray(targets), weights, (1.0, 1.0), vocab=64)

    (total, fields), slope = jax.value_and_grad(value, has_aux=True)(weights)
    np.testing.assert_allclose(slope, fields, rtol=1e-6)
    np.testing.assert_allclose(value(3 * weights)[0], 3 * total, rtol=1e-5)


def test_permuting_tokens_permutes_fields():
    student, teacher, targets, weights = problem()
    order = np.random.default_rng(3).permutation(24)
    _, fields, _ = fused((forward_kl(),), student, teacher, targets, weights, (1.0,), 64, chunk=8)
    mixed = [Head(h.hidden[order], h.unembed) for h in (student, teacher)]
    _, shuffled, _ = fused((forward_kl(),), *mixed, targets[order], weights[:, order], (1.0,), 64, chunk=8)
    np.testing.assert_allclose(shuffled, fields[:, order], rtol=1e-5, atol=1e-6)


def test_jsd_limits_are_the_two_kls():
    student, teacher, targets, weights = problem()
    beta = 1e-9
    rest = (student, teacher, targets, weights, (1.0,), 64)
    forward, backward = (dense((d,), *rest)[1] for d in (forward_kl(), reverse_kl()))
    np.testing.assert_allclose(dense((generalized_jsd(beta),), *rest)[1] / beta, forward, rtol=1e-3)
    np.testing.assert_allclose(dense((generalized_jsd(1 - beta),), *rest)[1] / beta, backward, rtol=1e-3)


def test_clear_errors():
    student, teacher, targets, weights = problem()
    student, teacher = cast((student, teacher), jnp.float32)
    call = lambda *a, **k: linear_divergence(*a, jnp.asarray(targets), jnp.asarray(weights), (1.0,), **k)
    with pytest.raises(ValueError, match="unknown kernel implementation 'cuda'; there are reference, xla"):
        call((forward_kl(),), student, teacher, vocab=64, implementation="cuda")
    with pytest.raises(ValueError, match="no teacher head"):
        call((forward_kl(),), student, None, vocab=64)
    with pytest.raises(ValueError, match="64 and 48 columns"):
        call((forward_kl(),), student, teacher._replace(unembed=teacher.unembed[:, :48]), vocab=48)
    with pytest.raises(ValueError, match="true vocabulary is 65"):
        call((forward_kl(),), student, teacher, vocab=65)
    with pytest.raises(ValueError, match="0 < beta < 1"):
        generalized_jsd(1.0)


def test_chunks_fit_the_budget_and_spread_evenly():
    assert chunk_size(512, 49152, budget=10**9) == 512
    assert chunk_size(512, 49152, budget=4 * 5 * 49152 * 400) == 256
    assert chunk_size(3, 10**9) == 8
