"""Group DRO: updates computed by hand, and inside the train step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import random_params

from jaxkd.core import sharding
from jaxkd.core.types import Batch
from jaxkd.losses import divergences, group_dro
from jaxkd.losses import objective as objectives
from jaxkd.losses.group_dro import GroupDRO
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.teachers.online import online
from jaxkd.train.state import init_state
from jaxkd.train.step import make_step

CONFIG = Config(vocab=250, embed=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=32)
DOMAINS = ("zebra", "ant", "mole")  # not sorted
SAMPLING = np.array([0.5, 0.25, 0.25])


def softmax(x):
    x = np.exp(x - np.max(x))
    return x / x.sum()


def test_two_updates_by_hand():
    settings = GroupDRO(eta=2.0, floor=0.1)
    initial = group_dro.init(SAMPLING)
    np.testing.assert_allclose(jnp.exp(initial.log_weights), 1 / 3, rtol=1e-6)
    once = group_dro.update(initial, jnp.array([3.0, 0.0, 1.0]), jnp.array([10.0, 10.0, 2.0]), jnp.asarray(0), settings)
    first = 0.9 * softmax(2 * np.array([0.3, 0.0, 0.5])) + 0.1 / 3
    np.testing.assert_allclose(jnp.exp(once.log_weights), first, rtol=1e-5)
    np.testing.assert_allclose(once.average, first, rtol=1e-5)
    # The last domain is in no row of the second batch: its score of 0.5 is used again.
    twice = group_dro.update(once, jnp.array([1.0, 2.0, 0.0]), jnp.array([10.0, 10.0, 0.0]), jnp.asarray(1), settings)
    second = 0.9 * softmax(np.log(first) + 2 * np.array([0.1, 0.2, 0.5])) + 0.1 / 3
    np.testing.assert_allclose(jnp.exp(twice.log_weights), second, rtol=1e-5)
    np.testing.assert_allclose(twice.average, (first + second) / 2, rtol=1e-5)


def test_persistent_excess_reaches_the_floor():
    for floor in (0.03, 0.0):
        state = group_dro.init(SAMPLING)
        for step in range(200):
            state = group_dro.update(
                state, jnp.array([2.0, 0.0, 0.0]), jnp.ones(3), jnp.asarray(step), GroupDRO(1.0, floor)
            )
        weights = np.exp(state.log_weights)
        assert np.isfinite(np.asarray(state.log_weights)).all()
        np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
        # w_other = (1 - c) w_other / Z + c / N, with Z a little below e^2
        assert weights[1] == pytest.approx(floor / 3 * (1 + 0.16), rel=0.02, abs=1e-6)


def test_factors_keep_the_total_weight_and_divide_by_sampling():
    state = group_dro.init(SAMPLING)._replace(log_weights=jnp.log(jnp.array([0.2, 0.2, 0.6])))
    tokens = jnp.array([60.0, 20.0, 40.0])
    factor = np.asarray(group_dro.factors(state, tokens))
    assert factor @ tokens == pytest.approx(120.0)
    np.testing.assert_allclose(factor / factor[0], [1.0, 2.0, 6.0], rtol=1e-6)
    assert not np.asarray(group_dro.factors(state, jnp.zeros(3))).any()


def make_batch(rows=8, length=16) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 250, (rows, length)).astype(np.int32)
    weights = np.ones((rows, length), np.float32)
    weights[:, -1] = 0
    weights[2, 5:] = 0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    domain = np.array([0, 0, 0, 1, 1, 2, 0, 1], np.int32)
    whole = (tokens, np.roll(tokens, -1, 1), weights, np.ones_like(tokens), positions, np.arange(rows, dtype=np.int32))
    return Batch(*map(jnp.asarray, (*whole, domain)))


@functools.lru_cache
def problem(micro_batches=1):
    forward = functools.partial(transformer.forward, CONFIG)
    objective = objectives.objective(
        {"kd": (0.5, objectives.match(divergences.forward_kl(), 2.0)), "ce": (1.0, objectives.next_token())},
        vocab=250,
        domains=DOMAINS,
        measured=group_dro.MEASURED,
    )
    teacher, tx = online(random_params(CONFIG, 1), forward), optax.sgd(1.0)
    state = init_state({"student": random_params(CONFIG, 0), "objective": {}}, tx, group_dro=group_dro.init(SAMPLING))
    step = jax.jit(
        make_step(
            forward,
            teacher,
            objective,
            tx,
            micro_batches,
            reweighting=group_dro.reweighting(GroupDRO(1.0, 1e-3), objective),
        )
    )
    return forward, teacher, step, state


def test_step_weights_tokens_by_domain_and_updates_scores():
    """Gradient and score of a step against the dense form, with unequal weights."""
    forward, teacher, step, state = problem()
    batch = make_batch()
    weights = jnp.array([0.1, 0.3, 0.6])
    state = state._replace(group_dro=state.group_dro._replace(log_weights=jnp.log(weights)))

    def losses(params):
        z, zt = (h.hidden @ h.unembed[:, :250] for h in (forward(p, batch).head for p in (params, teacher.state)))
        kd = jnp.sum(jax.nn.softmax(zt / 2) * (jax.nn.log_softmax(zt / 2) - jax.nn.log_softmax(z / 2)), -1)
        nats = [-jnp.take_along_axis(jax.nn.log_softmax(x), batch.targets[..., None], -1)[..., 0] for x in (z, zt)]
        return 0.5 * 4 * kd + nats[0], nats

    raw = (weights / SAMPLING)[batch.domain][:, None] * batch.weights
    expected = jax.jit(jax.grad(lambda p: jnp.sum(raw * losses(p)[0]) / raw.sum()))(state.params["student"])
    after, metrics = step(state, {}, teacher.state, batch)
    for old, new, slope in zip(*map(jax.tree.leaves, (state.params["student"], after.params["student"], expected))):
        assert np.linalg.norm((old - new) - slope) <= 1e-4 * np.linalg.norm(slope)

    _, (student, reference) = losses(state.params["student"])
    excess = jnp.maximum(student - reference, 0.0) * batch.weights
    score = [excess[batch.domain == d].sum() / batch.weights[batch.domain == d].sum() for d in range(3)]
    np.testing.assert_allclose(after.group_dro.score, score, rtol=1e-4)
    for d, name in enumerate(DOMAINS):
        np.testing.assert_allclose(metrics[f"weight/{name}"][0], weights[d], rtol=1e-5)
        np.testing.assert_allclose(metrics[f"excess/{name}"][0] / metrics[f"excess/{name}"][1], score[d], rtol=1e-4)
    expected = (1 - 1e-3) * softmax(np.log(weights) + np.asarray(score)) + 1e-3 / 3
    np.testing.assert_allclose(np.exp(after.group_dro.log_weights), expected, rtol=1e-4)
    assert metrics["loss"][1] == batch.weights.sum()


def test_micro_batches_and_sharding_give_equal_results_without_recompiling():
    batch = make_batch()
    _, teacher, step, state = problem()
    reference = step(state, {}, teacher.state, batch)[0]
    again = step(reference, {}, teacher.state, batch)[0]
    assert step._cache_size() == 1
    assert not np.array_equal(again.group_dro.log_weights, reference.group_dro.log_weights)
    _, _, sharded_step, _ = problem(4)
    mesh = sharding.make_mesh(2, 1, jax.devices()[:2])
    shapes, axes = transformer.abstract(CONFIG)
    shardings = sharding.shardings(axes, shapes, mesh)
    with jax.set_mesh(mesh):
        replicated = jax.NamedSharding(mesh, jax.P())
        placed = jax.device_put(state, replicated)
        placed = placed._replace(
            params={"student": jax.device_put(state.params["student"], shardings), "objective": {}}
        )
        sharded, _ = sharded_step(
            placed, {}, jax.device_put(teacher.state, shardings), jax.device_put(batch, sharding.batch_sharding(mesh))
        )
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
