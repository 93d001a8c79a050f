"""Defects of other libraries as regression tests; expected values are computed here in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.core import schedules
from jaxkd.core.types import Batch, Head, Output, TopK
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import objective as objectives
from jaxkd.losses.divergences import (
    conditional_kl,
    forward_kl,
    generalized_jsd,
    next_token,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)

TOKENS, WIDTH, VOCAB = 16, 8, 32


def head(logits) -> Head:
    """A head with the given logits."""
    logits = jnp.asarray(logits, jnp.float32)
    return Head(logits, jnp.eye(logits.shape[-1], dtype=jnp.float32))


def total(term, student: Head, teacher, targets=None, weights=None, **options) -> jax.Array:
    """Sum over tokens; weights default to one."""
    count = student.hidden.shape[0]
    targets = jnp.zeros(count, jnp.int32) if targets is None else jnp.asarray(targets)
    weights = jnp.ones(count) if weights is None else jnp.asarray(weights, jnp.float32)
    options = {"vocab": student.unembed.shape[1], **options}
    return linear_divergence((term,), student, teacher, targets, weights[None], (1.0,), **options)[0]


def value(*arguments, weights=None, **options) -> float:
    """Mean over the tokens with weight."""
    count = arguments[1].hidden.shape[0] if weights is None else weights.sum()
    return float(total(*arguments, weights=weights, **options) / count)


def probabilities(logits) -> np.ndarray:
    z = np.exp(np.float64(logits) - np.max(logits, -1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def kl(p, q) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def logits(seed=0, tokens=TOKENS, spread=2.0) -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher."""
    return tuple(np.random.default_rng(seed).normal(size=(2, tokens, VOCAB)) * spread)


@pytest.mark.parametrize("term", [forward_kl(), next_token()])
def test_padding_changes_nothing(term):
    """tunix divides by padded positions: 16 tokens padded to 64 turned a loss of 6.278 into 1.495."""
    student, teacher = logits()
    targets = np.arange(TOKENS) % VOCAB
    plain = value(term, head(student), head(teacher), targets)
    pad = lambda x: np.concatenate([x, np.full((3 * TOKENS, *x.shape[1:]), 7, x.dtype)])
    weights = np.repeat([1.0, 0.0], [TOKENS, 3 * TOKENS])
    padded = value(term, head(pad(student)), head(pad(teacher)), pad(targets), weights=weights)
    assert padded == pytest.approx(plain, rel=1e-6)


def test_student_without_mass_in_the_top_k_is_penalised():
    """tunix and MaxText renormalise both distributions on the stored entries, so this student has loss 0."""
    k = 4
    teacher = np.zeros((1, VOCAB))
    teacher[:, :k] = 6.0
    student = np.zeros((1, VOCAB))
    student[:, :k] = -14.0
    p, q = probabilities(teacher), probabilities(student)
    assert q[0, :k].sum() < 1e-6
    stored = TopK(
        jnp.arange(k, dtype=jnp.int32)[None],
        jnp.asarray(np.log(p[:, :k]), jnp.float32),
        jnp.asarray(np.log(p[:, k:].sum(-1, keepdims=True)), jnp.float32),
    )
    bucket = value(forward_kl(), head(student), stored)
    full = kl(p, q).mean()
    assert full > 10
    assert bucket == pytest.approx(full, rel=1e-5)  # both are uniform over the tail, so bucketing is exact
    assert value(conditional_kl(), head(student), stored) == pytest.approx(0, abs=1e-6)

    slope = jax.grad(lambda z: total(forward_kl(), head(z), stored))(jnp.float32(student))
    assert slope[0, :k].sum() < -0.9


def test_beta_is_the_weight_of_the_teacher():
    """EasyDeL's beta is reversed, with another mixture: at 0.1 its value is 1.296, the paper's 0.184."""
    student, teacher = logits()
    p, q = probabilities(teacher), probabilities(student)
    ours = {beta: value(generalized_jsd(beta, "kl"), head(student), head(teacher)) for beta in (0.0, 0.1, 0.5, 1.0)}
    paper = lambda b: (b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q)).mean()
    theirs = lambda b: (b * kl(p, (1 - b) * p + b * q) + (1 - b) * kl(q, (1 - b) * p + b * q)).mean()
    assert ours[0.1] == pytest.approx(paper(0.1), rel=1e-5)
    assert ours[0.5] == pytest.approx(paper(0.5), rel=1e-5) == theirs(0.5)
    assert theirs(0.1) > 3 * paper(0.1)
    assert ours[0.0] == pytest.approx(kl(p, q).mean(), rel=1e-5)
    assert ours[1.0] == pytest.approx(kl(q, p).mean(), rel=1e-5)
    # The equivalent of docs/losses.md:
    skewed = [value(term, head(student), head(teacher)) for term in (skew_kl(0.9), skew_reverse_kl(0.1))]
    assert 0.1 * skewed[0] + 0.9 * skewed[1] == pytest.approx(theirs(0.1), rel=1e-5)


def test_distillms_arguments():
    """js_distance(lam) weighs the student with lam; symmetric_kl(lam) the reverse KL."""
    student, teacher = logits(1)
    p, q = probabilities(teacher), probabilities(student)
    m = 0.1 * p + 0.9 * q
    theirs = (0.9 * kl(q, m) + 0.1 * kl(p, m)).mean()
    assert value(generalized_jsd(1 - 0.9), head(student), head(teacher)) == pytest.approx(theirs, rel=1e-5)


def test_hard_labels_are_the_next_token():
    """EasyDeL compares the logits at t with the token at t."""
    tokens = np.random.default_rng(0).permutation(TOKENS)
    copies = 20.0 * np.eye(VOCAB)[tokens[:-1]]
    predicts = 20.0 * np.eye(VOCAB)[tokens[1:]]
    assert value(next_token(), head(predicts), None, tokens[1:]) < 1e-3
    assert value(next_token(), head(copies), None, tokens[1:]) > 19


def _rounded(tokens: int, columns: int, width: int = 64):
    """Heads in bfloat16, and the exact KLs of the rounded numbers."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    heads = [Head(normal(tokens, width), normal(width, columns) / 4) for _ in range(2)]
    return heads, [probabilities(np.float64(h.hidden) @ np.float64(h.unembed)) for h in heads]


def test_bfloat16_activations_are_summed_in_float32():
    """EasyDeL sums in the activations' dtype: 8.6875 for 8.5536 over 64 chunks, and a user's KL below zero."""
    (student, teacher), (q, p) = _rounded(512, 1024)
    for term, exact in ((forward_kl(), kl(p, q)), (reverse_kl(), kl(q, p))):
        assert value(term, student, teacher, chunk=8) == pytest.approx(exact.mean(), rel=1e-5)
    _, fields = linear_divergence(
        (forward_kl(),), student, student, jnp.zeros(512, jnp.int32), jnp.ones((1, 512)), (1.0,), vocab=1024, chunk=8
    )
    assert fields.dtype == jnp.float32
    assert jnp.abs(fields).max() < 1e-6


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunks_change_nothing(chunk):
    student, teacher = logits(2)
    whole = value(reverse_kl(), head(student), head(teacher), chunk=TOKENS)
    assert value(reverse_kl(), head(student), head(teacher), chunk=chunk) == pytest.approx(whole, rel=1e-6)


def test_memory_does_not_grow_with_tokens():
    """TRL's tile of 4,096 x 32,768 has all logits of a typical device batch."""

    def temporary(tokens: int) -> int:
        struct = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
        arrays = struct(tokens, WIDTH), struct(WIDTH, 4096), struct(tokens, WIDTH), struct(WIDTH, 4096)
        vectors = struct(tokens, dtype=jnp.int32), struct(1, tokens)

        def loss(hidden, unembed, teacher_hidden, teacher_unembed, targets, weights):
            teacher = Head(teacher_hidden, teacher_unembed)
            options = {"vocab": 4096, "chunk": 64}
            return linear_divergence(
                (forward_kl(),), Head(hidden, unembed), teacher, targets, weights, (1.0,), **options
            )[0]

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays, *vectors).compile()
        return program.memory_analysis().temp_size_in_bytes

    few, many = temporary(512), temporary(4096)
    per_token = (many - few) / (4096 - 512)
    assert many < 4 * 4096 * 4096 / 4, "a quarter of one [tokens, vocabulary] array"
    assert per_token < 4 * 4 * WIDTH, f"{per_token} bytes a token, of which the vocabulary must have no part"


def test_padded_vocabularies_have_no_probability():
    """Padded columns in the softmax would give mass to ids without a token."""
    student, teacher = logits(3)
    true = VOCAB - 5
    exact = kl(probabilities(teacher[:, :true]), probabilities(student[:, :true])).mean()
    assert value(forward_kl(), head(student), head(teacher), vocab=true) == pytest.approx(exact, rel=1e-5)


def test_the_teacher_has_no_backward_pass():
    """EasyDeL's FLOP count includes one."""
    student, teacher = (head(z) for z in logits())
    slope = jax.grad(lambda t: total(forward_kl(), student, t))(teacher)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_weight_may_start_at_zero():
    """MaxText rejects a weight that starts at 0."""
    grows = schedules.linear(1.0, 10, warmup=4)
    objective = objectives.objective(
        {"kd": (grows, objectives.match(forward_kl())), "ce": (1.0, objectives.next_token())},
        vocab=VOCAB,
        domains=("a",),
    )
    assert objective.uses_teacher
    student, teacher = (Output(Head(h.hidden[None], h.unembed), {}) for h in map(head, logits()))
    whole = jnp.zeros((1, TOKENS), jnp.int32)
    batch = Batch(whole, whole, jnp.ones((1, TOKENS)), whole + 1, whole, whole[:, 0], whole[:, 0])
    loss = lambda step: objective.loss({}, student, teacher, batch, jnp.asarray(step))
    (first, metrics), (later, _) = loss(0), loss(3)
    kd, ce = (float(metrics[name][0]) for name in ("kd", "ce"))
    assert float(first) == pytest.approx(ce + float(grows(0)) * kd, rel=1e-6)
    assert float(later) == pytest.approx(ce + float(grows(3)) * kd, rel=1e-6)
    assert float(later) > float(first) > 0
