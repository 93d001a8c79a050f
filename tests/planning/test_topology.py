"""Names of slices, and models known by name: what a plan begins with."""

import json

import jax
import pytest
from harness import recipe

from jaxkd.models import families, transformer
from jaxkd.planning import plan, published, topology

POD = "llama_8b_to_1b.py"


def built(*overrides: str, name: str = "tiny.py"):
    return plan.build(recipe(name, *overrides), jax.devices())


@pytest.mark.parametrize(
    ("name", "grid", "chip_count", "hosts", "devices"),
    [
        ("v5litepod-256", "v5e:16x16", 256, 64, 256),
        ("v5litepod-16", "v5e:4x4", 16, 4, 16),
        ("v6e-8", "v6e:2x4", 8, 1, 8),
        ("v6e-64", "v6e:8x8", 64, 16, 64),
        ("v4-8", "v4:2x2x1", 4, 1, 4),
        ("v5p-128", "v5p:4x4x4", 64, 16, 64),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 16, 128),
        ("tpu7x-4x8x8", "tpu7x:4x8x8", 256, 64, 512),
        ("V5E:4x8", "v5e:4x8", 32, 8, 32),
    ],
)
def test_names_of_slices(name, grid, chip_count, hosts, devices):
    slices = topology.topology(name)
    assert (slices.name, slices.chips, slices.hosts, slices.devices) == (grid, chip_count, hosts, devices)


def test_cores_rings_and_several_slices():
    sentence = topology.topology("v5p-128").sentence()
    assert "64 chips, 16 hosts, 64 JAX devices" in sentence
    assert "the number in v5p-128 counts TensorCores, 2 a chip, not chips" in sentence
    assert "counts" not in topology.topology("v5p:4x4x4").sentence()
    assert "counts" not in topology.topology("v6e-64").sentence()
    assert topology.topology("v5e-256").wraps == (True, True)
    assert topology.topology("v5e-128").wraps == (False, True)
    assert topology.topology("v5p-128").wraps == (True, True, True)
    assert topology.topology("v5p-32").wraps == (False, False, False)
    slices = topology.topology("v5p-128", 2)
    assert (slices.name, slices.chips, slices.hosts, slices.devices) == ("v5p:4x4x4", 128, 32, 128)
    assert slices.options == {"num_slices": 2}
    assert topology.topology("v6e-8", 3).hosts == 3
    assert slices.wraps == topology.topology("v5p-128").wraps
    assert topology.topology("v5p:28x16x20").devices == 28 * 16 * 20  # a whole pod, in any order


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-100", r"TensorCores, 2 a chip.* 8, 16, 32, .* v5p:2x4x4"),
        ("v6e-12", r"chips.* 1, 4, 8, 16, 32, 64, 128, 256"),
        ("v5e:4x4x4", r"2 dimensions.*v5e:4x4"),
        ("h100-8", r"h100-8.* v4-64, v5e-16, v5p-64, v6e-16, tpu7x-64 or v5litepod-256"),
        # The compiler aborts the process on the first of these.
        ("v5e:64x64", r"v5e pod.* 16x16 .*--slices"),
        ("v4:16x16x32", r"v4 pod.* 16x16x16 "),
    ],
)
def test_unknown_slices_are_refused_with_those_that_are_known(name, message):
    with pytest.raises(ValueError, match=message):
        topology.topology(name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as Hugging Face counts them
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-14B", 14_768_307_200),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("Qwen/Qwen1.5-1.8B", 1_836_828_672),
        ("Qwen/Qwen1.5-14B", 14_167_290_880),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name, parameters):
    assert transformer.parameter_count(published.MODELS[name]) == parameters


def test_models_are_known_by_name_directory_or_config(tmp_path):
    config = published.MODELS["meta-llama/Llama-3.2-1B"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(families.to_hf(config)))
    for path in ("models/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct", str(tmp_path / "mine")):
        e = recipe(POD, f"--config.student.path={path}")
        assert plan.shapes(e)[path] == config
    e = recipe(POD, "--config.student.path=models/unknown")
    with pytest.raises(ValueError, match=r"student.path 'models/unknown'.*Qwen/Qwen3-32B"):
        plan.shapes(e)
    sizes = {"vocab": 128_256, "embed": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 128}
    given = [f"--config.student.shape.{key}={value}" for key, value in sizes.items()]
    e = recipe(POD, "--config.student.path=models/unknown", *given)
    assert plan.shapes(e)["models/unknown"].mlp == 128
    # A pod from names alone.
    job = built("--config.data.tokenizer=not/here", name=POD)
    assert job.mesh.size == 8
    assert job.models.vocab == 128_256
    assert plan.device_bytes(job.state.params["student"]) == pytest.approx(4 * 1_235_814_400 / 8, rel=1e-3)
    assert plan.device_bytes(plan.teacher_weights(job.models)) == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-3)
