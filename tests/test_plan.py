"""Planning, as far as it needs no TPU compiler: names of slices, sizes of models, FLOPs, what is said and refused."""

import dataclasses
import importlib.util
import json
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import REPOSITORY

from jaxkd import chips, flops, main, plan, program, suggest, teaching
from jaxkd.config import read_config
from jaxkd.experiment import experiment
from jaxkd.hlo import Collective
from jaxkd.models import transformer
from jaxkd.teachers import codec
from jaxkd.types import Batch

TINY = f"--config={REPOSITORY / 'configs' / 'tiny.py'}"
POD = f"--config={REPOSITORY / 'configs' / 'llama_8b_to_1b.py'}"


def built(*overrides: str, recipe: str = TINY):
    return plan.build(experiment(read_config([recipe, *overrides])), jax.devices())


# ------------------------------------------------------------------------------------------- FLOPs


def test_flops_equal_a_count_by_hand():
    config = transformer.Config(vocab=100, embed=8, layers=3, heads=4, kv_heads=2, head_dim=2, mlp=16)
    weights = 8 * 2 * (4 + 2 + 2 + 4) + 3 * 8 * 16
    seen = sum(range(1, 11)) / 10  # tokens that a token of a row of ten sees on average
    forward = 3 * (2 * weights + 2 * 2 * 4 * 2 * seen) + 2 * 8 * 100
    side = flops.Side(config)
    found = flops.step([side], side, 20, 10, remat=True)
    assert found.teacher == 20 * forward
    assert found.student == 3 * 20 * forward
    assert found.again == 20 * (forward - 2 * 8 * 100)
    assert found.masked == 20 * 5 * 3 * (2 * 2 * 4 * 2 * (10 - seen))
    assert flops.step([], side, 20, 10, remat=True, moves=False).executed == 20 * (forward + 3 * 4 * 4 * 2 * 4.5)


def test_flops_equal_what_xla_counts_where_no_loop_repeats():
    """One layer, forwards and backwards: the compiler's own figure also has what is not a product, a few per cent."""
    config = transformer.Config(vocab=512, embed=128, layers=1, heads=4, kv_heads=2, head_dim=32, mlp=512)
    rows, length = 2, 64
    params = transformer.abstract(config)[0]
    numbers = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    one = jax.ShapeDtypeStruct((rows,), jnp.int32)
    batch = Batch(numbers, numbers, weights, numbers, numbers, one, one)

    def value(params, batch):
        head = transformer.forward(config, params, batch).head
        return jnp.sum(jnp.square(head.hidden @ head.unembed))

    counted = jax.jit(jax.grad(value)).lower(params, batch).compile().cost_analysis()["flops"]
    ours = flops.step([], flops.Side(config), rows * length, length, remat=False).executed
    assert ours < counted < 1.05 * ours


@pytest.mark.parametrize(
    ("overrides", "body", "head"),
    [
        ((), 1, 1),
        (("--config.teacher.signal=top_k",), 1, 1),
        (("--config.teacher.signal=hidden", "--config.teacher.cache=gone"), 0, 1),
        (("--config.teacher.signal=top_k", "--config.teacher.cache=gone"), 0, 0),
        (("--config.objective.kd.weight=0.0",), 0, 0),
    ],
)
def test_a_teacher_costs_what_is_run_of_it(overrides, body, head):
    job = built(*overrides)
    c = job.teacher.config
    assert plan.flops_of(job).teacher == 8 * 64 * (body * flops.body(c, 64) + head * flops.head(c))


# -------------------------------------------------------------------------------- what is compiled


@pytest.mark.parametrize("signal", ["hidden", "top_k", "sampled", "token"])
def test_a_cached_teacher_is_compiled_without_its_cache(signal):
    """The abstract batch is what a store's rows are, and the step takes it."""
    term = "cross_entropy" if signal == "sampled" else "next_token" if signal == "token" else "forward_kl"
    job = built(
        f"--config.teacher.signal={signal}", "--config.teacher.cache=gone", f"--config.objective.kd.divergence={term}"
    )
    batch = teaching.abstract_batch(job)
    layout = teaching.layouts(job)["train"]
    stored = codec.encode(layout, codec.empty(layout), np.zeros(layout.length, bool))
    rows = codec.decode_rows(layout, [stored] * 8)
    if signal == "token":
        assert batch.teacher is None
    else:
        assert type(batch.teacher) is type(rows)
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), batch.teacher, rows)
        assert all(jax.tree.leaves(same))
    teacher = teaching.teach(job, plan.weights_of(job), {}).train
    with jax.set_mesh(job.mesh):
        after, measured = jax.eval_shape(program.jitted_step(job, teacher), job.state, teacher.state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, job.state)
    assert {"loss", "lr"} <= set(measured)


# -------------------------------------------------------------------------------- time and verdict

Device = namedtuple("Device", "coords")
SliceDevice = namedtuple("SliceDevice", "coords slice_index")


class Grid:
    """A mesh over a 4 x 4 slice, `data` along one side and `model` along the other."""

    axis_names = ("data", "model")
    devices = np.empty((4, 4), object)


for _x in range(4):
    for _y in range(4):
        Grid.devices[_x, _y] = Device((_x, _y, 0))


@pytest.mark.parametrize(
    ("op", "axis", "share"),
    [
        ("all-gather", "data", 3 / 4),  # one line of four: three quarters of the array through one link
        ("reduce-scatter", "data", 3 / 4),
        ("all-reduce", "model", 3 / 2),
        ("all-gather", "data+model", 15 / 16 / 2),  # both sides of the grid at once
        ("collective-permute", "data", 1.0),
        ("collective-permute", "data+model", 1 / 2),
    ],
)
def test_exchanges_take_their_bytes_over_their_links(op, axis, share):
    topology = chips.topology("v5e:4x4")
    found = plan.seconds(Collective(op, axis, 10**9, True, 1), Grid, topology)
    assert found == (pytest.approx(share * 10**9 / 50e9), 0)


def test_rings_are_used_both_ways():
    open_, closed = (
        plan.seconds(Collective("all-gather", "data", 10**9, True, 1), Grid, chips.topology(name))[0]
        for name in ("v5e:4x4", "v5e:16x16")
    )
    assert open_ == closed  # four of sixteen in a row are no ring
    ring = chips.topology("v5p:4x4x4")
    found = plan.seconds(Collective("all-gather", "data", 10**9, True, 1), Grid, ring)
    assert found[0] == pytest.approx(3 / 4 * 10**9 / (2 * 100e9))


class Slices:
    """A mesh over two 4 x 4 slices, `replica` across them."""

    axis_names = ("replica", "data", "model")
    devices = np.empty((2, 4, 4), object)


for _place in np.ndindex(2, 4, 4):
    Slices.devices[_place] = SliceDevice((*_place[1:], 0), _place[0])


def test_what_goes_across_slices_takes_the_network():
    """Of a sum over both, each of four devices has a quarter to exchange with its like in the other slice."""
    topology, network = chips.topology("v5e:4x4", 2), 3.125e9
    seconds = lambda op, axis: plan.seconds(Collective(op, axis, 10**9, True, 1), Slices, topology)
    assert seconds("all-reduce", "replica") == (0, pytest.approx(10**9 / network))
    assert seconds("all-reduce", "replica+data") == (
        pytest.approx(3 / 2 * 10**9 / 50e9),
        pytest.approx(10**9 / 4 / network),
    )
    assert seconds("all-gather", "replica") == (0, pytest.approx(1 / 2 * 10**9 / network))
    assert seconds("collective-permute", "replica") == (0, pytest.approx(10**9 / network))
    assert seconds("all-gather", "data")[1] == 0
    assert plan.seconds(Collective("all-reduce", "replica", 1, True, 1), Slices, chips.topology("v4:4x4x4", 2)) == (
        0,
        0,
    )


class Halves:
    """Four tpu7x chips in a row, each of which is two devices."""

    axis_names = ("data", "model")
    devices = np.empty((4, 2), object)


for _x in range(4):
    for _core in range(2):
        Halves.devices[_x, _core] = Device((_x, 0, 0))


@pytest.mark.parametrize(
    ("op", "axis", "share"),
    [
        ("all-gather", "data+model", 3 / 4 / 2),  # comes once to each chip, over the links of both of its devices
        ("all-reduce", "data+model", 3 / 2 / 2),
        ("collective-permute", "data+model", 1 / 2),
        ("all-gather", "data", 3 / 4),  # each half of a chip for itself
    ],
)
def test_two_devices_of_a_chip_share_what_comes_over_its_links(op, axis, share):
    found = plan.seconds(Collective(op, axis, 10**9, True, 1), Halves, chips.topology("tpu7x:4x2x1"))
    assert found[0] == pytest.approx(share * 10**9 / 50e9)
    within = plan.seconds(Collective("all-gather", "model", 10**9, True, 1), Halves, chips.topology("tpu7x:4x2x1"))
    assert within[0] == pytest.approx(1 / 2 * 10**9 / 3690e9)  # through their memory


@pytest.fixture(scope="module")
def example():
    """A plan with numbers of our own: what is made of them is what is tested."""
    job = built("--config.optim.micro_batches=1")
    topology = chips.topology("v5e:2x4")
    memory = plan.Memory(limit=16_000, peak=10_000, params=1_000, optimizer=2_000, teacher=3_000, temp=4_000)
    step = flops.Step(teacher=2e12, student=6e12, again=1e12, masked=1e12)
    rows = (Collective("all-gather", "data", 1 << 20, True, 12, overlapped=True),)
    return plan.Plan(topology, job, memory, step, rows, plan.Estimate(0.5, 0.25, 0.125))


def test_the_json_object(example):
    found = json.loads(json.dumps(example.json()))
    assert found == {
        "topology": "v5e:2x4",
        "slices": 1,
        "devices": 8,
        "fits": True,
        "hbm_bytes": {
            "limit": 16_000,
            "peak": 10_000,
            "params": 1_000,
            "optimizer": 2_000,
            "teacher": 3_000,
            "temp": 4_000,
        },
        "flops": {"model": 8e12, "teacher": 2e12, "student": 6e12},
        "collectives": [
            {"op": "all-gather", "axis": "data", "bytes": 1 << 20, "in_loop": True, "count": 12, "overlapped": True}
        ],
        "estimate": {
            "step_s": 0.5,
            "tokens_per_s": 1024.0,
            "mfu": 8e12 / 0.5 / (8 * 197e12),
            "bound": "compute",
            "exposed_s": 0.0,
        },
    }


def test_what_is_said_of_a_plan(example):
    said = "\n".join(plan.lines(example))
    assert "bound by compute" in said
    assert "all-gather over data: 1 MiB x 12, in a loop, beside products" in said
    assert "20 steps: at least 0.00278 hours, 0.0222 chip-hours" in said
    assert said.endswith("fits")
    assert "dcn" not in said


def test_products_wait_for_what_is_exchanged_alone(example):
    """Half of the links' time hidden: the rest is added to the products, and is the bound once it is more than they."""
    time = plan.Estimate(0.5, 0.25, 0.125, exposed=0.0625)
    assert (time.step_s, time.bound) == (0.5625, "compute")
    assert (plan.Estimate(0.25, 0.125, 0.5, exposed=0.375).bound, plan.Estimate(0.5, 0.75, 0.125, 0, 0.125).step_s) == (
        "ici",
        0.75,
    )
    said = "\n".join(plan.lines(example._replace(estimate=time)))
    assert "0.562 s a step, bound by compute: compute 0.5, hbm 0.25, ici 0.125, of both alone 0.0625" in said


def test_a_plan_says_which_flags_it_was_compiled_with(example, monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert "flags     none; a launcher's: bash launch/host.sh --chip v5e -- plan" in "\n".join(plan.lines(example))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--one=true --two=3")
    assert "flags     2 in LIBTPU_INIT_ARGS" in plan.lines(example)


def test_what_is_said_of_several_slices(example):
    """The network's time, and what is spent in all; where nothing is known of the network, that."""
    time = plan.Estimate(0.5, 0.25, 0.125, 0.75)
    found = example._replace(topology=chips.topology("v5e:2x4", 2), estimate=time)
    said = "\n".join(plan.lines(found))
    assert "2 x v5e:2x4: 16 chips, 2 hosts, 16 JAX devices" in said
    assert "0.75 s a step, bound by dcn: compute 0.5, hbm 0.25, ici 0.125, dcn 0.75" in said
    assert "20 steps: at least 0.00417 hours, 0.0667 chip-hours" in said
    assert (found.json()["slices"], found.json()["estimate"]["bound"]) == (2, "dcn")
    v4 = found._replace(topology=chips.topology("v4:2x2x2", 2))
    assert "the network of v4 is not published: its time is left out" in "\n".join(plan.lines(v4))


def test_a_plan_that_does_not_fit_says_what_would(example):
    memory = example.memory._replace(peak=24_000, temp=18_000)
    large = dataclasses.replace(example.job.experiment.data, batch=64)
    job = example.job._replace(experiment=dataclasses.replace(example.job.experiment, data=large))
    found = example._replace(job=job, memory=memory, estimate=None)
    assert found.json()["estimate"] == dict.fromkeys(("step_s", "tokens_per_s", "mfu", "bound", "exposed_s"))
    said = "\n".join(plan.lines(found))
    assert "DOES NOT FIT" in said
    assert "--config.optim.micro_batches=2 " in said  # 6,000 + 18,000 / 2 is below 16,000
    assert "--config.run.remat=layer" in said
    assert "--topology v5e:4x4," in said
    fixed = "\n".join(plan.lines(found._replace(memory=memory._replace(temp=1_000))))
    assert "micro_batches=" not in fixed.split("What would fit:")[1]


def test_a_state_beyond_the_limit_is_refused_without_compiling():
    job = built("--config.teacher.path=meta-llama/Llama-3.1-70B", recipe=POD)
    found = plan.plan(job, chips.topology("v5e:2x4"))
    assert not found.fits
    assert found.memory.teacher == pytest.approx(2 * 70_553_706_496 / 8, rel=1e-3)
    assert found.memory.temp == 0
    assert found.memory.peak > found.memory.limit
    assert plan.would_fit(found)[0].startswith("--topology v5e:4x4")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("the total memory required for HLO temporaries (2.00G) exceeds available HBM (15.75G).", 2 * 2**30 + 100),
        ("the total memory required for the program (2.00G) exceeds available HBM (15.75G).", 2 * 2**30),
        ("Ran out of memory in memory space hbm. Used 512.00M of 15.75M hbm.", 2**29),
    ],
)
def test_the_compilers_refusals_are_read(message, wanted):
    assert plan._wanted(f"RESOURCE_EXHAUSTED: {message}", 100) == wanted


def test_candidates_divide_the_batch_and_are_ranked():
    e = experiment(read_config([POD]))
    topology = chips.topology("v5e:2x4")
    guesses = list(suggest._guesses(e, topology, jax.devices()))
    tried = {(g.experiment.run.mesh.data, g.experiment.run.mesh.model) for g in guesses}
    assert tried == {(8, 1), (4, 2), (2, 4), (1, 8)}
    for g in guesses:
        assert e.data.batch % (g.experiment.optim.micro_batches * g.experiment.run.mesh.data) == 0
        assert g.experiment.run.eval_batch % g.experiment.run.mesh.data == 0
    one = {
        (g.experiment.run.remat, g.experiment.optim.micro_batches): g
        for g in guesses
        if g.experiment.run.mesh.model == 1 and g.experiment.teacher.sharding == "fsdp"
    }
    whole = {
        g.experiment.teacher.sharding: g
        for g in guesses
        if (g.experiment.run.mesh.model, g.experiment.optim.micro_batches, g.experiment.run.remat) == (1, 8, "layer")
    }
    assert whole["replicated"].bytes > whole["fsdp"].bytes  # and what is held whole is not gathered
    assert whole["replicated"].whole < whole["fsdp"].whole
    assert one["layer", 4].bytes < one["none", 4].bytes
    assert one["layer", 16].bytes < one["layer", 4].bytes
    assert one["none", 4].seconds < one["layer", 4].seconds
    assert suggest.overrides(e, one["none", 2].experiment) == [
        "--config.run.mesh.data=8",
        "--config.run.remat=none",
        "--config.optim.micro_batches=2",
    ]


def test_what_cannot_be_planned_is_one_sentence(monkeypatch):
    command = ["plan", TINY, "--topology", "v5e:2x2"]
    with pytest.raises(ValueError, match="--slices 0: there must be at least 1"):
        main.main([*command, "--slices", "0"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="libtpu, which is not installed: pip install 'jax\\[tpu\\]'"):
        main.main(command)
