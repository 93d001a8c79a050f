"""The guard in the step: what a step that is left out leaves as it was, what counts as a spike, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import batch_of, random_params

from jaxkd.core.types import Batch
from jaxkd.losses import divergences, group_dro
from jaxkd.losses import objective as objectives
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.teachers.online import online
from jaxkd.train import guard
from jaxkd.train.state import init_state
from jaxkd.train.step import make_step

CONFIG = Config(vocab=60, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32)
TERMS = {"kd": (1.0, objectives.match(divergences.forward_kl())), "ce": (1.0, objectives.next_token())}


def make_batch(seed: int, weight: float = 1.0) -> Batch:
    weights, row = np.ones((4, 8), np.float32), np.arange(4, dtype=np.int32)
    weights[2, 3] = weight
    tokens = np.random.default_rng(seed).integers(0, 60, (4, 8))
    return batch_of(tokens, weights=weights, row=row, domain=row % 2)


@functools.lru_cache
def problem(spike: float = 6.0):
    """A step that keeps all that a train state can: moments, an average, weights of domains, a window."""
    forward = functools.partial(transformer.forward, CONFIG)
    teacher, tx = online(random_params(CONFIG, 1), forward), optax.adamw(1e-2)
    objective = objectives.objective(TERMS, vocab=60, domains=("code", "law"), measured=group_dro.MEASURED)
    params, weights = {"student": random_params(CONFIG, 0), "objective": {}}, group_dro.init(np.ones(2) / 2)
    state = init_state(params, tx, averaged=True, group_dro=weights, recent=guard.init())
    reweighting = group_dro.reweighting(group_dro.GroupDRO(), objective)
    step = make_step(forward, teacher, objective, tx, decay=0.9, reweighting=reweighting, spike=spike)
    return jax.jit(step), teacher.state, state


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_steps_that_are_left_out():
    step, teacher, first = problem()
    before, metrics = step(first, {}, teacher, make_batch(0))
    assert metrics["skipped"] == (0.0, 1.0)
    after, metrics = step(before, {}, teacher, make_batch(1, weight=1e38))  # whose loss overflows
    assert not np.isfinite(metrics["loss"][0])
    assert metrics["skipped"] == (1.0, 1.0)
    assert int(after.step) == 2
    assert bits(after._replace(step=before.step)) == bits(before)
    # A run goes on as if the step had not been there.
    with_fault, without = first, first
    for seed, weight in ((0, 1.0), (1, 1e38), (2, 1.0)):
        with_fault, _ = step(with_fault, {}, teacher, make_batch(seed, weight))
    for seed in (0, 2):
        without, _ = step(without, {}, teacher, make_batch(seed))
    # But for the running mean of the domains' weights, which is over steps.
    same = lambda state: bits((state.params, state.opt_state, state.ema, state.recent, state.group_dro.log_weights))
    assert same(with_fault) == same(without)
    assert bits(without.params) != bits(first.params)
    # A spike is left out, and enters the window.
    filled = guard.Recent(jnp.full((2, guard.WINDOW), 0.1) + jnp.linspace(0, 0.01, guard.WINDOW), jnp.asarray(70))
    before = first._replace(recent=filled)
    after, metrics = step(before, {}, teacher, make_batch(0))  # a loss of four nats, where 0.1 is usual
    assert metrics["skipped"] == (1.0, 1.0)
    assert bits((after.params, after.opt_state, after.ema)) == bits((before.params, before.opt_state, before.ema))
    assert int(after.recent.seen) == 71
    loss, tokens = metrics["loss"]
    np.testing.assert_allclose(after.recent.values[0, 70], loss / tokens, rtol=1e-6)


def usual(values, factor=6.0):
    """Whether each of a row of losses is usual, in numpy; the gradient norm stays at 1."""
    window, verdicts = [], []
    for value in values:
        verdicts.append(
            len(window) < guard.WINDOW // 2 or value - np.mean(window) <= factor * np.std(window, ddof=1) + 1e-9
        )
        window = [*window, value][-guard.WINDOW :]
    return verdicts


def test_spikes_are_those_of_the_formula():
    rng = np.random.default_rng(3)
    values = rng.normal(4.0, 0.1, 400)
    values[[5, 63, 64, 200]] = 40.0  # two come too early to be known for what they are
    values[340:] += 3.0  # and one level is there to stay, when the window has forgotten them
    recent, admitted = guard.init(), []
    one = jnp.ones(())
    admit = jax.jit(functools.partial(guard.is_usual, factor=6.0))
    enter = jax.jit(guard.append)
    for value in values:
        admitted.append(bool(admit(recent, jnp.float32(value), one)))
        recent = enter(recent, jnp.float32(value), one)
    assert admitted == usual(values)
    left = [i for i, good in enumerate(admitted) if not good]
    assert {200, 340} <= set(left)
    assert not {5, 63} & set(left)
    assert len(left) < 12, "a loss that has come to stay must become usual"
    for value in (0.1, 1e-12, 3e4):  # a constant is no spike
        recent = guard.Recent(jnp.full((2, guard.WINDOW), value, jnp.float32), jnp.asarray(500))
        assert bool(guard.is_usual(recent, jnp.float32(value), jnp.float32(value), 6.0))


def test_the_guard_takes_one_copy_of_the_parameters(monkeypatch):
    """Parameters outweigh all else here: had the step to keep old and new moments side by side, it would show."""
    config = Config(vocab=512, embed=128, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=512)
    forward, tx = functools.partial(transformer.forward, config), optax.adamw(1e-2)
    params = transformer.abstract(config)[0]
    objective = objectives.objective({"ce": TERMS["ce"]}, vocab=512, domains=("code", "law"))
    state = jax.eval_shape(lambda p: init_state({"student": p, "objective": {}}, tx), params)

    def temporary():
        step = jax.jit(make_step(forward, online(params, forward), objective, tx), donate_argnums=0)
        memory = step.lower(state, {}, params, make_batch(0)).compile().memory_analysis()
        assert memory.alias_size_in_bytes > 0.9 * sum(4 * leaf.size for leaf in jax.tree.leaves(state))
        return memory.temp_size_in_bytes

    guarded = temporary()
    monkeypatch.setattr(guard, "select", lambda taken, after, before: after)
    bare, size = temporary(), 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert guarded - bare < 1.2 * size
