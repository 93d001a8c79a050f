"""Differentiable per-token values: their gradient is `linear_divergence`'s with the cotangent as weights."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import FAMILY, cast, dense, fused, problem, sampled, topk

from jaxkd.core.sharding import make_mesh
from jaxkd.core.types import Ensemble, Head
from jaxkd.kernels.api import linear_divergence, token_values
from jaxkd.kernels.mesh import Axes
from jaxkd.losses import divergences as d
from jaxkd.losses.distill import distill

VOCAB = 51


def setting(mesh):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(*mesh))


def pulled(terms, student, teacher, targets, cotangent, mesh=None, chunk=8):
    """Values and the gradient of sum(cotangent * values), in float32."""
    student, teacher = cast((student, teacher), jnp.float32)
    with setting(mesh):

        @jax.jit
        def run(student, teacher, targets, cotangent):
            make = functools.partial(token_values, terms, vocab=VOCAB, chunk=chunk)
            values, pull = jax.vjp(lambda s: make(s, teacher, targets), student)
            return values, pull(cotangent)[0]

        return jax.tree.map(
            np.asarray, run(student, teacher, jnp.asarray(targets), jnp.asarray(cotangent, jnp.float32))
        )


def signals(teacher):
    rng = np.random.default_rng(5)
    other = Head(rng.normal(size=(24, 8)), rng.normal(size=(8, 64)))
    share = rng.dirichlet((1.0, 1.0), size=24)
    blend = lambda geometric: Ensemble((teacher, other), share, geometric=geometric)
    return {"head": teacher, "top_k": topk(teacher, 6, VOCAB), "averaged": blend(False), "geometric": blend(True)}


@pytest.mark.parametrize("mesh", [None, (4, 2)])
@pytest.mark.parametrize("kind", ["head", "top_k", "averaged", "geometric"])
def test_values_and_gradient_match_dense_float64(kind, mesh):
    student, teacher, targets, _ = problem(columns=64)
    signal, targets = signals(teacher)[kind], targets % VOCAB
    some = FAMILY if kind == "head" else ("forward_kl", "reverse_kl", "renyi", "decoupled_kd", "smoothed")
    terms = tuple(FAMILY[name] for name in some)
    cotangent = np.random.default_rng(7).normal(size=(len(terms), 24))  # of both signs
    cotangent[:, 5:9] = 0.0
    values, gradient = pulled(terms, student, signal, targets, cotangent, mesh, 2 if mesh else 8)
    _, fields, (hidden, unembed, _) = dense(terms, student, signal, targets, cotangent, (1.0,) * len(terms), VOCAB)
    np.testing.assert_allclose(values, fields, rtol=2e-5, atol=2e-6)
    for got, want in ((gradient.hidden, hidden), (gradient.unembed, unembed)):
        assert np.linalg.norm(got - want) < 3e-6 * np.linalg.norm(want)
    assert not gradient.unembed[:, VOCAB:].any()
    assert not gradient.hidden[5:9].any()


def test_draws_and_temperatures():
    student, teacher, targets, _ = problem(columns=64)
    student, teacher = cast((student, teacher), jnp.float32)
    draws = sampled(teacher, 8, 64)
    for signal, terms, temperatures in (
        (draws, (d.cross_entropy(),), (1.0,)),
        (teacher, (d.forward_kl(), d.reverse_kl()), (2.0, 0.5)),
    ):
        values = token_values(terms, student, signal, jnp.asarray(targets), temperatures, vocab=64)
        weight = jnp.ones((len(terms), 24))
        _, fields = linear_divergence(terms, student, signal, jnp.asarray(targets), weight, temperatures, vocab=64)
        np.testing.assert_array_equal(values, fields)


def test_gradient_equals_linear_divergence_with_the_cotangent_as_weights():
    student, teacher, targets, _ = problem(columns=64)
    terms, cotangent = (d.forward_kl(), d.next_token()), np.random.default_rng(3).normal(size=(2, 24))
    _, gradient = pulled(terms, student, teacher, targets % VOCAB, cotangent)
    _, _, fast = fused(terms, student, teacher, targets % VOCAB, cotangent, (1.0, 1.0), VOCAB, chunk=8)
    np.testing.assert_array_equal(gradient.hidden, fast[0])
    np.testing.assert_array_equal(gradient.unembed, fast[1])


def test_nan_where_the_cotangent_is_zero_changes_nothing():
    student, teacher, targets, _ = problem(columns=64)
    cotangent = np.ones((1, 24))
    cotangent[:, [2, 11]] = 0.0
    _, clean = pulled((d.forward_kl(),), student, teacher, targets % VOCAB, cotangent)
    student.hidden[[2, 11]], teacher.hidden[[2, 11]] = np.nan, np.inf
    _, junk = pulled((d.forward_kl(),), student, teacher, targets % VOCAB, cotangent)
    np.testing.assert_array_equal(junk.unembed, clean.unembed)


def test_frozen_head_has_no_gradient_product():
    student, teacher, targets, _ = problem(columns=64)
    student, teacher = cast((student, teacher), jnp.float32)
    loss = lambda hidden: token_values(
        (d.forward_kl(),), student._replace(hidden=hidden), teacher, jnp.asarray(targets), vocab=64, chunk=8
    ).sum()
    text = str(jax.make_jaxpr(jax.grad(loss))(student.hidden))
    assert text.count("dot_general") == 5  # two forward; both again and that of d hidden backward


def test_memory_does_not_grow_with_tokens():
    def temporaries(tokens):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 16), (16, 512), (tokens, 24), (24, 512))]
        targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

        def loss(hidden, unembed, teacher, unembed_t, targets):
            heads = Head(hidden, unembed), Head(teacher, unembed_t)
            values = token_values((d.forward_kl(),), *heads, targets, vocab=500, chunk=64)
            return jnp.tanh(values.sum())

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    grown = temporaries(4096) - temporaries(1024)
    assert grown < 3072 * 512 * 4 / 8  # an eighth of the additional logits


# ------------------------------------------------------------------- losses that are not linear in the tokens

ROWS, LENGTH, WIDTH = 4, 12, 16


def pairs(seed=0):
    """Rows of two segments, the preferred answer (1) and the other one (2), and two heads."""
    rng = np.random.default_rng(seed)
    hidden = lambda: jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    unembed = lambda: jnp.asarray(rng.normal(size=(WIDTH, 64)) * 0.5, jnp.float32)
    segments = jnp.asarray(np.repeat([[1] * 5 + [2] * 6 + [0]], ROWS, 0))
    weights = jnp.where((segments > 0) & (jnp.arange(LENGTH) % 5 != 0), 1.0, 0.0)  # prompts have no weight
    targets = jnp.asarray(rng.integers(0, VOCAB, size=(ROWS, LENGTH)))
    return Head(hidden(), unembed()), Head(hidden(), unembed()), targets, weights, segments


def plain_log_probs(head, targets):
    z = (head.hidden @ head.unembed)[..., :VOCAB]
    return jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0]


def fused_log_probs(head, targets):
    return -token_values((d.next_token(),), head, None, targets, vocab=VOCAB, chunk=8)[0]


def dpo(log_probs, policy, reference, targets, weights, segments, beta=0.3):
    """-log sigmoid(beta (margin of the policy - margin of the reference)): arXiv 2305.18290, equation 7."""
    sequence = lambda head, which: (log_probs(head, targets) * weights * (segments == which)).sum(-1)
    margin = lambda head: sequence(head, 1) - sequence(head, 2)
    return -jax.nn.log_sigmoid(beta * (margin(policy) - jax.lax.stop_gradient(margin(reference)))).mean()


def clipped_ratio(log_probs, policy, old, targets, weights, segments, epsilon=0.2):
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon) A): arXiv 1707.06347, equation 7."""
    advantage = jnp.where(segments == 1, 1.5, -0.5)
    ratio = jnp.exp(log_probs(policy, targets) - jax.lax.stop_gradient(log_probs(old, targets)))
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)
    return -(jnp.minimum(ratio * advantage, clipped * advantage) * weights).sum() / weights.sum()


@pytest.mark.parametrize("mesh", [None, (4, 2)])
@pytest.mark.parametrize("loss", [dpo, clipped_ratio])
def test_dpo_and_clipped_ratio_match_dense(loss, mesh):
    policy, other, *batch = pairs()
    other = jax.tree.map(lambda a, b: a + 0.1 * b, policy, other)  # ratios above and below the clip
    wanted = jax.value_and_grad(functools.partial(loss, plain_log_probs))(policy, other, *batch)
    with setting(mesh):
        got = jax.jit(jax.value_and_grad(functools.partial(loss, fused_log_probs)))(policy, other, *batch)
    assert abs(float(got[0]) - float(wanted[0])) < 1e-6
    for mine, plain in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert np.linalg.norm(mine - plain) < 2e-6 * np.linalg.norm(plain)


# ------------------------------------------------------------------------ meshes with axes of other names


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (2, 4)])
def test_distill_on_a_mesh_with_other_axis_names(fsdp, tensor):
    student, teacher, targets, weights = problem(columns=64)
    arguments = ((d.reverse_kl(),), student, teacher, targets, 4.0 * weights / weights.sum(), (2.0,), VOCAB)
    value, _, (hidden, unembed, _) = dense(*arguments)
    mesh = jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    student, teacher = cast((student, teacher), jnp.float32)

    def loss(student, teacher, weights, **more):
        return distill(student, teacher, weights, divergence=d.reverse_kl(), temperature=2.0, vocab=VOCAB, **more)

    weights = jnp.asarray(weights[0], jnp.float32)
    run = jax.jit(jax.value_and_grad(functools.partial(loss, axes=Axes(tokens=("fsdp",), vocab="tensor"))))
    with jax.set_mesh(mesh):
        got, gradient = run(student, teacher, weights)
        with pytest.raises(ValueError, match="fsdp="):
            loss(student, teacher, weights)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for mine, wanted in ((gradient.hidden, hidden), (gradient.unembed, unembed)):
        assert np.linalg.norm(mine - wanted) < 2e-6 * np.linalg.norm(wanted)


def test_distill_without_weight_is_zero():
    student, teacher, _, _ = problem(columns=64)
    loss = lambda student: distill(student, cast(teacher, jnp.float32), jnp.zeros(24))
    value, gradient = jax.value_and_grad(loss)(cast(student, jnp.float32))
    assert value == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
