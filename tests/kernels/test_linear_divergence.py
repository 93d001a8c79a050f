"""The fused kernel against the dense form in float64: value, fields and every gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import FAMILY, ZERO_AT_EQUALITY, cast, close, dense, each_alone, fused, problem

from jaxkd.core.sharding import make_mesh
from jaxkd.core.types import LOG_FLOOR, Head
from jaxkd.kernels.api import chunk_size, linear_divergence
from jaxkd.losses.divergences import forward_kl, generalized_jsd, next_token, reverse_kl, z_loss


# Chunk sizes: one chunk, divisors, with a remainder, larger than the tokens. Columns beyond the vocabulary are masked.
@pytest.mark.parametrize(
    ("vocab", "temperature", "chunk"),
    [
        (51, 2.5, 8),
        (51, 1.0, 10),
        *[pytest.param(64, *case, marks=pytest.mark.slow) for case in ((1.0, 24), (2.5, 40))],
    ],
)
def test_each_matches_dense_float64(vocab, temperature, chunk):
    student, teacher, targets, one = problem(columns=64)
    terms, temperatures = family(temperature)
    for weights in each_alone(len(terms), one):
        arguments = (terms, student, teacher, targets % vocab, weights, temperatures, vocab)
        close(fused(*arguments, chunk=chunk), dense(*arguments), weights != 0)


def family(temperature):
    """Every term and its temperature (1 for z-loss)."""
    return tuple(FAMILY.values()), tuple(1.0 if term.normaliser else temperature for term in FAMILY.values())


@pytest.mark.parametrize(
    ("data", "model", "vocab", "temperature"),
    [
        (4, 2, 51, 1.0),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 1, 64, 1.0), (1, 8, 51, 2.0))],
    ],
)
def test_each_sharded_matches_dense_float64(data, model, vocab, temperature):
    student, teacher, targets, one = problem(columns=64)
    mesh, (terms, temperatures) = make_mesh(data, model), family(temperature)
    for weights in each_alone(len(terms), one):
        arguments = (terms, student, teacher, targets % vocab, weights, temperatures, vocab)
        close(fused(*arguments, chunk=2, mesh=mesh), dense(*arguments), weights != 0)


@pytest.mark.parametrize(
    ("mesh", "vocab"),
    [
        (None, 51),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in ((None, 64), ((4, 2), 51), ((1, 8), 51))],
    ],
)
def test_standardised_logits(mesh, vocab):
    student, teacher, targets, one = problem(columns=64)
    terms = tuple(term for term in FAMILY.values() if not term.normaliser)
    mesh, more = None if mesh is None else make_mesh(*mesh), {"standardized": (True,) * len(terms)}
    for weights in each_alone(len(terms), one):
        arguments = (terms, student, teacher, targets % vocab, weights, (2.0,) * len(terms), vocab)
        close(fused(*arguments, chunk=4, mesh=mesh, **more), dense(*arguments, **more), weights != 0)


@pytest.mark.parametrize(
    ("mesh", "standard"),
    [
        (None, True),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in ((None, False), ((4, 2), False), ((1, 8), True))],
    ],
)
def test_infinite_logits_match_dense_float64(mesh, standard):
    """A teacher with logits of -inf: large finite values, equal in both implementations."""
    student, teacher, targets, one = problem(columns=64)
    bias = np.zeros(64)
    bias[[7, 40]] = -np.inf
    teacher = teacher._replace(bias=bias)
    terms = tuple(term for term in FAMILY.values() if not term.normaliser)
    mesh, more = None if mesh is None else make_mesh(*mesh), {"standardized": (standard,) * len(terms)}
    for weights in each_alone(len(terms), one):
        arguments = (terms, student, teacher, targets % 51, weights, (1.0,) * len(terms), 51)
        expected = dense(*arguments, **more)
        close(fused(*arguments, chunk=4, mesh=mesh, **more), expected, weights != 0)


def test_several_terms_share_one_call():
    names = list(FAMILY)
    student, teacher, targets, weights = problem(terms=len(names))
    cycle = itertools.cycle((1.0, 2.0))
    temperatures = tuple(1.0 if term.normaliser else next(cycle) for term in FAMILY.values())
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


def test_padded_columns_have_zero_probability_and_gradient():
    student, teacher, targets, weights = problem(terms=2)
    _, _, (_, dunembed, dbias) = fused((forward_kl(), reverse_kl()), student, teacher, targets, weights, (1.0, 1.0), 51)
    assert not dunembed[:, 51:].any()
    assert not dbias[51:].any()
    assert dunembed[:, :51].all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("junk", [1e30, np.inf, np.nan])
def test_nan_without_weight_changes_nothing(junk, softcap):
    student, teacher, targets, weights = problem()
    student, teacher = (head._replace(softcap=softcap) for head in (student, teacher))
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


def test_zero_teacher_probability_gives_a_large_finite_value():
    student, teacher, targets, weights = problem()
    bias = np.zeros(64)
    bias[7] = -np.inf
    teacher = teacher._replace(bias=bias)
    value, fields, gradient = fused((reverse_kl(),), student, teacher, targets, weights, (1.0,), 64)
    assert np.isfinite(value)
    assert fields.max() < -LOG_FLOOR
    # The gradient passes through the floor and lowers the token's probability.
    assert gradient[2][7] > 0


def test_student_at_the_floor_has_a_gradient():
    student, teacher, targets, weights = problem()
    bias = np.zeros(64)
    bias[7] = -500.0
    _, _, gradient = fused((forward_kl(),), student._replace(bias=bias), teacher, targets, weights, (1.0,), 64)
    assert gradient[2][7] < 0


@pytest.mark.parametrize("name", ZERO_AT_EQUALITY)
def test_zero_with_no_gradient_at_equality(name):
    student, _, targets, weights = problem(columns=64)
    value, fields, gradient = fused((FAMILY[name],), student, student, targets, weights, (1.5,), 60)
    assert abs(value) < 1e-5
    assert np.abs(fields).max() < 1e-6
    assert max(np.abs(g).max() for g in gradient) < 1e-6


@pytest.mark.parametrize(
    ("mesh", "temperature", "vocab", "chunk"),
    [
        (None, 2.0, 1000, 8),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in (((4, 2), 1.0, 1000, 8), ((1, 8), 2.0, 1024, 12))],
    ],
)
def test_bfloat16_operands_accumulate_in_float32(mesh, temperature, vocab, chunk):
    """With equal rounded inputs only the gradient in the logits is rounded again, as an operand of products."""
    student, teacher, targets, one = problem(tokens=32, width=64, teacher_width=64, columns=1024, spread=0.5)
    student, teacher = (cast(cast(head, jnp.bfloat16), np.float32) for head in (student, teacher))
    half = [h._replace(hidden=h.hidden.astype(jnp.bfloat16)) for h in (student, teacher)]
    mesh, (terms, temperatures) = None if mesh is None else make_mesh(*mesh), family(temperature)
    for weights in each_alone(len(terms), one):
        rest = (targets % vocab, weights, temperatures, vocab)
        value, fields, gradient = fused(terms, *half, *rest, chunk=chunk, mesh=mesh, dtype=None)
        expected = dense(terms, student, teacher, *rest)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(fields[weights != 0], expected[1][weights != 0], rtol=1e-4, atol=1e-6)
        assert gradient[0].dtype == jnp.bfloat16
        assert gradient[1].dtype == jnp.float32
        for got, want in zip(gradient, expected[2], strict=True):
            assert np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want) < 4e-3


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


def test_invalid_arguments_raise():
    student, teacher, targets, weights = problem()
    student, teacher = cast((student, teacher), jnp.float32)
    call = lambda *a, **k: linear_divergence(*a, jnp.asarray(targets), jnp.asarray(weights), (1.0,), **k)
    with pytest.raises(ValueError, match="unknown kernel implementation 'cuda'; there are reference, xla, pallas_tpu"):
        call((forward_kl(),), student, teacher, vocab=64, implementation="cuda")
    with pytest.raises(ValueError, match="pallas_tpu needs a TPU that it knows, and here is 'cpu'"):
        call((forward_kl(),), student, teacher, vocab=64, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="no teacher head"):
        call((forward_kl(),), student, None, vocab=64)
    with pytest.raises(ValueError, match="64 and 48 columns"):
        call((forward_kl(),), student, teacher._replace(unembed=teacher.unembed[:, :48]), vocab=48)
    with pytest.raises(ValueError, match="true vocabulary is 65"):
        call((forward_kl(),), student, teacher, vocab=65)
    with pytest.raises(ValueError, match="0 < beta < 1"):
        generalized_jsd(1.0)
    rest = (jnp.asarray(targets), jnp.asarray(weights))
    with pytest.raises(ValueError, match="1 terms need as many temperatures, got 2"):
        linear_divergence((forward_kl(),), student, teacher, *rest, (1.0, 2.0), vocab=64)
    with pytest.raises(ValueError, match=r"there are \(24,\) targets, but \(23,\) tokens of the teacher's signal"):
        call((forward_kl(),), student, teacher._replace(hidden=teacher.hidden[1:]), vocab=64)
    with pytest.raises(ValueError, match=r"\(z_loss\) is for temperature 1"):
        linear_divergence((z_loss(),), student, None, *rest, (2.0,), vocab=64)
    with pytest.raises(ValueError, match="cannot be standardised"):
        linear_divergence((z_loss(),), student, None, *rest, (1.0,), vocab=64, standardized=(True,))
    fewer = [x[..., :23] for x in rest]
    with jax.set_mesh(make_mesh(8, 1)), pytest.raises(ValueError, match="do not divide over data=8 x model=1"):
        linear_divergence((next_token(),), student._replace(hidden=student.hidden[:23]), None, *fewer, (1.0,), vocab=64)
    other = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(other), pytest.raises(ValueError, match="this mesh has fsdp=8"):
        call((forward_kl(),), student, teacher, vocab=64)


def test_chunks_fit_the_budget_and_divide_the_tokens():
    room = lambda tokens: 4 * 3 * 49152 * tokens  # three float32 arrays of a chunk
    size = lambda tokens, budget, width=1024: chunk_size(tokens, 49152, width, budget)
    assert size(512, 10**9) == 512
    assert size(4096, 10**9) == 512  # limited by the head's width
    assert size(4096, 10**9, width=64) == 256  # the minimum limit
    assert size(4096, 10**9, width=4096) == 1024
    assert size(512, room(400)) == 256
    assert size(8192, room(344)) == 256  # a divisor; 344 is not
    assert size(1000, room(344)) == 200
    assert size(1016, room(344)) == 344  # 8 x 127 has no such divisor: three equal blocks
    assert size(8192, 0, width=3 * 512) == 512  # the budget is at least the head's gradient
    assert chunk_size(3, 10**9, 64, 0) == 8


def test_memory_does_not_grow_with_tokens():
    """Beyond the head's gradient, temporary memory is a few chunks' logits."""
    columns, width = 4096, 32

    def temporary(tokens, terms):
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)

        def value(hidden, unembed, teacher_hidden, teacher_unembed, targets):
            weights = jnp.ones((len(terms), tokens))
            heads = Head(hidden, unembed), Head(teacher_hidden, teacher_unembed)
            return linear_divergence(terms, *heads, targets, weights, (1.0,) * len(terms), vocab=columns, chunk=64)[0]

        arguments = (shape(tokens, width), shape(width, columns), shape(tokens, width), shape(width, columns))
        step = jax.jit(jax.value_and_grad(value, (0, 1)))
        compiled = step.lower(*arguments, jax.ShapeDtypeStruct((tokens,), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    both = forward_kl(), next_token()
    few, many, alone = temporary(256, both), temporary(4096, both), temporary(256, both[:1])
    assert many < 1.03 * few
    assert few < alone + 2 * 4 * 64 * columns
    assert many < 4 * width * columns + 6 * 4 * 64 * columns
