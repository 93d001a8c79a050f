"""Teachers' signals of other kinds in the step, and what the step's devices tell each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import collectives
from test_step import TEACHER, problem
from test_teachers import CROSS, gradient

from jaxkd.core import sharding
from jaxkd.core.types import Batch, Sampled, TopK
from jaxkd.kernels.reference import logits
from jaxkd.losses import divergences
from jaxkd.losses import objective as objectives
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.planning.hlo import Program
from jaxkd.teachers.base import Teacher
from jaxkd.teachers.online import online, within
from jaxkd.train.step import make_gradient

VOCAB = TEACHER.vocab
STEP = jnp.zeros((), jnp.int32)


def stored(entries: int, temperatures: tuple[float, ...]) -> Teacher:
    """The live teacher of `problem`, of which only the largest entries and the tails are told."""
    teacher = problem()[1]

    def signal(state, batch):
        z = logits(teacher.signal(state, batch).head)[..., :VOCAB]
        lp, ids = jax.lax.top_k(jax.nn.log_softmax(z), entries)
        rest = ~jax.nn.one_hot(ids, VOCAB, dtype=bool).any(-2)
        tails = [jax.nn.logsumexp(jax.nn.log_softmax(z / t), -1, where=rest) for t in temperatures]
        return TopK(ids, lp, jnp.stack(tails, -1))

    return Teacher(teacher.state, lambda batch: batch, signal)


def assert_near(gradients, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(wanted[0]), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.slow
def test_all_but_one_entry_stored_trains_as_the_live_teacher():
    terms = {
        "kd": (0.7, objectives.match(divergences.forward_kl(), 2.0)),
        "jsd": (0.5, objectives.match(divergences.generalized_jsd(0.3))),
        "ce": (1.0, objectives.next_token()),
    }
    cached, exact = gradient(stored(VOCAB - 1, (1.0, 2.0)), terms, tails=(1.0, 2.0)), gradient(problem()[1], terms)
    assert_near(cached, exact, 3e-5)
    np.testing.assert_allclose(cached[1]["kd"], exact[1]["kd"], rtol=1e-5)


def test_nan_in_a_sparse_signal_under_padding_changes_nothing():
    teacher = stored(4, (1.0,))
    terms = {"kd": (1.0, objectives.match(divergences.reverse_kl())), "ce": (1.0, objectives.next_token())}

    def junk(state, batch):
        signal, live = teacher.signal(state, batch), batch.weights[..., None] != 0
        return TopK(signal.ids, *[jnp.where(live, x, jnp.nan) for x in signal[1:]])

    results = [gradient(teacher._replace(signal=signal), terms) for signal in (teacher.signal, junk)]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_draws_serve_cross_entropy_through_the_step():
    teacher = problem()[1]

    def signal(state, batch):
        z = logits(teacher.signal(state, batch).head)[..., :VOCAB]
        counts, ids = jax.lax.top_k(jnp.round(100_000 * jax.nn.softmax(z)).astype(jnp.int32), VOCAB)
        return Sampled(ids, counts)

    drawn = Teacher(teacher.state, lambda batch: batch, signal)
    assert_near(gradient(drawn, CROSS), gradient(teacher, CROSS), 0.02)  # counts are rounded


def test_standardised_logits_know_no_scale():
    teacher = problem()[1]
    terms = {"kd": (1.0, objectives.match(divergences.forward_kl(), 1.0, standardize=True))}

    def louder(state, batch):
        output = teacher.signal(state, batch)
        return output._replace(head=output.head._replace(scale=3.0))

    results = [gradient(teacher._replace(signal=signal), terms) for signal in (teacher.signal, louder)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("micro_batches", "tied", "sizes"),
    [
        (1, True, {"data": 4, "model": 2}),
        (2, False, {"data": 4, "model": 2}),
        (1, False, {"replica": 2, "data": 2, "model": 2}),
        (2, True, {"data": 2, "context": 2, "model": 2}),
        (2, False, {"data": 2, "teacher": 2, "model": 2}),
    ],
)
def test_heads_travel_once_a_micro_batch_and_logits_never(micro_batches, tied, sizes):
    """The compiled gradient on eight devices: sizes are chosen so that every axis is told by its length."""
    rows, length, vocab = 16, 40, 8 * 128 * 3
    student = Config(vocab=vocab, embed=72, layers=2, heads=4, kv_heads=2, head_dim=14, mlp=88, tied=tied)
    big = Config(vocab=vocab, embed=104, layers=2, heads=4, kv_heads=2, head_dim=14, mlp=88, tied=False)
    mesh = sharding.make_mesh(**sizes)
    terms = {
        "kd": (1.0, objectives.match(divergences.forward_kl(), 2.0)),
        "renyi": (1.0, objectives.match(divergences.renyi(0.5))),
        "ce": (1.0, objectives.next_token()),
    }
    objective = objectives.objective(terms, vocab=vocab - 5, domains=("all",), chunk=16)

    def placed(config, rules=sharding.RULES):
        shapes, axes = transformer.abstract(config)
        spread = sharding.shardings(axes, shapes, mesh, rules)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, spread)

    params = {"student": placed(student), "objective": {}}
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=sharding.batch_sharding(mesh))
    wide, flat = shape(jnp.int32, rows, length), shape(jnp.int32, rows)
    batch = Batch(wide, wide, shape(jnp.float32, rows, length), wide, wide, flat, flat)
    rules = sharding.of_teacher(sharding.RULES)
    teacher = online(placed(big, rules), within(rules, functools.partial(transformer.forward, big)))
    gradient = make_gradient(functools.partial(transformer.forward, student), teacher, objective, micro_batches)
    spread = jax.tree.map(lambda x: x.sharding, params)
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradient, out_shardings=(spread, None)).lower(params, teacher.state, batch, STEP)
    text = lowered.compile().as_text()
    exchanges = collectives(text)

    tokens = {rows * length // n for n in (1, 2, 4, 8)} | {rows * length // 8 // n for n in (1, 2, 4, 8)} | {16, length}
    columns = {vocab // n for n in (1, 2, 4, 8)}
    for c in exchanges:
        for shape in c.shapes:
            assert not (columns & set(shape) and tokens & set(shape)), c
    # A head's own width beside a vocabulary axis: the unembedding, its gradient, or the student's embedding.
    width = lambda c, n: [s for s in c.shapes if columns & set(s) and {n // k for k in (1, 2, 4, 8)} & set(s)]
    gathered = lambda n: sum(len(width(c, n)) for c in exchanges if c.name == "all-gather")
    reduced = lambda n: sum(len(width(c, n)) for c in exchanges if c.name in ("all-reduce", "reduce-scatter"))
    assert gathered(104) <= 2  # the teacher's embedding, for the look-up, and its unembedding
    assert reduced(104) == 0
    assert gathered(72) <= 2  # tied or not: once for the look-up, once for the head
    assert reduced(72) <= 2
    # Of the teacher's layers q, k, v, o, gate, up and down once each: the loop over the layers stands in the text once.
    layers = [s for c in exchanges if c.name == "all-gather" for s in c.shapes if 104 in s and not columns & set(s)]
    weights = [s for s in layers if {14, 44, 22} & set(s) and not tokens & set(s)]
    assert len(weights) == 7, layers
    # Each over what its width is split over: heads and MLP stay the share that `teacher` and `model` have of them.
    local = [
        math.prod(leaf.sharding.shard_shape(leaf.shape)[1:]) * sizes["data"] * sizes.get("context", 1)
        for name, leaf in teacher.state["layers"].items()
        if leaf.ndim > 2
    ]
    assert sorted(map(math.prod, weights)) == sorted(local)
    # Over `teacher` alone are gathered integers and, once a micro-batch and not in each layer, the embedding's output.
    alone = [c for c in Program(text).collectives(dict(mesh.shape)) if c.axis == "teacher" and c.op == "all-gather"]
    assert sum(c.count for c in alone if c.bytes > 4 * rows * length) <= micro_batches, alone
