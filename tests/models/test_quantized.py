"""int8 matrices: rounding error, forward pass, sampling and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of, random_params, recipe

from jaxkd.models import quantized, transformer
from jaxkd.models.transformer import Config
from jaxkd.planning import plan
from jaxkd.run import job, load
from jaxkd.sampling import generate

CONFIG = Config(vocab=100, embed=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, qk_norm=True, qkv_bias=True)
MATRICES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, random_params(CONFIG, 0))


@pytest.fixture(scope="module")
def narrow(params):
    return quantized.quantize(params)


def widened(narrow):
    stack = {name: leaf for name, leaf in narrow["layers"].items() if not name.endswith("_scale")}
    for name, summed in MATRICES.items():
        scale = narrow["layers"][name + "_scale"]
        stack[name] = stack[name] * np.expand_dims(scale, tuple(range(1, 1 + summed)))
    return {**narrow, "layers": stack}


def test_rounding_error_is_at_most_half_a_step_of_the_channel(params, narrow):
    for name, summed in MATRICES.items():
        scale = narrow["layers"][name + "_scale"]
        step = np.expand_dims(scale, tuple(range(1, 1 + summed)))
        off = np.abs(params["layers"][name] - widened(narrow)["layers"][name])
        assert (off <= step * (0.5 + 1e-4)).all(), name
        # The largest weight of each channel is at the last level.
        assert (np.abs(narrow["layers"][name]).max(tuple(range(1, 1 + summed))) == 127).all()
    weights = np.zeros((4, 3), np.float32)
    weights[:, 1] = [1, -2, 0.5, 2]
    rounded, scales = quantized.matrix(weights)
    assert (rounded[:, [0, 2]] == 0).all()
    assert scales.tolist() == [0, np.float32(2 / 127), 0]
    stack = params["layers"] | {"up": np.where(np.arange(3)[:, None, None] == 2, np.nan, params["layers"]["up"])}
    with pytest.raises(ValueError, match="'up' of layer 2"):
        quantized.quantize({**params, "layers": stack})


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def row(length=12):
    return batch_of(np.random.default_rng(1).integers(0, 100, (1, length)))


def test_forward_and_sampling_equal_those_of_the_dequantised_weights(params, narrow):
    taps = ("layer_2", "query_3")
    int8, same, exact = (
        transformer.forward(CONFIG, on_device(p), row(), taps=taps) for p in (narrow, widened(narrow), params)
    )
    np.testing.assert_allclose(int8.head.hidden, same.head.hidden, atol=2e-5)
    np.testing.assert_allclose(int8.taps["query_3"], same.taps["query_3"], atol=2e-5)
    off = np.linalg.norm(int8.head.hidden - exact.head.hidden) / np.linalg.norm(exact.head.hidden)
    assert 1e-4 < off < 0.02
    prompts, lengths = np.asarray(row().tokens[:, :4]), np.array([4])
    keys = jax.random.split(jax.random.key(0), 1)
    written = [
        generate.generate(CONFIG, on_device(p), prompts, lengths, keys, length=10, vocab=100)
        for p in (narrow, widened(narrow))
    ]
    np.testing.assert_array_equal(written[0].tokens, written[1].tokens)
    np.testing.assert_allclose(written[0].logprobs, written[1].logprobs, atol=1e-5)


def built(*overrides: str) -> job.Job:
    return job.build(recipe("tiny.py", *overrides))


def test_devices_round_as_the_host_does(params):
    traced, host = jax.jit(quantized.quantize_traced)(params), quantized.quantize(params)
    assert jax.tree.structure(traced) == jax.tree.structure(host)
    for name, leaf in host["layers"].items():
        difference = np.abs(np.asarray(traced["layers"][name], np.float32) - leaf)
        assert difference.max() <= (1 if leaf.dtype == np.int8 else 1e-6 * leaf.max())  # a half may round either way
        assert (difference > 0).mean() < 0.001 or leaf.dtype != np.int8


def test_a_job_quantises_its_teacher_after_the_student_was_cut_from_it():
    this = built("--config.teacher.dtype=int8", "--config.run.mesh.data=4", "--config.run.mesh.model=2")
    models = load.weights(
        this.models, this.experiment.student, load.Domains((), (), (), ())
    )  # not read: the layers are named
    teacher, weights = (models.teachers["teacher"]["layers"], load.host_params(this.models.teacher))
    assert {teacher[name].dtype for name in MATRICES} == {jnp.dtype("int8")}
    assert models.teachers["teacher"]["embed"].dtype == jnp.bfloat16
    assert teacher["attn_norm"].dtype == teacher["q_scale"].dtype == jnp.float32
    np.testing.assert_array_equal(models.student["layers"]["q"], weights["layers"]["q"][[0, 3]])
    # Scales are sharded as their output channels.
    assert teacher["up_scale"].sharding.spec[1] == teacher["up"].sharding.spec[2] == "model"
    assert teacher["down_scale"].sharding.spec[1] == teacher["down"].sharding.spec[2] == "data"
    # 4 layers: 32 x (4 + 2 + 2 + 4) x 8 + 3 x 32 x 64 int8, a scale of four bytes per output channel, two norms.
    layer = 32 * 12 * 8 + 3 * 32 * 64 + 4 * (8 * 8 + 32 + 2 * 64 + 32) + 4 * 2 * 32
    one = built("--config.teacher.dtype=int8", "--config.run.mesh.data=1")
    assert plan.device_bytes(plan.teacher_weights(one.models)) == 4 * layer + 2 * 32 * 384 + 4 * 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.dtype=int8"], r"run\.dtype .*teacher\.dtype"),
        (["teacher.dtype=int4"], r"teacher\.dtype .*int8"),
        (["teacher.path=self", "teacher.dtype=int8", "student.path=random"], r"teacher\.dtype"),
    ],
)
def test_dtypes_are_checked(overrides, message):
    with pytest.raises(ValueError, match=message):
        built(*[f"--config.{each}" for each in overrides])
