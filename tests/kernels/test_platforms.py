"""The XLA implementation lowers for GPUs and TPUs."""

import jax
import jax.numpy as jnp
import pytest
from dense import STORED

from jaxkd.core.sharding import make_mesh
from jaxkd.core.types import Head, Sampled, TopK
from jaxkd.kernels.api import linear_divergence, refusal

TOKENS, COLUMNS = 256, 1024


@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
@pytest.mark.parametrize("teacher", [Head, TopK, Sampled])
def test_every_term_lowers(platform, teacher):
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    ids, numbers = shape(TOKENS, 8, dtype=jnp.int32), shape(TOKENS, 8, dtype=jnp.float32)
    signals = {
        Head: Head(shape(TOKENS, 128), shape(128, COLUMNS)),
        TopK: TopK(ids, numbers, shape(TOKENS, 1, dtype=jnp.float32)),
        Sampled: Sampled(ids, ids),
    }
    terms = tuple(term for term in STORED.values() if refusal(term, teacher) is None)
    assert len(terms) >= 4

    def value(hidden, unembed, signal, targets):
        weights = jnp.ones((len(terms), TOKENS))
        return linear_divergence(
            terms, Head(hidden, unembed), signal, targets, weights, (1.0,) * len(terms), vocab=1000, chunk=64
        )[0]

    unembed = shape(64, COLUMNS, dtype=jnp.float32)
    arguments = (shape(TOKENS, 64), unembed, signals[teacher], shape(TOKENS, dtype=jnp.int32))
    exported = jax.export.export(jax.jit(jax.value_and_grad(value, (0, 1))), platforms=[platform])(*arguments)
    assert exported.platforms == (platform,)
    assert "stablehlo.while" in exported.mlir_module()


def test_the_sharded_form_lowers_for_gpus():
    mesh = make_mesh(4, 2)
    terms = tuple(term for term in STORED.values() if refusal(term, Head) is None)

    def value(student, teacher, targets):
        weights = jnp.ones((len(terms), TOKENS))
        return linear_divergence(terms, student, teacher, targets, weights, (1.0,) * len(terms), vocab=1000, chunk=8)[0]

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    heads = [Head(shape(TOKENS, width), shape(width, COLUMNS)) for width in (64, 128)]
    with jax.set_mesh(mesh):
        exported = jax.export.export(jax.jit(jax.grad(value)), platforms=["cuda"])(
            *heads, jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
        )
    assert exported.nr_devices == 8
