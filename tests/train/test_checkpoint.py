"""Checkpoints: what a run finds again, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import sharding
from jaxkd.train.checkpoint import Checkpoints
from jaxkd.train.state import init_state

TX = optax.adamw(1e-3, mask={"student": {"w": True, "b": False}, "objective": {}})


def state_of(seed: int = 0):
    w = jax.random.normal(jax.random.key(seed), (8, 16))
    return init_state({"student": {"w": w, "b": jnp.ones(16)}, "objective": {}}, TX)


def abstract(state, mesh=None):
    def leaf(x):
        spec = jax.sharding.PartitionSpec("data") if x.ndim == 2 else jax.sharding.PartitionSpec()
        place = x.sharding if mesh is None else jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(leaf, state)


def assert_equal(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_and_progress_come_back(tmp_path):
    state, progress = state_of(), {"mixture": {"sampling": [1 / 3, 2 / 3]}, "tokens": 10**12}
    writer = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        writer.save(step, state, progress)
    writer.wait()
    assert writer.latest() == 3
    writer.close()
    reader = Checkpoints(tmp_path, read_only=True)
    read, found = reader.restore(3, abstract(state))
    assert_equal(read, state)
    assert jax.tree.structure(read) == jax.tree.structure(state)
    assert found == progress  # floats with every bit
    assert_equal(reader.restore_student(3, abstract(state).params["student"]), state.params["student"])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]
    reader.close()


def test_restores_to_another_mesh(tmp_path):
    state = state_of()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    target = abstract(state, sharding.make_mesh(8, 1))
    read, _ = checkpoints.restore(1, target)
    assert_equal(read, state)
    assert len(read.params["student"]["w"].sharding.device_set) == 8
    checkpoints.close()


def test_what_a_kill_leaves_is_not_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(), {})
    checkpoints.close()
    (tmp_path / "7").mkdir()  # no commit file
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path)
    assert again.latest() == 1
    again.close()


def test_another_model_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(), {})
    checkpoints.wait()
    w, b = jnp.ones((8, 16)), jnp.ones(16)
    narrow = init_state({"student": {"w": w[:4], "b": b}, "objective": {}}, TX)
    half = init_state({"student": {"w": w.astype(jnp.bfloat16), "b": b}, "objective": {}}, TX)
    more = init_state({"student": {"w": w, "b": b, "c": b}, "objective": {}}, optax.sgd(1.0))
    for other, message in (
        (narrow, r"1 cannot be restored: .*student.w should be float32\[4, 16\], there is float32\[8, 16\]"),
        (half, r"student.w should be bfloat16\[8, 16\], there is float32"),
        (more, r"params.student.c should be float32\[16\], there is nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(1, abstract(other))
    checkpoints.close()


def test_donated_state_is_saved_as_it_was(tmp_path):
    state = state_of()
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state))
    checkpoints.wait()
    assert_equal(checkpoints.restore(1, abstract(state_of()))[0], expected)
    checkpoints.close()
