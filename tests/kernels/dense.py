"""Small test problems for the loss kernels, solved by the float64 dense form and by the fused one."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import Head, Sampled, TopK
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences as d

# Every divergence, with settings for all branches.
FAMILY = {
    "forward_kl": d.forward_kl(),
    "reverse_kl": d.reverse_kl(),
    "cross_entropy": d.cross_entropy(),
    "mixed_kl": d.mixed_kl(0.9),
    "jeffreys": d.jeffreys(),
    "adaptive_kl": d.adaptive_kl(0.5),
    "jsd_0.1": d.generalized_jsd(0.1),
    "jsd_0.5": d.generalized_jsd(0.5),
    "jsd_scaled": d.generalized_jsd(0.9, "scaled"),
    "skew_kl": d.skew_kl(0.1),
    "skew_reverse_kl": d.skew_reverse_kl(0.1),
    "total_variation": d.total_variation(),
    "squared_hellinger": d.squared_hellinger(),
    "alpha_beta": d.alpha_beta(0.2, 0.7),
    "alpha_beta_1_0": d.alpha_beta(1.0, 0.0),
    "alpha_beta_0_0.5": d.alpha_beta(0.0, 0.5),
    "alpha_beta_0.5_-0.5": d.alpha_beta(0.5, -0.5),
    "alpha_beta_0_0": d.alpha_beta(0.0, 0.0),
    "alpha_divergence": d.alpha_divergence(0.3),
    "renyi": d.renyi(0.5),
    "renyi_2": d.renyi(2.0),
    "decoupled_kd": d.decoupled_kd(1.0, 2.0),
    "decoupled_topk": d.decoupled_topk(4, 1.0, 0.5),
    "generalized_kl": d.generalized_kl(4),
    "generalized_reverse_kl": d.generalized_reverse_kl(4),
    "sampled_tail": d.generalized_reverse_kl(4, sampled_tail=True),
    "skew_detached": d.skew_reverse_kl(0.3, detach=True),
    "sampled_reverse_kl": d.sampled_reverse_kl(baseline=True),
    "next_token": d.next_token(),
    "smoothed": d.next_token(0.1),
    "z_loss": d.z_loss(),
}
ZERO_AT_EQUALITY = [
    name
    for name in FAMILY
    if name not in ("cross_entropy", "next_token", "smoothed", "z_loss", "sampled_tail", "sampled_reverse_kl")
]
STORED = {name: FAMILY[name] for name in FAMILY} | {
    "partial_kl": d.partial_kl(),
    "conditional_kl": d.conditional_kl(),
    "renormalized_kl": d.renormalized_kl(),
}


def problem(seed=0, tokens=24, width=16, teacher_width=24, columns=64, terms=1, spread=1.0):
    """Heads, targets and weights, some of them 0."""
    rng = np.random.default_rng(seed)
    student = Head(rng.normal(size=(tokens, width)) * spread, rng.normal(size=(width, columns)) * 0.5)
    teacher = Head(rng.normal(size=(tokens, teacher_width)) * spread, rng.normal(size=(teacher_width, columns)) * 0.5)
    weights = rng.uniform(0.1, 2.0, size=(terms, tokens))
    weights[:, 3] = 0.0
    weights[:, tokens // 2 :: 5] = 0.0
    return student, teacher, rng.integers(0, columns - 16, size=tokens), weights


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def topk(teacher: Head, k: int, vocab: int, temperatures=(1.0,)) -> TopK:
    """The k largest entries of a teacher's head, and the tail's mass at each temperature, in float64."""
    z = (np.float64(teacher.hidden) @ np.float64(teacher.unembed))[:, :vocab]
    ids = np.argsort(-z, axis=-1)[:, :k]
    rest = np.ones_like(z, bool)
    np.put_along_axis(rest, ids, False, axis=-1)
    tails = [np.log(np.where(rest, np.exp(log_softmax(z / t)), 0).sum(-1)) for t in temperatures]
    return TopK(ids.astype(np.int32), np.take_along_axis(log_softmax(z), ids, -1), np.stack(tails, -1))


def sampled(teacher: Head, draws: int, vocab: int, seed=0) -> Sampled:
    """Draws from the teacher, the distinct ones first; padding repeats a drawn id."""
    p = np.exp(log_softmax((np.float64(teacher.hidden) @ np.float64(teacher.unembed))[:, :vocab]))
    counts = np.random.default_rng(seed).multinomial(draws, p)
    ids = np.argsort(-counts, axis=-1)[:, :draws]
    kept = np.take_along_axis(counts, ids, -1)
    return Sampled(np.where(kept > 0, ids, ids[:, :1]).astype(np.int32), kept.astype(np.int32))


def cast(tree, dtype):
    """Floating leaves cast to another dtype."""
    return jax.tree.map(lambda x: x if np.issubdtype(np.asarray(x).dtype, np.integer) else jnp.asarray(x, dtype), tree)


@functools.lru_cache
def program(terms, temperatures, vocab, chunk, implementation, more):
    """One compiled program per static configuration; weights are data."""

    @jax.jit
    def run(student, teacher, targets, weights):
        def value(hidden, unembed, bias):
            head = student._replace(hidden=hidden, unembed=unembed, bias=bias)
            return linear_divergence(
                terms, head, teacher, targets, weights, temperatures, vocab=vocab, chunk=chunk,
                implementation=implementation, **dict(more),
            )  # fmt: skip

        return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(student.hidden, student.unembed, student.bias)

    return run


def _solve(dtype, implementation, terms, student, teacher, targets, weights, temperatures, vocab, chunk, more):
    student, teacher = (student, teacher) if dtype is None else cast((student, teacher), dtype)
    dtype = dtype or jnp.float32
    if student.bias is None:
        student = student._replace(bias=jnp.zeros(student.unembed.shape[1], dtype))
    # The kernel's weights are float32; those of the reference are rounded to it.
    arguments = (student, teacher, jnp.asarray(targets), jnp.asarray(np.float32(weights), dtype))
    run = program(terms, temperatures, vocab, chunk, implementation, tuple(sorted(more.items())))
    (total, fields), gradient = run(*arguments)
    return jax.tree.map(np.asarray, (total, fields, gradient))


def dense(terms, student, teacher, targets, weights, temperatures, vocab, **more):
    """The reference in float64: (value, fields, gradients in hidden, unembed and bias)."""
    with jax.enable_x64(True):
        return _solve(
            jnp.float64, "reference", terms, student, teacher, targets, weights, temperatures, vocab, None, more
        )


def fused(
    terms, student, teacher, targets, weights, temperatures, vocab, chunk=None, mesh=None, dtype=jnp.float32, **more
):
    """The same of the kernel in float32, or in the heads' own dtype if `dtype` is None."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return _solve(dtype, None, terms, student, teacher, targets, weights, temperatures, vocab, chunk, more)


def close(actual, expected, live, tolerance=2e-6):
    """Relative L2 error per array, of fields with weight only."""
    value, fields, gradient = actual
    value_ref, fields_ref, gradient_ref = expected
    np.testing.assert_allclose(value, value_ref, rtol=tolerance * 5, atol=1e-6)
    np.testing.assert_allclose(fields[live], fields_ref[live], rtol=2e-5, atol=2e-6)
    for got, want in zip(gradient, gradient_ref, strict=True):
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)
        assert error < tolerance, error


def each_alone(terms: int, weights):
    """Weights of one term at a time."""
    for i in range(terms):
        alone = np.zeros((terms, weights.shape[1]))
        alone[i] = weights[0]
        yield alone
