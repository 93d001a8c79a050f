"""Mesh and sharding tables: specs, slices, and a job on a mesh."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import REPOSITORY

from jaxkd.config.recipe import read_config
from jaxkd.config.schema import experiment
from jaxkd.core import sharding
from jaxkd.planning import plan
from jaxkd.run import job, load, program
from jaxkd.run import teacher as teaching
from jaxkd.run.batch import rows_batch
from jaxkd.train.state import init_state


def test_specs_follow_the_table_and_never_use_an_axis_twice():
    mesh = sharding.make_mesh(4, 2)
    assert sharding.spec(("vocab", "embed"), (128, 64), mesh) == jax.sharding.PartitionSpec("model", "data")
    assert sharding.spec(("heads", "mlp"), (8, 64), mesh) == jax.sharding.PartitionSpec("model", None)
    assert sharding.spec(("heads", "embed"), (9, 64), mesh) == jax.sharding.PartitionSpec(None, "data")
    with pytest.raises(ValueError, match="no sharding rule for logical axis 'width'"):
        sharding.spec(("width",), (8,), mesh)
    wide = sharding.make_mesh(2, 1, replica=2, context=2)
    spec = jax.sharding.PartitionSpec
    assert sharding.spec(("batch", "length", None), (8, 64, 32), wide) == spec(("replica", "data"), "context", None)
    assert sharding.spec(("embed", "mlp"), (64, 32), wide) == spec(("data", "context"), None)
    assert sharding.spec(("embed", "mlp"), (6, 32), wide) == spec(
        "data", None
    )  # axes that do not divide are dropped from the end
    assert sharding.spec(("embed", "mlp"), (64, 32), wide, sharding.TABLES["replicated"]) == spec(None, None)
    moments = sharding.spec(("embed", "mlp"), (64, 32), wide, sharding.MOMENTS)
    assert moments == spec(("data", "context", "replica"), None)


def test_teacher_axis_shards_rows_of_the_student_and_layers_of_the_teacher():
    mesh, spec = sharding.make_mesh(2, 2, teacher=2), jax.sharding.PartitionSpec
    teacher = sharding.of_teacher(sharding.TABLES["fsdp"])
    assert sharding.spec(("batch", "mlp"), (8, 64), mesh) == spec(("data", "teacher"), "model")
    assert sharding.spec(("batch", "mlp"), (8, 64), mesh, teacher) == spec("data", ("teacher", "model"))
    assert sharding.spec(("vocab", "embed"), (64, 64), mesh) == spec("model", ("data", "teacher"))
    assert sharding.spec(("vocab", "embed"), (64, 64), mesh, teacher) == spec("model", "data")
    assert sharding.spec(("kv_heads", "embed"), (2, 64), mesh, teacher) == spec("teacher", "data")
    whole = sharding.of_teacher(sharding.TABLES["replicated"])
    assert sharding.spec(("embed", "heads"), (64, 8), mesh, whole) == spec(None, ("teacher", "model"))


def test_axes_that_do_not_divide_are_reported():
    shapes, axes = {"q": jnp.zeros((64, 9))}, {"q": ("embed", "heads")}
    assert sharding.replicated_axes(axes, shapes, sharding.make_mesh(4, 2)) == [
        "axis 'heads' of size 9 does not divide over model=2: replicated"
    ]
    shapes = {"q": jnp.zeros((66, 8))}
    assert sharding.replicated_axes(axes, shapes, sharding.make_mesh(2, 2, context=2)) == [
        "axis 'embed' of size 66 does not divide over data=2 x context=2: split over data only"
    ]
    assert (
        sharding.replicated_axes(axes, shapes, sharding.make_mesh(2, 2, context=2), sharding.TABLES["replicated"]) == []
    )


@dataclasses.dataclass
class Chip:
    """A fake TPU device of a 4 x 4 slice."""

    slice_index: int
    coords: tuple[int, int, int]
    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


def chips_of(slices: int) -> list[Chip]:
    return [Chip(s, (i % 4, i // 4, 0), 16 * s + i) for s in range(slices) for i in range(16)]


@pytest.mark.parametrize("model", [1, 2, 4])  # 8 x 2 splits an axis of the torus
def test_only_replica_axis_spans_slices(model):
    """Checks `place`, since a JAX Mesh does not accept fake devices."""
    grid = sharding.place((2, 16 // model, 1, model), chips_of(2))
    assert grid.shape == (2, 16 // model, 1, model)
    for number, replica in enumerate(grid):
        assert {chip.slice_index for chip in replica.ravel()} == {number}
        for line in replica.reshape(-1, model):  # neighbours, not across the slice
            steps = [abs(np.subtract(a.coords, b.coords)).sum() for a, b in itertools.pairwise(line)]
            assert all(step == 1 for step in steps)
    assert sharding.place((4, 4, 1, 2), chips_of(2)).shape == (4, 4, 1, 2)  # two replicas in each slice


def test_tpus_without_slice_index_are_one_slice():
    """As libtpu describes the devices of a single-slice topology."""
    assert sharding.slices([types.SimpleNamespace(platform="tpu")] * 4) == 1
    assert sharding.slices(chips_of(3)) == 3


def test_invalid_meshes_raise():
    with pytest.raises(ValueError, match=r"run.mesh is replica=3 x data=1 x model=2 = 6 devices, but there are 8"):
        sharding.make_mesh(-1, 2, replica=3)
    with pytest.raises(ValueError, match=r"sizes from 1 on, or -1 for replica and data, got .*model=0"):
        sharding.make_mesh(8, 0)
    with pytest.raises(ValueError, match=r"these devices are 2 slices.*multiple of 2, or -1, got 1"):
        sharding.make_mesh(32, 1, chips_of(2))


# ------------------------------------------------------------------------------------------ a job


def built(*overrides: str, **sizes: int) -> job.Job:
    """The tiny recipe on a mesh; vocabulary, heads and width divide over each of its axes."""
    recipe = f"--config={REPOSITORY / 'configs' / 'tiny.py'}"
    mesh = [f"--config.run.mesh.{name}={size}" for name, size in sizes.items()]
    return job.build(experiment(read_config([recipe, *mesh, *overrides])))


def axes_of(tree) -> set[str]:
    """The mesh axes that any of a tree's arrays is split over."""
    specs = [leaf.spec for leaf in jax.tree.leaves(tree)]
    return {name for spec in specs for part in spec if part for name in ((part,) if isinstance(part, str) else part)}


def test_teacher_axis_gives_the_same_outputs_in_the_students_sharding():
    """Hidden states and taps equal those of one device and are sharded like the student's."""
    sizes, spec = {"data": 2, "teacher": 2, "model": 2}, jax.sharding.PartitionSpec
    outputs, taps = [], ("layer_2", "query_3", "value_3")
    for this in (built(data=1), built(**sizes)):
        with jax.set_mesh(this.mesh):
            params = load.teachers(this.models)[0]["teacher"]
            outputs.append(jax.jit(functools.partial(this.models.teacher.forward, taps=taps))(params, batch(this, 0)))
    one, many = outputs
    trailing = {"layer_2": (), "query_3": (None, "model"), "value_3": (None, "model")}
    for name, x in {"layer_2": many.head.hidden, **many.taps}.items():
        expected = jax.sharding.NamedSharding(this.mesh, spec(("data", "teacher"), *trailing[name]))
        assert x.sharding.is_equivalent_to(expected, x.ndim), name
    for a, b in zip(
        jax.tree.leaves(one._replace(head=one.head.hidden)),
        jax.tree.leaves(many._replace(head=many.head.hidden)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    job = built(**sizes)
    assert (
        axes_of(job.models.teacher.shardings["layers"])
        == axes_of(job.models.student.shardings)
        == {"data", "teacher", "model"}
    )
    assert axes_of(job.models.teacher.shardings["embed"]) == {"data", "model"}
    # Shards of a layer are as small as with a `model` axis of twice the size.
    wide = built(data=2, model=4)
    shard_shape_of = lambda job, name: job.models.teacher.shardings["layers"][name].shard_shape(
        job.models.teacher.shapes["layers"][name].shape
    )
    assert [shard_shape_of(job, name) for name in ("q", "o", "up", "down")] == [
        shard_shape_of(wide, name) for name in ("q", "o", "up", "down")
    ]


def test_moments_are_sharded_over_replicas_too():
    whole = built(data=1).state
    sharded = built(replica=2, data=2, context=2).state
    student_bytes = plan.device_bytes(whole.params["student"])
    assert plan.device_bytes(sharded.params["student"]) == student_bytes // 4
    # Two moments of each parameter, and a few counters.
    assert 2 * student_bytes / 8 <= plan.device_bytes(sharded.opt_state) < 2 * student_bytes / 8 + 100


def test_either_model_may_be_replicated_over_data():
    replicated = built("--config.teacher.sharding=replicated", data=4, model=2)
    assert axes_of(replicated.models.teacher.shardings) == {"model"}
    assert axes_of(replicated.models.student.shardings) == {"data", "model"}
    replicated = built("--config.student.sharding=replicated", data=4, model=2)
    assert axes_of(replicated.models.student.shardings) == {"model"}
    assert axes_of(jax.tree.map(lambda leaf: leaf.sharding, replicated.state.opt_state)) == {"data", "model"}


@pytest.mark.parametrize(
    ("overrides", "sizes", "message"),
    [
        (["--config.teacher.sharding=fsdb"], {}, r"unknown teacher.sharding 'fsdb': did you mean fsdp\?"),
        (["--config.optim.micro_batches=2"], {"replica": 4}, r"optim\.micro_batches=2.* 1 rows"),
        (["--config.data.batch=12"], {"teacher": 4}, r"data\.batch=12.* data and teacher axes.* 8 or 16"),
        (["--config.data.length=62"], {"context": 4}, r"data\.length=62.*run\.mesh\.context=4.* 60 or 64"),
        # All errors in one message.
        (
            ["--config.data.batch=12", "--config.optim.micro_batches=3", "--config.run.eval_batch=4"],
            {"data": 8},
            r"data\.batch=12.* 8 or 16; optim\.micro_batches=3.* 1, 2; run\.eval_batch=4.* 8$",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_mesh_raise(overrides, sizes, message):
    with pytest.raises(ValueError, match=message):
        built(*overrides, **sizes)


@pytest.mark.slow
def test_step_on_a_mesh_of_all_axes_equals_one_device():
    """Loss and norms of two steps; the update keeps the state's shardings."""
    results = []
    for sizes in ({"data": 1}, {"replica": 2, "data": 1, "context": 2, "model": 2}, {"data": 2, "teacher": 4}):
        this = built(**sizes)
        with jax.set_mesh(this.mesh):
            teacher = teaching.build_teacher(this.experiment, this.models, load.teachers(this.models)[0], {}).train
            student = load.put(load.host_params(this.models.student), this.models.student)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, this.state)
            first = jax.jit(functools.partial(init_state, tx=this.tx), out_shardings=shardings)
            state, step, measured = first({"student": student, "objective": {}}), program.jitted_step(this, teacher), {}
            for seed in range(2):
                state, measured = step(state, {}, teacher.state, batch(this, seed))
            assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings))
            results.append({name: float(total / weight) for name, (total, weight) in measured.items() if weight})
    for name in ("loss", "kd", "ce", "grad_norm"):
        assert [each[name] for each in results[1:]] == pytest.approx([results[0][name]] * 2, rel=1e-5)


def batch(this: job.Job, seed: int):
    """Random tokens, two documents a row."""
    rng, shapes = (
        np.random.default_rng(seed),
        rows_batch(this.experiment.data, sharding.batch_sharding(this.mesh)),
    )
    rows, length = shapes.tokens.shape
    tokens = rng.integers(0, 256, (rows, length + 1)).astype(np.int32)
    segments = np.where(np.arange(length) < length // 3, 1, 2).astype(np.int32)
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": rng.integers(0, 2, (rows, length)).astype(np.float32),
        "segments": np.broadcast_to(segments, (rows, length)),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "row": np.arange(rows, dtype=np.int32),
        "domain": (np.arange(rows) % 2).astype(np.int32),
    }
    return shapes._replace(**{n: jax.device_put(x, getattr(shapes, n).sharding) for n, x in arrays.items()})
