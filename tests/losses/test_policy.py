"""Losses on the student's own text, over every sequence of a small vocabulary: expected gradients are exact sums."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of
from jax.lax import stop_gradient

from jaxkd.core import sharding
from jaxkd.core.types import Divergence, Head, Output, TopK
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences as d
from jaxkd.losses import objective as objectives
from jaxkd.losses import policy, token_weights
from jaxkd.teachers.online import online
from jaxkd.train.step import make_gradient

VOCAB, STEPS, STOP = 4, 3, 3
TEXT = np.array(list(itertools.product(range(VOCAB), repeat=STEPS)))  # every row; what follows a stop is junk
ALIVE = np.cumsum(np.pad(TEXT == STOP, ((0, 0), (1, 0)))[:, :STEPS], 1) == 0  # until the stop, which counts
# The distinct prefixes of 0, 1, 2 tokens, and which of them each token of each row follows.
PREFIX = np.stack([(VOCAB**t - 1) // (VOCAB - 1) + TEXT[:, :t] @ VOCAB ** np.arange(t) for t in range(STEPS)], 1)


def table(seed, spread=1.0):
    """Logits [prefixes V]."""
    return jnp.asarray(spread * np.random.default_rng(seed).normal(size=(PREFIX.max() + 1, VOCAB)), jnp.float32)


STUDENT, TEACHER = table(0), table(1)


def log_probs(logits):
    """log q [rows, steps, V]."""
    return jax.nn.log_softmax(logits)[PREFIX]


def of_target(values):
    return jnp.take_along_axis(values, TEXT[..., None], -1)[..., 0]


def distribution(logits):
    """Probability of each row; the junk after a stop is uniform."""
    return jnp.exp(jnp.where(ALIVE, of_target(log_probs(logits)), -jnp.log(VOCAB)).sum(1))


def over_text(by_prefix, author=STUDENT):
    """The expected sum of a function of the prefix [prefixes] over the author's text, which carries no gradient."""
    return jnp.sum(stop_gradient(distribution(author))[:, None] * ALIVE * by_prefix[PREFIX])


def kl(a, b):
    """KL(a || b) of every prefix, from logits."""
    a, b = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return jnp.sum(jnp.exp(a) * (a - b), -1)


def forward(logits, batch):
    """A student or teacher that is its table; after a stop it is NaN."""
    hidden = jnp.where(batch.weights[..., None] != 0, jax.nn.one_hot(batch.tokens, len(logits)), jnp.nan)
    return Output(Head(hidden, logits), {})


@functools.lru_cache
def program(term):
    """The value's gradient in the student's logits, of a batch."""
    objective = objectives.objective({"opd": (1.0, term)}, vocab=VOCAB, domains=("all",))

    def value(logits, batch):
        return objective.loss({}, forward(logits, batch), forward(TEACHER, batch), batch, jnp.zeros((), jnp.int32))

    return jax.jit(jax.grad(value, has_aux=True))


def batch_by(author=STUDENT, **aux):
    """Every row, with its probability under its author as weight. A token is its prefix; `aux` is NaN after a stop."""
    weights = distribution(author)[:, None] * ALIVE
    aux = {name: jnp.where(ALIVE, value, jnp.nan) for name, value in aux.items()}
    return batch_of(PREFIX, targets=TEXT, weights=weights.astype(jnp.float32))._replace(aux=aux)


def expected(term, author=STUDENT, **aux):
    return program(term)(STUDENT, batch_by(author, **aux))[0]


def exact(objective):
    return jax.grad(objective)(STUDENT)


def assert_same(got, want):
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 3e-6, error


REVERSE_KL = exact(lambda logits: over_text(kl(logits, TEACHER)))


def test_every_row_is_counted_once():
    assert distribution(STUDENT).sum() == pytest.approx(1.0, abs=1e-6)
    assert len(np.unique(PREFIX)) == 21


@pytest.mark.parametrize(
    "divergence",
    [
        d.reverse_kl(),
        d.sampled_reverse_kl(),
        d.sampled_reverse_kl(baseline=True),
        d.generalized_reverse_kl(1, sampled_tail=True),
        d.generalized_reverse_kl(3, sampled_tail=True),
    ],
)
def test_expected_gradient_and_value_are_those_of_reverse_kl(divergence):
    gradient, metrics = program(objectives.match(divergence))(STUDENT, batch_by())
    assert_same(gradient, REVERSE_KL)
    assert metrics["loss"][0] == pytest.approx(float(over_text(kl(STUDENT, TEACHER))), rel=1e-5)


def test_backpropagating_the_sampled_log_ratio_has_no_expected_gradient():
    ratio = Divergence(lambda lp, lq, side: (jnp.where(side.is_target, lq - lp, 0.0),))
    assert np.abs(expected(objectives.match(ratio))).max() < 1e-6


def test_differentiated_k3_is_forward_kl_and_a_kl_from_oneself_is_nothing():
    """k3 = p/q - 1 - log(p/q): an unbiased value of KL(q || p), whose gradient is that of KL(p || q)."""
    k3 = Divergence(lambda lp, lq, side: (jnp.where(side.is_target, jnp.exp(lp - lq) - 1 - (lp - lq), 0.0),))
    assert_same(expected(objectives.match(k3)), exact(lambda logits: over_text(kl(TEACHER, logits))))
    itself = Divergence(lambda lp, lq, side: (jnp.exp(lq) * (lq - stop_gradient(lq)),), uses_teacher=False)
    assert np.abs(expected(objectives.match(itself))).max() < 1e-6


def test_a_truncated_sum_beside_the_sampled_tail_is_biased_by_the_gradient_of_its_mass():
    whole = d.generalized_reverse_kl(2, sampled_tail=True)
    mass = lambda lq, side: jnp.where(side.in_top_set, jnp.exp(lq) - stop_gradient(jnp.exp(lq)), 0.0)
    naive = whole._replace(phi=lambda lp, lq, side: (whole.phi(lp, lq, side)[0] + mass(lq, side),))
    leading = jax.nn.one_hot(jnp.argsort(TEACHER)[:, -2:], VOCAB).sum(1)
    bias = exact(lambda logits: over_text(jnp.sum(leading * jax.nn.softmax(logits), -1)))
    assert_same(expected(objectives.match(naive)) - REVERSE_KL, bias)


def test_the_detached_skew_is_a_policy_gradient():
    """With the reward log(a p/q + 1 - a) of TOP-D, whose a is one minus ours."""
    a = 0.7

    def surrogate(logits):
        lq, lp = of_target(log_probs(logits)), of_target(log_probs(TEACHER))
        reward = jnp.log(a * jnp.exp(lp - stop_gradient(lq)) + 1 - a)
        return -jnp.sum(stop_gradient(distribution(logits))[:, None] * ALIVE * reward * lq)

    assert_same(expected(objectives.match(d.skew_reverse_kl(1 - a, detach=True))), exact(surrogate))
    attached = expected(objectives.match(d.skew_reverse_kl(1 - a)))
    assert np.linalg.norm(attached - exact(surrogate)) > 0.1 * np.linalg.norm(attached)


def test_baseline_lowers_the_variance_and_the_exact_sum_has_none():
    """Of one token's gradient, over every token that it can be; with a handful of tokens the baseline may not help."""
    q, p = 2.0 * np.random.default_rng(0).normal(size=(2, 64))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(term):
        student, teacher = (Head(jnp.eye(64), jnp.asarray(np.tile(x, (64, 1)), jnp.float32)) for x in (q, p))
        value = lambda unembed: linear_divergence(
            (term,), student._replace(unembed=unembed), teacher, jnp.arange(64), jnp.ones((1, 64)), (1.0,), vocab=64
        )[0]
        return jax.grad(value)(student.unembed)

    def variance(term):
        chance, slopes = jax.nn.softmax(q)[:, None], gradients(term)
        return float(jnp.sum(chance * jnp.square(slopes - jnp.sum(chance * slopes, 0))))

    plain, with_baseline = (variance(d.sampled_reverse_kl(baseline)) for baseline in (False, True))
    assert plain > 1.5 * with_baseline
    assert variance(d.reverse_kl()) < 1e-6 * plain


# ------------------------------------------------------------------------- an earlier student, another temperature

OLD = table(2, 0.3) + STUDENT
TEMPERED = OLD / 0.6
BY_OLD = {"old_logprob": of_target(log_probs(OLD))}
BY_TEMPERED = BY_OLD | {"drawn_logprob": of_target(log_probs(TEMPERED))}


@pytest.mark.parametrize("baseline", [False, True])
def test_policy_gradient_at_the_same_step_is_reverse_kl(baseline):
    by_itself = {"old_logprob": of_target(log_probs(STUDENT))}
    gradient, metrics = program(policy.policy_gradient(baseline=baseline))(STUDENT, batch_by(**by_itself))
    assert_same(gradient, REVERSE_KL)
    assert metrics["loss"][0] == pytest.approx(float(over_text(kl(STUDENT, TEACHER))), rel=1e-5)


@pytest.mark.parametrize(("author", "aux"), [(OLD, BY_OLD), (TEMPERED, BY_TEMPERED)])
@pytest.mark.parametrize("baseline", [False, True])
def test_policy_gradient_on_older_text_is_reverse_kl_less_the_distance_from_the_author(author, aux, baseline):
    want = exact(lambda logits: over_text(kl(logits, TEACHER) - kl(logits, OLD), author))
    assert_same(expected(policy.policy_gradient(baseline=baseline), author, **aux), want)


def surrogate(loss, author=TEMPERED):
    """The gradient of the expected sum over the author's text of loss(q / q_old, q_old / drawn, A) [rows, steps]."""
    old, lp = BY_OLD["old_logprob"], of_target(log_probs(TEACHER))

    def value(logits):
        ratio, of_draw = of_target(log_probs(logits)) - old, old - of_target(log_probs(author))
        return jnp.sum(distribution(author)[:, None] * ALIVE * loss(jnp.exp(ratio), jnp.exp(of_draw), lp - old))

    return exact(value)


def test_policy_gradient_with_a_clip_is_that_of_ppo():
    clip = lambda r, _, a: -jnp.minimum(r * a, jnp.clip(r, 0.8, 1.2) * a)
    got = expected(policy.policy_gradient(clip=0.2), OLD, **BY_OLD)
    assert_same(got, surrogate(clip, OLD))
    unclipped = expected(policy.policy_gradient(), OLD, **BY_OLD)
    assert np.linalg.norm(got - unclipped) > 0.1 * np.linalg.norm(got)


def test_policy_gradient_truncates_the_ratio_to_the_distribution_of_the_text():
    """A truncated weight is a constant: -min(w, limit) A log q."""
    limit = lambda r, c, a: -stop_gradient(jnp.minimum(r * c, 1.1)) * a * jnp.log(r)
    assert_same(expected(policy.policy_gradient(max_ratio=1.1), TEMPERED, **BY_TEMPERED), surrogate(limit))


# ------------------------------------------------------------------------- whole continuations


def test_minillm_is_the_gradient_of_the_kl_of_the_continuations():
    """Of E_q sum_t log q/p with the gradient through the text's own probability, which no per-prefix loss has."""

    def whole(logits):
        ratio = of_target(log_probs(logits) - log_probs(TEACHER))
        return jnp.sum(distribution(logits) * jnp.sum(ALIVE * ratio, 1))

    for aux in ({}, {"drawn_logprob": of_target(log_probs(STUDENT))}):
        assert_same(expected(policy.minillm(length_normalize=False), **aux), exact(whole))
    assert np.linalg.norm(REVERSE_KL - exact(whole)) > 0.1 * np.linalg.norm(REVERSE_KL)


def test_minillm_divides_by_the_number_of_later_tokens():
    reward = np.asarray(of_target(log_probs(TEACHER) - log_probs(STUDENT)))
    mean = np.zeros_like(reward)
    for row, step in np.argwhere(ALIVE):
        mean[row, step] = np.mean(
            reward[row, step + 1 :][ALIVE[row, step + 1 :]] if ALIVE[row, step + 1 :].any() else 0
        )

    def value(logits):
        later = jnp.sum(distribution(STUDENT)[:, None] * ALIVE * mean * of_target(log_probs(logits)))
        return over_text(kl(logits, TEACHER)) - later

    assert_same(expected(policy.minillm()), exact(value))


def test_minillm_on_text_mixed_with_the_teacher_weighs_each_step():
    """Given the mixture's prefixes and continuations, the next step's gradient is exact: a recursion over prefixes."""
    mixed = jnp.log(0.2 * jax.nn.softmax(TEACHER) + 0.8 * jax.nn.softmax(STUDENT))
    reward = jax.nn.log_softmax(TEACHER) - jax.nn.log_softmax(STUDENT)
    starts = [(VOCAB**t - 1) // (VOCAB - 1) for t in range(STEPS + 1)]
    after = np.zeros(TEACHER.shape)  # the expected rewards of what follows each token
    for t in reversed(range(STEPS - 1)):
        for prefix, v in itertools.product(range(starts[t], starts[t + 1]), range(STOP)):
            child = starts[t + 1] + prefix - starts[t] + v * VOCAB**t
            after[prefix, v] = jnp.exp(mixed[child]) @ (reward[child] + after[child])

    def value(logits):
        return over_text(kl(logits, TEACHER) - jnp.sum(jax.nn.softmax(logits) * after, -1), mixed)

    term = policy.minillm(length_normalize=False)
    assert_same(expected(term, mixed, drawn_logprob=of_target(log_probs(mixed))), exact(value))
    ratio = jnp.exp(jnp.max(log_probs(STUDENT) - log_probs(mixed)))
    assert ratio <= 1 / 0.8
    limited = expected(policy.minillm(False, max_ratio=0.5), mixed, drawn_logprob=of_target(log_probs(mixed)))
    assert np.linalg.norm(limited - exact(value)) > 0.1 * np.linalg.norm(limited)


# ------------------------------------------------------------------------- batches, meshes, what cannot be


@functools.lru_cache
def mean_gradient(micro_batches=1):
    terms = {
        "pg": (1.0, policy.policy_gradient(clip=0.2, baseline=True, max_ratio=3.0)),
        "mini": (0.5, policy.minillm()._replace(token_weights=token_weights.prefix(tokens=2))),
        "opd": (1.0, objectives.match(d.sampled_reverse_kl(True), token_weights=token_weights.iw_opd())),
        "tail": (1.0, objectives.match(d.generalized_reverse_kl(2, True), token_weights=token_weights.tip())),
    }
    objective = objectives.objective(terms, vocab=VOCAB, domains=("all",))
    return gradient_program(objective, micro_batches)


def gradient_program(objective, micro_batches=1):
    student = lambda params, batch: forward(params["logits"], batch)
    return jax.jit(make_gradient(student, online(TEACHER, forward), objective, micro_batches))


PARAMS = {"student": {"logits": STUDENT}, "objective": {}}


def gradient_of(batch, micro_batches=1):
    grads, metrics = mean_gradient(micro_batches)(PARAMS, TEACHER, batch, jnp.zeros((), jnp.int32))
    return jax.tree.map(np.asarray, (grads["student"]["logits"], metrics))


@functools.lru_cache
def one_batch():
    """All rows with equal weight, most of them with a stop and junk behind it."""
    batch = batch_by(OLD, **BY_TEMPERED)
    batch = batch._replace(weights=jnp.asarray(ALIVE, jnp.float32))
    return batch, gradient_of(batch)


def assert_equal(got, want):
    assert_same(got[0], want[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got[1], want[1])


@pytest.mark.slow
def test_micro_batches_and_a_mesh_give_the_same_gradient():
    batch, want = one_batch()
    assert_equal(gradient_of(batch, 4), want)
    mesh = sharding.make_mesh(4, 2)
    with jax.set_mesh(mesh):
        assert_equal(gradient_of(jax.device_put(batch, sharding.batch_sharding(mesh))), want)


def test_documents_of_a_row_have_no_part_in_each_other():
    """Two texts, each behind a prompt, in one row with padding between and after, against one row a text."""
    batch, _ = one_batch()
    junk = lambda x, fill: jnp.full((x.shape[0] // 2, 1), fill, x.dtype)

    def packed(x, fill):
        left, right = x[::2], x[1::2]
        return jnp.concatenate([junk(x, fill), left, junk(x, fill), right, junk(x, fill)], 1)

    one = jnp.ones((1, STEPS), jnp.int32)
    segments = jnp.concatenate([one[:, :1], one, 2 * one[:, :1], 2 * one, 0 * one[:, :1]], 1)
    fields = {name: packed(getattr(batch, name), 0) for name in ("tokens", "targets", "weights")}
    fields["segments"] = jnp.broadcast_to(segments, fields["tokens"].shape)
    row = batch_of(fields.pop("tokens"), **fields)._replace(aux={k: packed(v, jnp.nan) for k, v in batch.aux.items()})
    objective = objectives.objective({"mini": (1.0, policy.minillm())}, vocab=VOCAB, domains=("all",))
    gradient = gradient_program(objective)
    of = lambda batch: gradient(PARAMS, TEACHER, batch, jnp.zeros((), jnp.int32))[0]["student"]["logits"]
    assert_same(of(row), of(batch))


def test_only_the_students_rows_count():
    batch, _ = one_batch()
    author = jnp.arange(len(TEXT)) % 3
    mine = batch._replace(weights=batch.weights * (author == 1)[:, None])
    batch = batch._replace(aux=batch.aux | {"author": author})
    for term in (policy.policy_gradient(), policy.minillm()):
        np.testing.assert_array_equal(program(term)(STUDENT, batch)[0], program(term)(STUDENT, mine)[0])


def test_what_is_not_stored_is_said():
    batch, _ = one_batch()
    entries = TopK(batch.targets[..., None], jnp.zeros((*TEXT.shape, 1)), jnp.zeros((*TEXT.shape, 1)))
    fn = policy.minillm().fn
    with pytest.raises(ValueError, match=r"log p\(y\).*TopK"):
        fn({}, forward(STUDENT, batch), entries, batch, batch.weights, VOCAB)
    with pytest.raises(ValueError, match=r"batch\.aux\['old_logprob'\]"):
        program(policy.policy_gradient())(STUDENT, batch._replace(aux={}))
    with pytest.raises(ValueError, match="max_ratio"):
        policy.policy_gradient(max_ratio=-1.0)
