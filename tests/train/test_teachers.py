"""Every way a teacher reaches the step: less than its head, several of them, the student itself."""

import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import REPOSITORY, random_params
from test_step import DOMAINS, make_batch, problem

from jaxkd.config.recipe import read_config
from jaxkd.config.schema import experiment
from jaxkd.core import schedules
from jaxkd.losses import divergences
from jaxkd.losses import objective as objectives
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.run import job
from jaxkd.teachers import ensemble, signals
from jaxkd.teachers.online import online, self_teacher
from jaxkd.train.state import init_state
from jaxkd.train.step import make_gradient, make_step

VOCAB = 250
STEP = jnp.zeros((), jnp.int32)
KD = {"kd": (1.0, objectives.match(divergences.forward_kl()))}
CROSS = {"kd": (1.0, objectives.match(divergences.cross_entropy()))}
OTHER = Config(vocab=250, embed=40, layers=2, heads=5, kv_heads=5, head_dim=8, mlp=48)


_COMPILED: dict = {}  # what is asked of the same teacher at several steps, or by several tests; holds what ids are of


def gradient(teacher, terms=KD, batch=None, step=STEP, micro_batches=1, **options):
    student, _, params = problem()
    key = (teacher.signal, id(terms), micro_batches, *sorted(options.items()))
    if key not in _COMPILED:
        objective = objectives.objective(terms, vocab=VOCAB, domains=DOMAINS, **options)
        _COMPILED[key] = (jax.jit(make_gradient(student, teacher, objective, micro_batches)), terms)
    run, _ = _COMPILED[key]
    return run(params, teacher.state, make_batch() if batch is None else batch, step)


@functools.lru_cache
def other():
    return online(random_params(OTHER, 5), functools.partial(transformer.forward, OTHER))


def distance(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def both(weigh, **options):
    return ensemble.ensemble([problem()[1], other()], weigh, **options)


@pytest.mark.slow
def test_fewer_entries_never_see_more_than_the_whole():
    """Data processing: the divergence over K + 1 entries is at most that over the vocabulary, in every domain."""
    teacher = problem()[1]
    whole = gradient(teacher)[1]
    before = None
    for entries in (64, 8, 1):
        metrics = gradient(signals.top_k(teacher, entries, (1.0,), VOCAB))[1]
        for name in ("kd", *[f"kd/{domain}" for domain in DOMAINS]):
            assert 0 < float(metrics[name][0]) <= float((before or whole)[name][0])
        before = metrics


@pytest.mark.slow
def test_draws_come_to_the_teacher_as_one_over_their_root():
    """The gradient's mean square error is a variance over the number of draws."""
    teacher = problem()[1]
    exact = gradient(teacher, CROSS)[0]

    def error(draws):
        run = signals.sampled(teacher, draws, 0, VOCAB)
        return np.mean([distance(gradient(run, CROSS, step=jnp.int32(s))[0], exact) ** 2 for s in range(4)])

    assert 8 < error(8) / error(128) < 32


def test_a_rows_draws_are_its_own():
    batch, order = make_batch(), np.asarray([3, 0, 7, 1, 2, 6, 5, 4])
    moved = jax.tree.map(lambda x: x[order], batch)
    of = lambda *a: np.asarray(signals.uniforms(*a, 5))
    np.testing.assert_array_equal(of(0, 3, batch)[order], of(0, 3, moved))
    for other_draws in (of(1, 3, batch), of(0, 4, batch), of(0, 3, batch._replace(row=batch.row + 1))):
        assert not np.array_equal(other_draws, of(0, 3, batch))
    assert len(np.unique(of(0, 3, batch)[:, 0, 0])) == 8


@pytest.mark.slow
def test_equal_teachers_are_one():
    teacher = problem()[1]
    for geometric in (False, True):
        blend = ensemble.ensemble([teacher, teacher], lambda batch, step: jnp.ones((8, 2)), geometric=geometric)
        assert distance(gradient(blend)[0], gradient(teacher)[0]) < 1e-5


@pytest.mark.slow
def test_a_blend_is_between_its_teachers():
    """Cross-entropy is linear in p, so the gradient of the average is the average of the gradients."""
    blend = both(lambda batch, step: jnp.tile(jnp.asarray([3.0, 1.0]), (batch.row.shape[0], 1)))
    each = [gradient(t, CROSS)[0] for t in (problem()[1], other())]
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *each)
    assert distance(gradient(blend, CROSS)[0], expected) < 1e-5
    assert distance(gradient(blend, CROSS, micro_batches=4)[0], expected) < 1e-5


def test_weights_follow_the_step_and_the_domain():
    weigh = ensemble.shares([schedules.linear(1.0, 10), 0.5], [{}, {"code": 2.0, "poetry": 0.0}], DOMAINS)
    batch = make_batch()
    now, later = weigh(batch, 0), weigh(batch, 10)
    np.testing.assert_allclose(now[:3], [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(later[:3], [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]], atol=1e-7)
    for domain, named in (("cod", "'cod'"), ("code", "'law'")):  # not there, and another is not served
        with pytest.raises(ValueError, match=named):
            ensemble.shares([1.0], [{domain: 1.0}], DOMAINS)


FADES = {"schedule": "linear", "peak": 0.5, "end": 0.0}


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (-0.5, 1.0, "members.one weighs -0.5"),
        (float("nan"), 1.0, "members.one weighs nan"),
        (FADES, {**FADES, "peak": 0.2}, "step 20 of 20"),
        ({**FADES, "peak": 0.0, "end": 1.0}, 0.0, "step 0 of 20"),
    ],
)
def test_weights_that_leave_a_row_without_its_teachers_are_refused(one, two, message):
    """A mixture of them would be no distribution, and its divergence a number all the same."""
    values = dict(read_config([f"--config={REPOSITORY / 'configs' / 'tiny.py'}"]))
    member = {"path": "random", "shape": values["teacher"]["shape"]}
    values["teacher"] = {"members": {"one": {**member, "weight": one}, "two": {**member, "weight": two}}}
    with pytest.raises(ValueError, match=re.escape(message)):
        job.build(experiment(values))


@pytest.mark.parametrize(
    ("signal", "temperatures", "message"),
    [
        ("token", (0.0,), None),
        ("token", (-1.0,), "must be finite and above 0"),
        ("token", (1.0, 2.0), "one temperature"),
        ("top_k", (0.0,), "must be finite and above 0"),
    ],
)
def test_text_may_be_the_most_probable_one(signal, temperatures, message):
    values = dict(read_config([f"--config={REPOSITORY / 'configs' / 'tiny.py'}"]))
    values["teacher"] = {**values["teacher"], "signal": signal, "temperatures": temperatures}
    values["objective"] = {"ce": values["objective"]["ce"]}
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        job.build(experiment(values))


@pytest.mark.slow
def test_each_row_has_the_teacher_of_its_route():
    batch = make_batch()
    routed = gradient(
        ensemble.route([problem()[1], other()], lambda batch: (batch.row % 2).astype(jnp.int32)), KD, batch
    )
    parts = []
    for number, teacher in enumerate((problem()[1], other())):
        mine = batch._replace(weights=jnp.where((batch.row % 2 == number)[:, None], batch.weights, 0.0))
        gradients, metrics = gradient(teacher, KD, mine)
        parts.append(jax.tree.map(lambda g, m=metrics: g * m["loss"][1], gradients))
    expected = jax.tree.map(lambda a, b: (a + b) / routed[1]["loss"][1], *parts)
    assert distance(routed[0], expected) < 1e-5


def test_a_teacher_without_weight_is_not_run():
    """Its parameters may be NaN, and the compiled program runs it under a condition."""
    broken = other()._replace(state=jax.tree.map(lambda x: x * jnp.nan, other().state))
    teacher = problem()[1]
    blend = ensemble.ensemble([teacher, broken], lambda batch, step: jnp.tile(jnp.asarray([1.0, 0.0]), (8, 1)))
    assert distance(gradient(blend)[0], gradient(teacher)[0]) < 1e-5
    sparse = signals.top_k(teacher, 4, (1.0,), VOCAB)
    with pytest.raises(ValueError, match="TopK"):
        gradient(ensemble.ensemble([teacher, sparse], lambda batch, step: jnp.ones((8, 2))))
    with pytest.raises(ValueError, match="at least one"):
        ensemble.ensemble([], lambda batch, step: jnp.ones((8, 0)))


def own_run(decay, steps=3):
    student, _, params = problem()
    terms = {"ce": (1.0, objectives.next_token()), "kd": (1.0, objectives.match(divergences.reverse_kl()))}
    objective = objectives.objective(terms, vocab=VOCAB, domains=DOMAINS)
    teacher, tx = self_teacher(student), optax.sgd(0.5)
    step = jax.jit(make_step(student, teacher, objective, tx, decay=decay))
    states, metrics = [init_state(params, tx, averaged=True)], []
    for _ in range(steps):
        state, measured = step(states[-1], {}, teacher.state, make_batch())
        states.append(state)
        metrics.append({k: float(v[0]) for k, v in measured.items()})
    return states, metrics


@pytest.mark.slow
def test_the_average_follows_the_student():
    states, metrics = own_run(0.75)
    assert metrics[0]["kd"] == pytest.approx(0.0, abs=1e-3)  # of 148 tokens: both are the same at first
    assert metrics[2]["kd"] > 0.01
    for before, after in itertools.pairwise(states):
        expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before.ema, after.params["student"])
        assert distance(after.ema, expected) < 1e-6
    first = problem()[2]["student"]
    states, _ = own_run(1.0)
    jax.tree.map(np.testing.assert_array_equal, states[-1].ema, first)
    states, metrics = own_run(0.0)
    assert distance(states[-1].ema, states[-1].params["student"]) < 1e-6
    assert max(abs(m["kd"]) for m in metrics) < 1e-3
