"""Checkpoints: what a run finds again, what stays, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import here
from orbax.checkpoint import type_handlers
from orbax.checkpoint._src.multihost import multislice

from jaxkd.core import sharding
from jaxkd.losses import group_dro
from jaxkd.train import guard
from jaxkd.train.checkpoint import Checkpoints
from jaxkd.train.checkpoint_errors import DamagedCheckpoint
from jaxkd.train.retention import Keep, checkpoint_directory
from jaxkd.train.state import init_state

TX = optax.adamw(1e-3, mask={"student": {"w": True, "b": False}, "objective": {}})


def state_of(seed: int = 0):
    w = jax.random.normal(jax.random.key(seed), (8, 16))
    return init_state({"student": {"w": w, "b": jnp.ones(16)}, "objective": {}}, TX)


def abstract(state, mesh=None):
    def leaf(x):
        spec = jax.sharding.PartitionSpec("data") if x.ndim == 2 else jax.sharding.PartitionSpec()
        target = x.sharding if mesh is None else jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target)

    return jax.tree.map(leaf, state)


def assert_equal(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def saved(directory, *steps, keep=None, metrics=None):
    """A directory with these steps; each holds `state_of(step)`."""
    writer = Checkpoints(directory, keep or Keep(9))
    for step in steps:
        writer.save(step, state_of(step), {"tokens": step}, (metrics or {}).get(step))
    writer.wait()
    writer.close()
    return directory


def test_state_and_progress_come_back(tmp_path):
    state, progress = state_of(), {"mixture": {"sampling": [1 / 3, 2 / 3]}, "tokens": 10**12}
    writer = Checkpoints(tmp_path, Keep(2))
    for step in (1, 2, 3):
        writer.save(step, state, progress)
    writer.wait()
    assert writer.latest() == 3
    writer.close()
    reader = Checkpoints(tmp_path, read_only=True)
    read, read_progress = reader.restore(3, abstract(state))
    assert_equal(read, state)
    assert jax.tree.structure(read) == jax.tree.structure(state)
    assert read_progress == progress  # floats with every bit
    assert_equal(reader.restore_student(3, abstract(state).params["student"]), state.params["student"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    reader.close()


def test_restores_to_another_mesh_and_what_is_donated_later(tmp_path):
    # Donated later: saved as it was.
    state = state_of()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    target = abstract(state, sharding.make_mesh(8, 1))
    read, _ = checkpoints.restore(1, target)
    assert_equal(read, state)
    assert len(read.params["student"]["w"].sharding.device_set) == 8
    checkpoints.save(2, read, {})  # and back, from eight devices to one
    checkpoints.wait()
    assert_equal(checkpoints.restore(2, abstract(state))[0], state)
    checkpoints.close()
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path / "donated")
    checkpoints.save(1, state, {})
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state))
    checkpoints.wait()
    assert_equal(checkpoints.restore(1, abstract(state_of()))[0], expected)
    checkpoints.close()


def test_every_replica_reads_for_itself(tmp_path, monkeypatch):
    """Orbax can read by one replica and send to the others, and then processes may wait for ever (orbax#3181)."""
    saved(tmp_path, 1)
    checkpoints, asked = Checkpoints(tmp_path), []
    options, arrays = checkpoints._manager._options, checkpoints._arrays
    assert options.single_host_load_and_broadcast is False
    assert not isinstance(arrays._type_handler_registry.get(jax.Array), type_handlers.SingleReplicaArrayHandler)
    restore = arrays.restore
    monkeypatch.setattr(arrays, "restore", lambda path, args: asked.append(args) or restore(path, args=args))
    monkeypatch.setattr(multislice, "broadcast_one_replica_to_all", lambda *_, **__: pytest.fail("one replica read"))

    mesh = sharding.make_mesh(2, 2, replica=2)
    sharding_of = lambda x: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(("data", "model")[: x.ndim])))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), abstract(state_of())
    )
    read, _ = checkpoints.restore(1, target)
    [arguments] = asked
    assert {type(one) for one in jax.tree.leaves(arguments.restore_args)} == {type_handlers.ArrayRestoreArgs}
    for leaf, expected in zip(jax.tree.leaves(read), jax.tree.leaves(state_of(1)), strict=True):
        assert len(leaf.addressable_shards) == 8
        assert {shard.replica_id for shard in leaf.addressable_shards} >= {0, 1}
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    checkpoints.close()


def test_what_a_kill_leaves_is_not_a_checkpoint_and_is_swept(tmp_path):
    """Empty, half-written or half-copied: without a commit file a directory is no step, whatever its name."""
    saved(tmp_path, 1)
    (tmp_path / "77").mkdir()
    (tmp_path / "7" / "train").mkdir(parents=True)
    (tmp_path / "7" / "train" / "_METADATA").write_text("{}")
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    reader = Checkpoints(tmp_path, read_only=True)
    assert (reader.steps(), reader.latest()) == ([1], 1)
    assert (tmp_path / "7" / "train" / "_METADATA").exists()  # who only reads leaves it alone
    again = Checkpoints(tmp_path)
    assert again.recover(abstract(state_of())).step == 1
    again.save(7, state_of(7), {})
    again.wait()
    assert again.steps() == [1, 7]
    again.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "7"]


def test_another_model_is_refused_by_name(tmp_path):
    saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    w, b = jnp.ones((8, 16)), jnp.ones(16)
    narrow = init_state({"student": {"w": w[:4], "b": b}, "objective": {}}, TX)
    half = init_state({"student": {"w": w.astype(jnp.bfloat16), "b": b}, "objective": {}}, TX)
    more = init_state({"student": {"w": w, "b": b, "c": b}, "objective": {}}, optax.sgd(1.0))
    less = init_state({"student": {"w": w, "b": b}, "objective": {}}, optax.sgd(1.0))
    for other, name in ((narrow, "student.w"), (half, "student.w"), (more, "student.c"), (less, "opt_state.0.*count")):
        for read in (lambda target: checkpoints.restore(1, target), checkpoints.recover):
            with pytest.raises(ValueError, match=name):
                read(abstract(other))
    assert checkpoints.steps() == [1]  # it is the config that is wrong: nothing is set aside
    checkpoints.close()


def test_a_window_of_spikes_may_begin_and_end_in_the_middle_of_a_run_and_other_parts_may_not(tmp_path):
    """optim.spike, switched on and off in a run that has checkpoints; an average and weights of domains."""
    saved(tmp_path, 1)
    checkpoints, mesh = Checkpoints(tmp_path, Keep(9)), sharding.make_mesh(8, 1)
    watched, whole = state_of()._replace(recent=guard.init()), jax.sharding.NamedSharding(mesh, jax.P())
    window = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), watched.recent)
    for target in (abstract(watched), abstract(state_of(), mesh)._replace(recent=window)):
        read, _ = checkpoints.restore(1, target)
        assert_equal(read, state_of(1)._replace(recent=guard.init()))
        assert read.recent.seen.sharding == target.recent.seen.sharding
    seen = guard.append(guard.init(), jnp.float32(3.0), jnp.float32(1.0))
    checkpoints.save(2, state_of(2)._replace(recent=seen), {"tokens": 2})
    checkpoints.wait()
    assert_equal(checkpoints.restore(2, abstract(watched))[0], state_of(2)._replace(recent=seen))
    recovered = checkpoints.recover(abstract(state_of()))
    assert (recovered.step, recovered.state.recent, recovered.progress, recovered.warnings) == (
        2,
        None,
        {"tokens": 2},
        (),
    )
    assert_equal(recovered.state, state_of(2))
    assert jax.tree.structure(recovered.state) == jax.tree.structure(state_of(2))
    checkpoints.close()
    # An average and weights of domains neither begin nor end in the middle of a run.
    plain = state_of()
    averaged = plain._replace(ema=plain.params["student"])
    weighed = plain._replace(group_dro=group_dro.init(np.asarray([0.25, 0.75])))
    whole = averaged._replace(group_dro=weighed.group_dro)
    checkpoints = Checkpoints(tmp_path / "parts", Keep(9))
    checkpoints.save(1, plain, {})
    checkpoints.save(2, whole, {})
    checkpoints.wait()
    for step, other, part in (
        (1, averaged, "ema"),
        (1, weighed, "group_dro"),
        (2, averaged, "group_dro"),
        (2, weighed, "ema"),
    ):
        with pytest.raises(ValueError, match=part) as raised:
            checkpoints.restore(step, abstract(other))
        assert not isinstance(raised.value, DamagedCheckpoint)  # the step is whole: no earlier one is taken for it
    assert_equal(checkpoints.restore(2, abstract(whole))[0], whole)
    checkpoints.close()


def test_the_newest_the_best_and_multiples_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 1.0, 6: 5.0, 7: 4.0}
    keep = Keep(1, every=3, best=1)
    # Steps without a metric are not the best.
    saved(tmp_path, 1, 2, 3, keep=keep, metrics=losses)
    again = Checkpoints(tmp_path, keep)  # another process knows the losses of the first one
    assert again.steps() == [2, 3]
    for step in (4, 5, 6):
        again.save(step, state_of(step), {}, losses[step])
    again.wait()
    assert (again.steps(), again.latest(), again.best()) == ([3, 5, 6], 6, 5)  # of equals the later
    again.rollback(5)
    again.save(7, state_of(7), {}, losses[7])
    again.wait()
    assert again.steps() == [3, 5, 7]
    again.close()
    saved(tmp_path / "metric", 1, 2, 3, 4, keep=Keep(1, best=2), metrics={1: 2.0})
    assert Checkpoints(tmp_path / "metric", read_only=True).steps() == [1, 4]
    saved(tmp_path / "metric" / "other", 1, 2, metrics={2: float("nan")})
    assert Checkpoints(tmp_path / "metric" / "other", read_only=True).best() is None
    assert Checkpoints(tmp_path / "metric" / "nothing", read_only=True).best() is None


def test_after_a_rollback_steps_are_saved_again(tmp_path):
    saved(tmp_path, 2, 4, metrics={2: 2.0, 4: 1.5})
    checkpoints = Checkpoints(tmp_path, Keep(9))
    with pytest.raises(ValueError, match="step 4"):
        checkpoints.save(3, state_of(3), {})
    with pytest.raises(ValueError, match=r"5.*2, 4"):
        checkpoints.rollback(5)
    assert checkpoints.rollback(2) == {4: "4.aside"}
    assert (checkpoints.steps(), checkpoints.best()) == ([2], 2)
    checkpoints.save(4, state_of(14), {"tokens": 14})
    checkpoints.wait()
    assert_equal(checkpoints.restore(4, abstract(state_of()))[0], state_of(14))
    assert checkpoints.rollback(2) == {4: "4.aside-2"}
    checkpoints.close()
    again = Checkpoints(tmp_path, Keep(9))  # nothing that was set aside is swept
    again.save(5, state_of(5), {})
    again.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4.aside", "4.aside-2", "5"]


def test_places_of_checkpoints_and_workdirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_directory("run/checkpoints") == checkpoint_directory(tmp_path / "run" / "checkpoints")
    for wrong in ("s3://bucket/run", "gs://", "gs:///run", "file:///run"):
        with pytest.raises(ValueError, match=wrong):
            checkpoint_directory(wrong)
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else find(name, *rest))
    with pytest.raises(ValueError, match="gcsfs"):
        Checkpoints("gs://bucket/run", read_only=True)
    done = here("evaluate", "--workdir", "gs://bucket/run")
    assert done.returncode != 0
    assert "gs://bucket/run" in done.stderr
