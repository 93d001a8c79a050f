"""Objectives with feature terms: taps, the sum of terms, the step, meshes, a frozen student."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import random_params

from jaxkd.core import sharding
from jaxkd.core.types import Batch
from jaxkd.kernels.attention import segment_attention
from jaxkd.losses import divergences, features
from jaxkd.losses import objective as objectives
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.teachers.base import Teacher
from jaxkd.teachers.online import online
from jaxkd.train.state import assemble, init_state
from jaxkd.train.step import make_gradient, make_step

STUDENT = Config(vocab=250, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, qk_norm=True)
TEACHER = Config(vocab=250, embed=48, layers=3, heads=6, kv_heads=2, head_dim=8, mlp=64, tied=False)
DOMAINS = ("code", "law")
STEP = jnp.zeros((), jnp.int32)


def make_batch(rows=8, length=16) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 250, (rows, length)).astype(np.int32)
    segments = np.repeat([[1] * 7 + [2] * 5 + [0] * (length - 12)], rows, 0).astype(np.int32)
    positions = np.repeat([[*range(7), *range(5), *([0] * (length - 12))]], rows, 0).astype(np.int32)
    weights = np.zeros((rows, length), np.float32)
    weights[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    weights[1, 3:] = 0
    weights[5] = 0
    index = np.arange(rows, dtype=np.int32)
    return Batch(*map(jnp.asarray, (tokens, np.roll(tokens, -1, 1), weights, segments, positions, index, index % 2)))


BATCH = make_batch()


@functools.lru_cache
def models():
    student, teacher = (functools.partial(transformer.forward, c) for c in (STUDENT, TEACHER))
    return student, random_params(STUDENT, 0), online(random_params(TEACHER, 1), teacher)


def initial_params(objective, key=0):
    """The student's parameters and the objective's initial ones."""
    student, params, teacher = models()
    outputs = [
        jax.eval_shape(functools.partial(f, taps=taps), p, BATCH)
        for f, p, taps in (
            (student, params, objective.student_taps),
            (functools.partial(transformer.forward, TEACHER), teacher.state, objective.teacher_taps),
        )
    ]
    return {"student": params, "objective": objective.init(jax.random.key(key), *outputs)}


def total(terms, **options):
    return objectives.objective(terms, vocab=250, domains=DOMAINS, **options)


# ------------------------------------------------------------------------------------------ the taps


def scans(jaxpr):
    return [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]


def stacked(eqn) -> int:
    """Outputs with a value per layer; a scan's carry has the shapes that its body takes."""
    length, carried = eqn.params["length"], [var.aval.shape for var in eqn.params["jaxpr"].jaxpr.outvars]
    return sum(var.aval.shape == (length, *inner) for var, inner in zip(eqn.outvars, carried, strict=True))


@pytest.mark.parametrize("remat", transformer.REMAT)
def test_only_a_tapped_layer_stores_activations(remat):
    deep = dataclasses.replace(STUDENT, layers=4)
    forward, params = functools.partial(transformer.forward, deep, remat=remat), transformer.abstract(deep)[0]
    plain = jax.make_jaxpr(forward)(params, BATCH)
    assert [stacked(eqn) for eqn in scans(plain)] == [0]
    assert scans(plain)[0].params["length"] == 4
    taps = ("query_3", "key_3")
    tapped = jax.make_jaxpr(functools.partial(forward, taps=taps))(params, BATCH)
    assert [(eqn.params["length"], stacked(eqn)) for eqn in scans(tapped)] == [(2, 0), (1, 2), (1, 0)]


def test_attention_of_the_taps_is_that_of_the_layer():
    names = ("layer_1", "layer_2", "query_2", "key_2", "value_2")
    _, params, _ = models()
    taps = transformer.forward(STUDENT, params, BATCH, taps=names).taps
    assert set(taps) == set(names)
    assert taps["query_2"].shape == (8, 16, 4, 8)
    assert taps["key_2"].shape == taps["value_2"].shape == (8, 16, 2, 8)
    layer = jax.tree.map(lambda a: a[1], params["layers"])
    y = segment_attention(taps["query_2"], taps["key_2"], taps["value_2"], BATCH.segments)
    x = taps["layer_1"] + jnp.einsum("blhk,hkd->bld", y, layer["o"])
    y = transformer.rms_norm(x, layer["mlp_norm"], STUDENT.norm_eps)
    x = x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
    np.testing.assert_allclose(taps["layer_2"], x, atol=1e-5)


def test_taps_and_their_gradients_are_the_same_when_rematerialised():
    def loss(params, remat):
        output = transformer.forward(STUDENT, params, BATCH, taps=("layer_1", "query_2", "value_1"), remat=remat)
        return sum(jnp.sum(jnp.sin(x)) for x in output.taps.values()) + jnp.sum(output.head.hidden), output.taps

    plain, remat = (jax.jit(jax.grad(functools.partial(loss, remat=r), has_aux=True)) for r in transformer.REMAT)
    for got, want in zip(jax.tree.leaves(remat(models()[1])), jax.tree.leaves(plain(models()[1])), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["query_3", "layer_0", "head_1", "layer", "key_x"])
def test_unknown_tap_raises(name):
    with pytest.raises(ValueError, match=f"no tap '{name}': this model has layer_1 to layer_2, query_1 to query_2"):
        transformer.forward(STUDENT, models()[1], BATCH, taps=(name,))


# ------------------------------------------------------------------------------------------ the sum


@functools.lru_cache
def all_terms():
    return total(
        {
            "kd": (0.5, objectives.match(divergences.forward_kl(), 2.0)),
            "hid": (3.0, features.hidden_mse({1: 2})),
            "rel": (lambda step: 0.5 + step, features.relations({2: 3}, 4, ("qk",))),
            "cka": (0.3, features.linear_cka({2: 3})),
            "ce": (1.0, objectives.next_token()),
            "ted": (2.0, features.ted_match({2: 3})),
        }
    )


@functools.lru_cache
def program(micro_batches: int):
    student, _, teacher = models()
    return jax.jit(make_gradient(student, teacher, all_terms(), micro_batches))


@functools.lru_cache
def reference():
    return program(1)(initial_params(all_terms()), models()[2].state, BATCH, STEP)


def assert_equal(left, right):
    """Relative L2 per gradient leaf, and every metric's sum and weight."""
    for (path, a), b in zip(jax.tree.leaves_with_path(left[0]), jax.tree.leaves(right[0]), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)
    assert left[1].keys() == right[1].keys()
    for name in left[1]:
        np.testing.assert_allclose(left[1][name], right[1][name], rtol=1e-5, atol=1e-6)


def test_parameters_are_keyed_by_term():
    params = initial_params(all_terms())["objective"]
    assert {name: sorted(term) for name, term in params.items()} == {
        "hid": ["layer_1"],
        "ted": ["student_layer_2", "teacher_layer_3"],
    }
    plain = total({"ce": (1.0, objectives.next_token()), "cka": (1.0, features.linear_cka({1: 1}))})
    assert initial_params(plain)["objective"] == {}
    assert total({"ce": (1.0, objectives.next_token())}).init(jax.random.key(0)) == {}


def test_loss_is_the_weighted_sum_and_terms_report_unweighted_means():
    _, metrics = reference()
    mean = {name: float(s / w) for name, (s, w) in metrics.items()}
    parts = (
        0.5 * 4 * mean["kd"] + 3 * mean["hid"] + 0.5 * mean["rel"] + 0.3 * mean["cka"] + mean["ce"] + 2 * mean["ted"]
    )
    assert mean["loss"] == pytest.approx(parts, rel=1e-5)
    for name in ("kd", "hid", "rel", "cka", "ce", "ted"):
        assert mean[name] > 1e-4
        of_domains = [metrics[f"{name}/{d}"] for d in DOMAINS]
        np.testing.assert_allclose(sum(p[0] for p in of_domains), metrics[name][0], rtol=1e-5)
        assert sum(p[1] for p in of_domains) == metrics[name][1] == BATCH.weights.sum()
    later = program(1)(initial_params(all_terms()), models()[2].state, BATCH, STEP + 2)[1]
    np.testing.assert_allclose(later["loss"][0], metrics["loss"][0] + 2 * metrics["rel"][0], rtol=1e-5)
    np.testing.assert_allclose(later["rel"][0], metrics["rel"][0], rtol=1e-6)


def test_micro_batches_equal_the_whole_batch():
    assert_equal(program(4)(initial_params(all_terms()), models()[2].state, BATCH, STEP), reference())


@pytest.mark.slow
def test_eight_devices_equal_one():
    mesh = sharding.make_mesh(2, 2, context=2)
    params, state = initial_params(all_terms()), models()[2].state
    with jax.set_mesh(mesh):

        def place(tree, model):
            shapes, axes = transformer.abstract(model)
            return jax.device_put(tree, sharding.shardings(axes, shapes, mesh))

        wide = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        placed = {"student": place(params["student"], STUDENT), "objective": jax.device_put(params["objective"], wide)}
        batch = jax.device_put(BATCH, sharding.batch_sharding(mesh))
        assert_equal(program(1)(placed, place(state, TEACHER), batch, STEP), reference())


def test_nan_in_padding_of_either_model_changes_nothing():
    student, _, teacher = models()

    def with_nan_padding(forward):
        def set_nan(x):
            padding = (BATCH.segments == 0).reshape(*BATCH.segments.shape, *[1] * (x.ndim - 2))
            return jnp.where(padding, jnp.nan, x)

        def corrupted(params, batch, taps=()):
            output = forward(params, batch, taps=taps)
            head = output.head._replace(hidden=set_nan(output.head.hidden))
            return output._replace(head=head, taps=jax.tree.map(set_nan, output.taps))

        return corrupted

    junk = online(teacher.state, with_nan_padding(functools.partial(transformer.forward, TEACHER)))
    gradient = jax.jit(make_gradient(with_nan_padding(student), junk, all_terms()))
    assert_equal(gradient(initial_params(all_terms()), teacher.state, BATCH, STEP), reference())


def test_features_without_vocabulary_terms_call_no_kernel(monkeypatch):
    monkeypatch.setattr(objectives, "linear_divergence", None)
    student, _, teacher = models()
    objective = total({"hid": (1.0, features.hidden_mse({1: 1}))})
    jax.eval_shape(make_gradient(student, teacher, objective), initial_params(objective), teacher.state, BATCH, STEP)


@pytest.mark.slow
def test_factors_scale_a_term_but_not_its_metric_or_the_token_weight():
    """With factors per token on one term, the gradient is the sum of the separate terms' gradients."""
    student, params, teacher = models()
    ce, kd = (1.0, objectives.next_token()), (0.5, objectives.match(divergences.forward_kl(), 2.0))
    by_token = jnp.asarray(np.random.default_rng(0).uniform(-1, 2, BATCH.tokens.shape), jnp.float32)
    params = {"student": params, "objective": {}}

    def gradient(terms, batch=BATCH, micro_batches=1, **factors):
        function = make_gradient(student, teacher, total(terms), micro_batches)
        return jax.jit(function)(params, teacher.state, batch, STEP, factors=factors)

    grads, metrics = gradient({"kd": kd, "ce": ce}, ce=by_token)
    alone, plain = gradient({"kd": kd})
    weighted, _ = gradient({"ce": ce}, BATCH._replace(weights=BATCH.weights * by_token))
    share = (BATCH.weights * by_token).sum() / BATCH.weights.sum()  # the step divided by the scaled weights there
    expected = jax.tree.map(lambda a, b: a + share * b, alone, weighted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected)
    np.testing.assert_allclose(metrics["kd"], plain["kd"], rtol=1e-6)
    assert metrics["loss"][1] == BATCH.weights.sum()
    split, _ = gradient({"kd": kd, "ce": ce}, micro_batches=2, ce=by_token)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), split, grads)
    with pytest.raises(ValueError, match="'advantage'"):
        gradient({"ce": ce}, advantage=by_token)


def test_forward_without_taps_argument_works_without_features():
    student, params, teacher = models()
    bare = lambda params, batch: student(params, batch)
    objective = total({"ce": (1.0, objectives.next_token())})
    jax.eval_shape(make_gradient(bare, teacher, objective), {"student": params, "objective": {}}, {}, BATCH, STEP)


def test_teacher_without_features_raises():
    cached = Teacher({}, lambda batch: batch, lambda state, batch: None)
    objective = total({"ce": (1.0, objectives.next_token()), "rel": (1.0, features.relations({1: 2}, 4, ("vv",)))})
    with pytest.raises(
        ValueError, match=r"objective\.rel needs the teacher's value_2, but this teacher's signal has no"
    ):
        make_gradient(models()[0], cached, objective)
    student, params, _ = models()
    bare = jax.eval_shape(student, params, BATCH)
    with pytest.raises(ValueError, match=r"objective\.rel needs the student's value_1, but its output has no taps"):
        objective.init(jax.random.key(0), bare, bare)


def test_projectors_train():
    student, _, teacher = models()
    objective = total({"hid": (1.0, features.hidden_mse({2: 3})), "cos": (1.0, features.hidden_cosine({1: 1}))})
    tx = optax.adam(3e-3)
    state = init_state(initial_params(objective), tx)
    step = jax.jit(make_step(student, teacher, objective, tx))
    losses = []
    for _ in range(25):
        before = state
        state, metrics = step(state, {}, teacher.state, BATCH)
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < 0.5 * losses[0]
    for name, tap in (("hid", "layer_2"), ("cos", "layer_1")):
        assert (state.params["objective"][name][tap] != before.params["objective"][name][tap]).any()


# ------------------------------------------------------------------------- a frozen student


def test_frozen_student_has_no_backward_pass_and_no_moments():
    student, _, teacher = models()
    terms = {"hid": (1.0, features.hidden_mse({2: 3}))}
    flops, sizes = [], []
    objective = total(terms)
    params = initial_params(objective)
    for trained, frozen in ((params, {}), (params | {"student": {}}, params["student"])):
        tx = optax.adamw(1e-2, weight_decay=0.5)
        state = init_state(trained, tx)
        step = jax.jit(make_step(student, teacher, objective, tx))
        program = step.lower(state, frozen, teacher.state, BATCH).compile()
        flops.append(program.cost_analysis()["flops"])
        sizes.append(sum(x.size for x in jax.tree.leaves(state.opt_state)))
    after, metrics = program(state, frozen, teacher.state, BATCH)
    assert after.params["student"] == {}
    assert (after.params["objective"]["hid"]["layer_2"] != state.params["objective"]["hid"]["layer_2"]).any()
    assert metrics["grad_norm"][0] > 0
    assert flops[1] < 0.75 * flops[0]
    assert sizes[1] <= 2 * 32 * 48 + 2


def test_partly_frozen_student():
    """Trained arrays get the same gradients as in full training, frozen ones do not change."""
    student, params, teacher = models()
    objective, tx = total({"ce": (1.0, objectives.next_token())}), optax.sgd(0.5)
    frozen = {"embed": params["embed"], "layers": {"q": params["layers"]["q"]}}
    layers = {name: leaf for name, leaf in params["layers"].items() if name != "q"}
    trained = {name: leaf for name, leaf in params.items() if name != "embed"} | {"layers": layers}
    step = jax.jit(make_step(student, teacher, objective, tx))
    whole, _ = step(init_state({"student": params, "objective": {}}, tx), {}, teacher.state, BATCH)
    after, _ = step(init_state({"student": trained, "objective": {}}, tx), frozen, teacher.state, BATCH)
    expected = whole.params["student"] | frozen
    expected["layers"] = whole.params["student"]["layers"] | frozen["layers"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        assemble(after.params["student"], frozen),
        expected,
    )
    with pytest.raises(ValueError, match="'embed'"):
        assemble(params, frozen)


def test_constant_weight_zero_removes_a_feature_and_its_taps():
    objective = total({"ce": (1.0, objectives.next_token()), "hid": (0.0, features.hidden_mse({1: 1}))})
    assert not objective.uses_teacher
    assert objective.student_taps == objective.teacher_taps == ()
    assert total({"hid": (1e-9, features.hidden_mse({1: 1}))}).uses_teacher
