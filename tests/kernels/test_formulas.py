"""Every divergence and its gradient against formulas in numpy: no `phi`, floor or kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import FAMILY, STORED, cast, fused, log_softmax, problem, topk

from jaxkd.core.types import Head
from jaxkd.kernels.api import linear_divergence

TOKENS, VOCAB = 12, 32
LOG = np.log


def kl(p, q):
    return np.sum(p * LOG(p / q), -1)


def jsd(p, q, b):
    m = b * p + (1 - b) * q
    return b * kl(p, m) + (1 - b) * kl(q, m)


def leading(p, mass=0.0, entries=0):
    """The fewest entries that hold `mass`, or the `entries` largest, by sorting each token."""
    head = np.zeros(p.shape, bool)
    for row, probabilities in enumerate(p):
        order = np.argsort(-probabilities)
        count = entries or int(np.searchsorted(np.cumsum(probabilities[order]), mass)) + 1
        head[row, order[:count]] = True
    return head


def adaptive(p, q, y, z):
    head, gap = leading(p, mass=0.5), np.abs(p - q)
    share = np.sum(gap * head, -1) / gap.sum(-1)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def binary(a, b):
    return a * LOG(a / b) + (1 - a) * LOG((1 - a) / (1 - b))


def decoupled_kd(p, q, y, z):
    hit = np.arange(p.shape[-1]) == y[:, None]
    a, b = np.sum(p * hit, -1), np.sum(q * hit, -1)
    rest_p, rest_q = (np.where(hit, 1.0, x) / (1 - s)[:, None] for x, s in ((p, a), (q, b)))
    return binary(a, b) + 2 * np.sum(np.where(hit, 0.0, rest_p * LOG(rest_p / rest_q)), -1)


def decoupled_topk(p, q, y, z):
    head = leading(p, entries=4)
    a, b = np.sum(p * head, -1), np.sum(q * head, -1)
    inside = np.sum(head * p / a[:, None] * LOG((p / a[:, None]) / (q / b[:, None])), -1)
    return binary(a, b) + 0.5 * a * inside


def at(x, y):
    return np.take_along_axis(x, y[:, None], -1)[:, 0]


def generalized(p, q, y, z, head=None):
    head = leading(p, entries=4) if head is None else head
    return np.sum(head * (p * LOG(p / q) - p + q), -1)


def generalized_reverse(p, q, y, z, head=None):
    return generalized(q, p, y, z, leading(p, entries=4) if head is None else head)


def sampled_tail(p, q, y, z, head=None):
    head = leading(p, entries=4) if head is None else head
    return np.sum(head * q * LOG(q / p), -1) + np.where(at(head, y), 0.0, LOG(at(q, y) / at(p, y)))


FORMULA = {
    "forward_kl": lambda p, q, y, z: kl(p, q),
    "reverse_kl": lambda p, q, y, z: kl(q, p),
    "cross_entropy": lambda p, q, y, z: -np.sum(p * LOG(q), -1),
    "mixed_kl": lambda p, q, y, z: 0.1 * kl(p, q) + 0.9 * kl(q, p),
    "jeffreys": lambda p, q, y, z: kl(p, q) + kl(q, p),
    "adaptive_kl": adaptive,
    "jsd_0.1": lambda p, q, y, z: jsd(p, q, 0.1),
    "jsd_0.5": lambda p, q, y, z: jsd(p, q, 0.5),
    "jsd_scaled": lambda p, q, y, z: jsd(p, q, 0.9) / 0.09,
    "skew_kl": lambda p, q, y, z: kl(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl": lambda p, q, y, z: kl(q, 0.9 * p + 0.1 * q),
    "total_variation": lambda p, q, y, z: np.abs(p - q).sum(-1) / 2,
    "squared_hellinger": lambda p, q, y, z: 1 - np.sqrt(p * q).sum(-1),
    "alpha_beta": lambda p, q, y, z: -np.sum(p**0.2 * q**0.7 - 2 / 9 * p**0.9 - 7 / 9 * q**0.9, -1) / 0.14,
    "alpha_beta_1_0": lambda p, q, y, z: kl(p, q),
    "alpha_beta_0_0.5": lambda p, q, y, z: 4 * np.sum(q**0.5 * LOG(q / p) / 2 - q**0.5 + p**0.5, -1),
    "alpha_beta_0.5_-0.5": lambda p, q, y, z: 4 * np.sum(np.sqrt(p / q) - LOG(p / q) / 2 - 1, -1),
    "alpha_beta_0_0": lambda p, q, y, z: np.sum(LOG(p / q) ** 2, -1) / 2,
    "alpha_divergence": lambda p, q, y, z: (1 - np.sum(p**0.3 * q**0.7, -1)) / 0.21,
    "renyi": lambda p, q, y, z: -2 * LOG(np.sum(np.sqrt(p * q), -1)),
    "renyi_2": lambda p, q, y, z: LOG(np.sum(p * p / q, -1)),
    "decoupled_kd": decoupled_kd,
    "decoupled_topk": decoupled_topk,
    "generalized_kl": generalized,
    "generalized_reverse_kl": generalized_reverse,
    "sampled_tail": sampled_tail,
    "skew_detached": lambda p, q, y, z: kl(q, 0.7 * p + 0.3 * q),
    "sampled_reverse_kl": lambda p, q, y, z: LOG(at(q, y) / at(p, y)),
    "next_token": lambda p, q, y, z: -LOG(at(q, y)),
    "smoothed": lambda p, q, y, z: -0.9 * LOG(at(q, y)) - 0.1 * LOG(q).mean(-1),
    "z_loss": lambda p, q, y, z: LOG(np.exp(z).sum(-1)) ** 2,
}
STOPPED = ("adaptive_kl", "sampled_tail", "skew_detached", "sampled_reverse_kl")
"""A part of them carries no gradient, so finite differences do not apply."""
HEADED = ("adaptive_kl", "decoupled_topk", "generalized_kl", "generalized_reverse_kl", "sampled_tail")


def bucketed(p, q, ids):
    """Both distributions over the stored entries and the sum of the others."""
    pick = lambda x: np.take_along_axis(x, ids, -1)
    return [np.concatenate([pick(x), 1 - pick(x).sum(-1, keepdims=True)], -1) for x in (p, q)]


def partial(p, q, ids):
    p, q = (np.take_along_axis(x, ids, -1) for x in (p, q))
    return np.sum(p * LOG(p / q), -1)


def kept(x, ids):
    return np.take_along_axis(x, ids, -1).sum(-1, keepdims=True)


SPARSE = {
    "partial_kl": partial,
    "conditional_kl": lambda p, q, ids: partial(p / kept(p, ids), q / kept(q, ids), ids),
    "renormalized_kl": lambda p, q, ids: partial(p / kept(p, ids), q, ids),
}


def sides(temperature):
    student, teacher, targets, _ = problem(3, tokens=TOKENS, columns=VOCAB, spread=1.5)
    z, z_teacher = (head.hidden @ head.unembed / temperature for head in (student, teacher))
    return student, teacher, targets, np.exp(log_softmax(z_teacher)), z


def test_every_divergence_has_a_formula():
    assert set(FORMULA) == set(FAMILY)
    assert set(SPARSE) == set(STORED) - set(FAMILY)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_match_the_formulas(temperature):
    student, teacher, targets, p, z = sides(temperature)
    q = np.exp(log_softmax(z))
    names = [name for name in FAMILY if temperature == 1 or name != "z_loss"]
    rest = (targets, np.ones((len(names), TOKENS)), (temperature,) * len(names), VOCAB)
    fields = fused(tuple(FAMILY[n] for n in names), student, teacher, *rest)[1]
    for name, field in zip(names, fields, strict=True):
        np.testing.assert_allclose(field, FORMULA[name](p, q, targets, z), rtol=2e-5, atol=2e-6, err_msg=name)


def test_gradients_match_the_formulas():
    """Central differences of the formula in the logits, along random directions."""
    _, teacher, targets, p, z = sides(1.0)
    direction, step = np.random.default_rng(5).normal(size=z.shape), 1e-5
    points = z + step * direction, z - step * direction
    flat = Head(np.eye(TOKENS), z)  # one row of logits per token, so the unembedding's gradient is theirs
    for i, name in enumerate(FAMILY):
        if name in STOPPED:
            continue
        weights = np.zeros((len(FAMILY), TOKENS))
        weights[i] = 1.0
        rest = (targets, weights, (1.0,) * len(FAMILY), VOCAB)
        slope = fused(tuple(FAMILY.values()), flat, teacher, *rest)[2][1]
        ends = [FORMULA[name](p, np.exp(log_softmax(x)), targets, x) for x in points]
        expected = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((slope * direction).sum(-1), expected, rtol=2e-4, atol=2e-5, err_msg=name)


def test_top_k_forms_match_the_formulas():
    student, teacher, targets, p, z = sides(1.0)
    q, entries = np.exp(log_softmax(z)), topk(teacher, 5, VOCAB)
    fields = fused(
        tuple(STORED.values()), student, entries, targets, np.ones((len(STORED), TOKENS)), (1.0,) * len(STORED), VOCAB
    )[1]
    over = bucketed(p, q, entries.ids)
    inside = np.arange(6) < 5  # the tail is never in the top set
    y = np.where((entries.ids == targets[:, None]).any(-1), (entries.ids == targets[:, None]).argmax(-1), 5)
    for name, field in zip(STORED, fields, strict=True):
        if name in SPARSE:
            want = SPARSE[name](p, q, entries.ids)
        elif name in ("next_token", "smoothed", "z_loss"):
            want = FORMULA[name](p, q, targets, z)
        elif name in HEADED:
            stored = np.where(inside, over[0], 0.0)
            head = leading(stored, mass=0.5) if name == "adaptive_kl" else leading(stored, entries=4)
            want = over_head(name, *over, y, head & inside)
        else:
            want = FORMULA[name](*over, y, z)
        np.testing.assert_allclose(field, want, rtol=5e-5, atol=5e-6, err_msg=name)


def over_head(name, p, q, y, head):
    """The divergences with a top set, given that set."""
    if name not in ("adaptive_kl", "decoupled_topk"):
        return FORMULA[name](p, q, y, None, head)
    if name == "adaptive_kl":
        gap = np.abs(p - q)
        share = np.sum(gap * head, -1) / gap.sum(-1)
        return share * kl(p, q) + (1 - share) * kl(q, p)
    a, b = np.sum(p * head, -1), np.sum(q * head, -1)
    cross = np.sum(np.where(head, p * LOG(p / q), 0.0), -1)
    return binary(a, b) + 0.5 * (cross - a * LOG(a / b))


def test_gradient_under_jax_transformations():
    """Under remat, scan and vmap as under jit, which mark differentiated arguments differently."""
    student, teacher, targets, weights = problem()
    student, teacher = cast((student, teacher), jnp.float32)
    student = student._replace(bias=jnp.zeros(64))
    targets, weights = jnp.asarray(targets), jnp.asarray(weights, jnp.float32)
    term = (FAMILY["reverse_kl"],)

    def value(hidden, unembed, bias):
        head = student._replace(hidden=hidden, unembed=unembed, bias=bias)
        return linear_divergence(term, head, teacher, targets, weights, (1.0,), vocab=64, chunk=8)[0]

    arguments = tuple(student[:3])
    plain = jax.jit(jax.grad(value, (0, 1, 2)))(*arguments)
    same = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, jax.jit(jax.grad(jax.checkpoint(value), (0, 1, 2)))(*arguments), plain)
    scanned = jax.lax.scan(lambda c, h: (c, jax.grad(value, (0, 1, 2))(h, *arguments[1:])), 0, arguments[0][None])[1]
    jax.tree.map(lambda got, want: same(got[0], want), scanned, plain)
    mapped = jax.vmap(jax.grad(value, (0, 1, 2)), (0, None, None))(arguments[0][None], *arguments[1:])
    jax.tree.map(lambda got, want: same(got[0], want), mapped, plain)
    same(jax.grad(value, 2)(*arguments), plain[2])  # the bias only
