"""A model loaded for a program of one's own: functions, arrays and tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of, random_params

from jaxkd.core.sharding import RULES
from jaxkd.data import tokenize
from jaxkd.data.load_model import load_model
from jaxkd.models import transformer
from jaxkd.models.export import export
from jaxkd.models.transformer import Config

CONFIG = Config(257, 32, 2, 4, 2, 8, 48, max_length=64, tied=False)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


@pytest.fixture(scope="module")
def directory(params, tmp_path_factory):
    tokenizer = tokenize.byte_tokenizer()
    given = {"tokenizer_json": tokenizer.json, "generation": tokenizer.generation, "card": {}}
    return export(tmp_path_factory.mktemp("models") / "m", CONFIG, jax.tree.map(np.asarray, params), **given)


@pytest.fixture(scope="module")
def batch():
    return batch_of(np.random.default_rng(0).integers(0, 257, (4, 16)))


def test_forward_params_and_tokenizer(directory, params, batch):
    forward, loaded, tokenizer = load_model(directory)
    want = transformer.forward(CONFIG, params, batch, taps=("layer_1",))
    output = forward(loaded, batch, taps=("layer_1",))
    np.testing.assert_allclose(output.head.hidden, want.head.hidden, atol=1e-6)
    np.testing.assert_allclose(output.taps["layer_1"], want.taps["layer_1"], atol=1e-6)
    assert output.aux == {}
    assert tokenizer.encode(["hé"])[0][0].tolist() == list("hé".encode())
    assert tokenizer.generation.eos == (256,)


def test_dtype_and_no_tokenizer(directory, batch):
    (directory / "tokenizer.json").rename(directory / "elsewhere")
    try:
        forward, loaded, tokenizer = load_model(directory, dtype=jnp.bfloat16)
    finally:
        (directory / "elsewhere").rename(directory / "tokenizer.json")
    assert tokenizer is None
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}
    assert forward(loaded, batch).head.hidden.dtype == jnp.bfloat16


def test_on_a_mesh_with_axes_of_other_names(directory, params, batch):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    names = {"batch": ("fsdp",), "embed": ("fsdp",), "length": ()}
    rules = {**RULES, **names, **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), ("tensor",))}
    forward, loaded, _ = load_model(directory, mesh=mesh, rules=rules)
    assert loaded["unembed"].sharding.spec == jax.P("fsdp", "tensor")
    with jax.set_mesh(mesh):
        output = jax.jit(forward)(loaded, batch)
    np.testing.assert_allclose(output.head.hidden, transformer.forward(CONFIG, params, batch).head.hidden, atol=1e-5)
