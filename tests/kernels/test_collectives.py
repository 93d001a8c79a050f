"""Collectives of the compiled loss: sums per token in the loop, each head once outside it."""

import re

import jax
import jax.numpy as jnp
import pytest
from dense import FAMILY
from harness import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.core.sharding import make_mesh
from jaxkd.core.types import Head, TopK
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences as d

# Sizes that identify an axis in a shape, sharded or not.
ROWS, LENGTH, COLUMNS, STUDENT, TEACHER, CHUNK, ENTRIES = 8, 96, 8 * 1000, 8 * 11, 8 * 13, 24, 5
TOKENS = ROWS * LENGTH
LOCAL_TOKENS = {TOKENS // n for n in (1, 2, 4, 8)} | {CHUNK}
LOCAL_COLUMNS = {COLUMNS // n for n in (1, 2, 4, 8)}


def compiled(mesh, terms, teacher, temperatures):
    place = lambda x, *axes: jax.ShapeDtypeStruct(x, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))
    lies = (("replica", "data"), "context")
    tokens = lambda *more, dtype=jnp.float32: jax.ShapeDtypeStruct(
        (ROWS, LENGTH, *more), dtype, sharding=NamedSharding(mesh, P(*lies))
    )
    # Parameters sharded as in training: the width over `data` and `context`, the vocabulary over `model`.
    whole = (("data", "context"), "model")
    student = Head(tokens(STUDENT), place((STUDENT, COLUMNS), *whole))
    if teacher == "head":
        signal = Head(tokens(TEACHER), place((TEACHER, COLUMNS), *whole))
    else:
        signal = TopK(tokens(ENTRIES, dtype=jnp.int32), tokens(ENTRIES), tokens(1))

    def value(student, signal, targets, weights):
        return linear_divergence(
            terms, student, signal, targets, weights, temperatures, vocab=COLUMNS - 7, chunk=CHUNK
        )[0]

    gradient = jax.grad(value)
    out = Head(student.hidden.sharding, student.unembed.sharding)
    with jax.set_mesh(mesh):
        shape, place = (len(terms), ROWS, LENGTH), NamedSharding(mesh, P(None, *lies))
        weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        lowered = jax.jit(gradient, out_shardings=out).lower(student, signal, tokens(dtype=jnp.int32), weights)
    return collectives(lowered.compile().as_text())


@pytest.mark.parametrize(
    ("sizes", "teacher"),
    [
        ({"data": 8, "model": 1}, "head"),
        ({"data": 4, "model": 2}, "topk"),
        ({"data": 1, "model": 8}, "head"),
        ({"data": 1, "model": 8}, "topk"),
        ({"replica": 2, "data": 2, "model": 2}, "head"),
        ({"data": 2, "context": 2, "model": 2}, "head"),
        ({"replica": 2, "data": 1, "context": 4, "model": 1}, "topk"),
    ],
)
def test_loop_exchanges_sums_per_token_only(sizes, teacher):
    terms = (d.forward_kl(), d.adaptive_kl(), d.renyi(0.5), d.next_token())
    found = compiled(make_mesh(**sizes), terms, teacher, (2.0, 2.0, 2.0, 1.0) if teacher == "head" else (1.0,) * 4)
    outside = [c for c in found if not c.in_loop]
    for c in found:
        for shape in c.shapes:
            assert not (LOCAL_TOKENS & set(shape) and LOCAL_COLUMNS & set(shape)), c
            if c.in_loop:
                assert set(shape) <= {CHUNK, ENTRIES, 1}, c
    assert (sizes["model"] > 1) == any(c.in_loop for c in found)
    # Each unembedding is gathered at most once, and its gradient reduced at most once.
    whole = [c for c in outside if any(LOCAL_COLUMNS & set(shape) for shape in c.shapes)]
    gathers = [c for c in whole if c.name == "all-gather"]
    reduces = [c for c in whole if c.name in ("all-reduce", "reduce-scatter")]
    heads = 2 if teacher == "head" else 1
    sharded = sizes["data"] * sizes.get("context", 1) > 1
    assert sum(len(c.shapes) for c in gathers) == heads * sharded, gathers
    assert sum(len(c.shapes) for c in reduces) == (sizes["model"] < 8), reduces
    assert len(gathers) + len(reduces) == len(whole), whole
    # All others are at most one number per token: flattening does not move tokens.
    assert {c.name for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}, found


def test_every_divergence_exchanges_sums_per_token_only():
    found = compiled(make_mesh(1, 8), tuple(FAMILY.values()), "head", (1.0,) * len(FAMILY))
    assert found
    assert {size for c in found if c.in_loop for shape in c.shapes for size in shape} <= {CHUNK, 1}


def test_parser_finds_collectives_in_loops():
    """In a program that gathers logits in a loop."""
    mesh = make_mesh(1, 8)

    def bad(x, w):
        gathered = lambda row: jax.lax.all_gather(row @ w, "model", axis=1, tiled=True).max()
        return jax.lax.map(gathered, x.reshape(4, 24, 16)).sum()

    with jax.set_mesh(mesh):
        spread = jax.shard_map(bad, in_specs=(P(), P(None, "model")), out_specs=P(), check_vma=False)
        text = jax.jit(spread).lower(jnp.ones((96, 16)), jnp.ones((16, COLUMNS))).compile().as_text()
    assert any(c.in_loop and (24, COLUMNS) in c.shapes for c in collectives(text)), re.findall("all-.*", text)
