"""Checksums of arrays: by their definition, whatever the mesh, and of every kind of change."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.core import sharding
from jaxkd.train import manifest
from jaxkd.train.checkpoint_errors import DamagedCheckpoint

DTYPES = ("float32", "bfloat16", "int32", "int8", "bool", "float16")


def checksum(array) -> int:
    return manifest.checksums({"": array})[""]


def by_definition(array) -> int:
    """docs/checkpoints.md, an element at a time."""

    def mix(h: int) -> int:
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    array = np.asarray(array)
    words = np.frombuffer(array.tobytes(), f"<u{array.dtype.itemsize}").tolist()
    return sum(mix(word ^ mix(index + 1)) for index, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5)])
def test_checksum_is_what_is_written_down(dtype, shape):
    values = np.random.default_rng(0).normal(size=shape) * 40
    array = jnp.asarray(values).astype(dtype)
    assert checksum(array) == by_definition(array)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 2**15), "bfloat16"), ((2**14 + 1,), "float32"), ((9, 11, 256), "int8")]
)
def test_a_large_arrays_checksum_is_what_is_written_down(shape, dtype):
    """A CPU adds it up by halves, as long as there are two; where it lies on several devices, each its own part."""
    array = jnp.asarray(np.random.default_rng(2).normal(size=shape) * 40).astype(dtype)
    assert checksum(array) == by_definition(array)
    spread = jax.sharding.NamedSharding(sharding.make_mesh(8, 1), jax.P(*[None] * (len(shape) - 1)))
    assert checksum(jax.device_put(array, spread)) == by_definition(array)


def test_checksum_is_the_same_on_a_mesh_and_takes_less_than_two_arrays():
    array = jax.random.normal(jax.random.key(0), (16, 24))
    expected = by_definition(array)
    mesh = sharding.make_mesh(2, 4)
    for spec in (("data", "model"), (None, "data"), ()):
        placed = jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        assert checksum(placed) == expected
    array = jnp.ones((512, 512))
    needed = manifest._folded_checksum.lower(array).compile().memory_analysis()
    assert needed.temp_size_in_bytes < 2 * array.nbytes


def test_every_single_bit_and_every_exchange_shows():
    array = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    whole = checksum(jnp.asarray(array))
    for index in range(array.size):
        for bit in range(32):
            other = array.copy()
            other.view(np.uint32).reshape(-1)[index] ^= np.uint32(1 << bit)
            assert checksum(jnp.asarray(other)) != whole
    for a in range(array.size):  # two places changed at once
        for b in range(a):
            other = array.reshape(-1).copy()
            other[[a, b]] = other[[b, a]]
            assert checksum(jnp.asarray(other.reshape(4, 6))) != whole
    assert checksum(jnp.asarray(-array)) != whole  # all signs: an even number of equal changes
    assert checksum(jnp.asarray(array.T.reshape(4, 6))) != whole
    assert checksum(jnp.zeros((4, 6))) != checksum(jnp.full((4, 6), -0.0))


STATE = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}, "step": jnp.int32(4)}


def test_a_manifest_is_read_as_it_was_made():
    progress = {"tokens": 10**12, "shares": [1 / 3, 2 / 3], "rows": {"b": "x", "a": None}}
    text = json.dumps(manifest.build(7, STATE, progress, metric=2.5))
    read = manifest.parse(text, 7)
    assert (read.step, read.metric) == (7, 2.5)
    assert str(read.leaves["params.w"]) == "float32[2, 3]"
    manifest.verify_checksums(read.leaves, manifest.arrays_by_path(STATE))
    assert manifest.parse_progress(read, json.dumps(progress, indent=1)) == progress
    with pytest.raises(DamagedCheckpoint, match="step 7"):
        manifest.parse(text, 8)
    for old, new in (("2.5", "1.5"), ("float32", "bfloat16"), ('"step": 7', '"step": 8'), ("{", "")):
        with pytest.raises(DamagedCheckpoint, match="manifest"):
            manifest.parse(text.replace(old, new, 1), 7)
    with pytest.raises(ValueError, match="format 9") as raised:
        manifest.parse(text.replace('"format": 1', '"format": 9'), 7)
    assert not isinstance(raised.value, DamagedCheckpoint)  # a later version is no reason to go back
    with pytest.raises(DamagedCheckpoint, match="mixture"):
        manifest.parse_progress(read, json.dumps(progress | {"tokens": 1}))
    with pytest.raises(DamagedCheckpoint, match=r"params\.w"):
        manifest.verify_checksums(read.leaves, {"params.w": STATE["params"]["w"].at[1, 1].add(1e-6)})


@pytest.mark.parametrize("metric", [float("nan"), float("inf"), -float("inf"), None])
def test_a_metric_that_is_not_finite_is_none(metric):
    assert manifest.build(1, STATE, {}, metric)["metric"] is None
