"""The step: accumulation, meshes, memory, weight decay."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import random_params

from jaxkd.core import sharding
from jaxkd.core.types import Batch
from jaxkd.losses import divergences
from jaxkd.losses import objective as objectives
from jaxkd.models import quantized, transformer
from jaxkd.models.transformer import Config
from jaxkd.teachers.online import no_teacher, online, within
from jaxkd.train import optim
from jaxkd.train.state import init_state
from jaxkd.train.step import make_gradient, make_step

CONFIG = Config(vocab=250, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64)
TEACHER = Config(vocab=250, embed=48, layers=3, heads=6, kv_heads=2, head_dim=8, mlp=64, tied=False)
DOMAINS = ("code", "law", "poetry")


def make_batch(rows=8, length=24, seed=0, vocab=250) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    segments = np.repeat([[1] * 10 + [2] * 9 + [0] * (length - 19)], rows, 0).astype(np.int32)
    positions = np.repeat([[*range(10), *range(9), *([0] * (length - 19))]], rows, 0).astype(np.int32)
    weights = np.zeros((rows, length), np.float32)
    weights[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    weights[1, 4:] = 0  # rows of unequal weight: a mean of means would show
    weights[5] = 0
    targets = np.roll(tokens, -1, axis=1)
    domain = (np.arange(rows) % 3).astype(np.int32)
    return Batch(
        *map(jnp.asarray, (tokens, targets, weights, segments, positions, np.arange(rows, dtype=np.int32), domain))
    )


def make_objective(**options):
    terms = {"kd": (0.7, objectives.match(divergences.forward_kl(), 2.0)), "ce": (1.0, objectives.next_token())}
    return objectives.objective(terms, vocab=250, domains=DOMAINS, **options)


@functools.lru_cache
def problem():
    student = functools.partial(transformer.forward, CONFIG)
    teacher = online(random_params(TEACHER, 1), functools.partial(transformer.forward, TEACHER))
    params = {"student": random_params(CONFIG, 0), "objective": {}}
    return student, teacher, params


@functools.lru_cache
def program(micro_batches, table=None):
    """With the name of a table, the teacher's activations lie by the teacher's form of it."""
    student, teacher, _ = problem()
    if table:
        rules = sharding.of_teacher(sharding.TABLES[table])
        teacher = online(teacher.state, within(rules, functools.partial(transformer.forward, TEACHER)))
    return jax.jit(make_gradient(student, teacher, make_objective(), micro_batches))


@functools.lru_cache
def weights(narrow):
    state, (shapes, axes) = problem()[1].state, transformer.abstract(TEACHER)
    if not narrow:
        return state, shapes, axes
    shapes, axes = quantized.abstract(shapes, axes)
    return jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), quantized.quantize(state), shapes), shapes, axes


def gradients(batch, micro_batches=1, mesh=None, table="fsdp", narrow=False, student="fsdp"):
    _, _, params = problem()
    own = mesh is not None and mesh.shape["teacher"] > 1
    gradient, teacher = program(micro_batches, table if own else None), weights(narrow)
    if mesh is None:
        return gradient(params, teacher[0], batch, jnp.zeros((), jnp.int32))
    with jax.set_mesh(mesh):
        placed, learner = [], (params["student"], *transformer.abstract(CONFIG))
        rules = sharding.of_teacher(sharding.TABLES[table])
        for (tree, shapes, axes), lies in ((learner, sharding.TABLES[student]), (teacher, rules)):
            placed.append(jax.device_put(tree, sharding.shardings(axes, shapes, mesh, lies)))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        params = {"student": placed[0], "objective": {}}
        return gradient(params, placed[1], batch, jnp.zeros((), jnp.int32))


def same(left, right, tolerance=1e-5):
    """Relative L2 per gradient leaf, and every metric's sum and weight."""
    for a, b in zip(jax.tree.leaves(left[0]), jax.tree.leaves(right[0]), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
    assert left[1].keys() == right[1].keys()
    for name in left[1]:
        np.testing.assert_allclose(left[1][name], right[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "micro_batches", "table", "narrow"),
    [
        (None, 2, "fsdp", False),
        ({"replica": 2, "data": 2, "model": 2}, 2, "fsdp", False),
        ({"data": 1, "context": 2, "teacher": 2, "model": 2}, 1, "fsdp", True),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (None, 4, "fsdp", False),
                ({"data": 4, "model": 2}, 2, "replicated student", False),
                ({"data": 2, "model": 4}, 4, "replicated", False),
                ({"data": 4, "model": 2}, 1, "fsdp", False),
                ({"data": 8, "model": 1}, 1, "fsdp", False),
                ({"data": 1, "model": 8}, 1, "fsdp", False),
                ({"data": 1, "context": 8, "model": 1}, 1, "fsdp", False),
                ({"replica": 8, "data": 1, "model": 1}, 1, "fsdp", False),
                ({"data": 4, "model": 2}, 2, "fsdp", False),
                ({"replica": 2, "data": 1, "context": 2, "model": 2}, 1, "replicated", False),
                ({"data": 2, "context": 4, "model": 1}, 2, "fsdp", False),
                ({"data": 4, "model": 2}, 2, "fsdp", True),
                ({"data": 2, "teacher": 4, "model": 1}, 1, "fsdp", False),  # its six heads do not divide
                ({"data": 2, "teacher": 2, "model": 2}, 2, "replicated", False),
            )
        ],
    ],
)
def test_micro_batches_and_eight_devices_equal_one(sizes, micro_batches, table, narrow):
    batch, mesh = make_batch(), sizes and sharding.make_mesh(**sizes)
    student, table = ("replicated", "fsdp") if table == "replicated student" else ("fsdp", table)
    same(gradients(batch, micro_batches, mesh, table, narrow, student), gradients(batch, narrow=narrow))


def test_gradient_is_the_mean_over_weighted_tokens():
    student, teacher, params = problem()
    batch = make_batch()

    def dense(student_params):
        q = student(student_params, batch).head
        p = teacher.signal(teacher.state, batch).head
        z, zt = (h.hidden @ h.unembed[:, :250] for h in (q, p))
        kd = jnp.sum(jax.nn.softmax(zt / 2) * (jax.nn.log_softmax(zt / 2) - jax.nn.log_softmax(z / 2)), -1)
        ce = -jnp.take_along_axis(jax.nn.log_softmax(z), batch.targets[..., None], -1)[..., 0]
        return jnp.sum(batch.weights * (0.7 * 4 * kd + ce)) / batch.weights.sum()

    def pad(tree):  # the dense form never sees the padded columns
        return jax.tree.map(np.asarray, tree)

    expected = pad(jax.grad(dense)(params["student"]))
    got = pad(gradients(batch)[0]["student"])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    _, metrics = gradients(make_batch())
    for name in ("kd", "ce"):
        parts = [metrics[f"{name}/{d}"] for d in DOMAINS]
        np.testing.assert_allclose(sum(p[0] for p in parts), metrics[name][0], rtol=1e-6)
        np.testing.assert_allclose(sum(p[1] for p in parts), metrics[name][1])
    total = 0.7 * 4 * metrics["kd"][0] + metrics["ce"][0]  # T^2 is in the weight, not in the term's own value
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=1e-5)
    # Nothing in padding matters.
    batch = make_batch()
    tokens = np.asarray(batch.tokens).copy()
    tokens[np.asarray(batch.segments) == 0] = 123
    same(gradients(batch._replace(tokens=jnp.asarray(tokens))), gradients(batch), tolerance=0)


def test_weights_of_zero_and_schedules():
    terms = {"kd": (0.0, objectives.match(divergences.forward_kl())), "ce": (1.0, objectives.next_token())}
    objective = objectives.objective(terms, vocab=250, domains=DOMAINS)
    assert not objective.uses_teacher
    student, _, params = problem()
    gradient = jax.jit(make_gradient(student, no_teacher(), objective))
    _, metrics = gradient(params, {}, make_batch(), jnp.zeros((), jnp.int32))
    assert "kd" not in metrics
    with pytest.raises(ValueError, match="no term"):
        objectives.objective({"kd": (0.0, objectives.next_token())}, vocab=250, domains=DOMAINS)
    # Schedules follow the step.
    student, teacher, params = problem()
    terms = {"kd": (lambda step: 0.1 * step, objectives.match(divergences.forward_kl(), lambda step: 1.0 + step))}
    objective = objectives.objective(terms, vocab=250, domains=DOMAINS)
    batch = make_batch()
    signal, output = teacher.signal(teacher.state, batch), student(params["student"], batch)
    values = [objective.loss({}, output, signal, batch, jnp.asarray(step)) for step in (0, 3)]
    assert values[0][0] == 0
    fixed = objectives.objective(
        {"kd": (1.0, objectives.match(divergences.forward_kl(), 4.0))}, vocab=250, domains=DOMAINS
    )
    expected = fixed.loss({}, output, signal, batch, jnp.asarray(3))
    np.testing.assert_allclose(values[1][0], 0.3 * expected[0], rtol=1e-5)
    np.testing.assert_allclose(values[1][1]["kd"][0], expected[1]["kd"][0], rtol=1e-5)


def test_no_buffer_of_the_step_is_near_tokens_times_vocabulary():
    """B x L is eight chunks and more, so nothing of B x L x V / 4 elements may exist, in any shape."""
    rows, length, vocab = 32, 64, 4096
    config = Config(vocab=vocab, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128)
    student = teacher_forward = functools.partial(transformer.forward, config)
    params = transformer.abstract(config)[0]
    teacher = online(params, teacher_forward)
    terms = {"kd": (1.0, objectives.match(divergences.forward_kl())), "ce": (1.0, objectives.next_token())}
    objective = objectives.objective(terms, vocab=vocab, domains=("all",), chunk=rows * length // 8)
    tx = optax.adamw(1e-3)
    step = jax.jit(make_step(student, teacher, objective, tx), donate_argnums=0)
    state = jax.eval_shape(lambda p: init_state({"student": p, "objective": {}}, tx), params)
    wide = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    flat = jax.ShapeDtypeStruct((rows,), jnp.int32)
    batch = Batch(wide, wide, jax.ShapeDtypeStruct((rows, length), jnp.float32), wide, wide, flat, flat)
    text = step.lower(state, {}, params, batch).compile().as_text()
    sizes = {math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d*\[(\d+(?:,\d+)*)\]", text)}
    assert max(sizes) >= rows * length // 8 * vocab  # the chunk's logits: the expression does read the program
    assert max(sizes) < rows * length * vocab / 4


def test_weight_decay_spares_norms_and_clipping_bounds_the_update():
    config = Config(vocab=250, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, qkv_bias=True, qk_norm=True)
    shapes, axes = transformer.abstract(config)
    tx = optim.adamw(1.0, axes, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.5, clip=0.0)
    params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decayed = {k for k, v in (updates | updates["layers"]).items() if k != "layers" and np.all(np.asarray(v) == -0.5)}
    assert decayed == {"embed", "q", "k", "v", "o", "gate", "up", "down"}
    rest = {k: v for k, v in (updates | updates["layers"]).items() if k not in decayed | {"layers"}}
    assert rest
    assert not any(np.any(np.asarray(v)) for v in rest.values())
    tx = optim.adamw(1.0, {"w": ("embed", "mlp")}, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip=1.0)
    params = {"w": jnp.zeros((2, 2))}
    small, _ = tx.update({"w": jnp.full((2, 2), 100.0)}, tx.init(params), params)
    np.testing.assert_allclose(small["w"], -0.5 / 1.5, rtol=1e-6)  # each entry clipped to 1/2, then g / (|g| + 1)
