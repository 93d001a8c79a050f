"""Planning, as far as it needs no TPU compiler: FLOPs, times, what is reported and refused."""

import importlib.util
import json
import re
import time
import types
from collections import namedtuple
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import REPOSITORY, recipe

from jaxkd.cli import main
from jaxkd.core.types import Batch
from jaxkd.models import flops, transformer
from jaxkd.planning import oom, plan, plan_report
from jaxkd.planning import topology as topologys
from jaxkd.planning.hlo import Collective
from jaxkd.run import program, rollouts
from jaxkd.run import teacher as teaching
from jaxkd.teachers import codec

POD = "llama_8b_to_1b.py"


def built(*overrides: str, name: str = "tiny.py"):
    return plan.build(recipe(name, *overrides), jax.devices())


def test_flops_equal_a_count_by_hand():
    config = transformer.Config(vocab=100, embed=8, layers=3, heads=4, kv_heads=2, head_dim=2, mlp=16)
    weights = 8 * 2 * (4 + 2 + 2 + 4) + 3 * 8 * 16
    seen = sum(range(1, 11)) / 10  # tokens that a token of a row of ten sees on average
    forward = 3 * (2 * weights + 2 * 2 * 4 * 2 * seen) + 2 * 8 * 100
    side = flops.Side(config)
    count = flops.step([side], side, 20, 10, remat=True)
    assert count.teacher == 20 * forward
    assert count.student == 3 * 20 * forward
    assert count.recomputed == 20 * (forward - 2 * 8 * 100)
    assert count.masked == 20 * 5 * 3 * (2 * 2 * 4 * 2 * (10 - seen))
    assert flops.step([], side, 20, 10, remat=True, trains=False).executed == 20 * (forward + 3 * 4 * 4 * 2 * 4.5)


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
    c = job.models.teacher.config
    assert program.flops_of(job.experiment, job.models, job.objective.uses_teacher).teacher == 8 * 64 * (
        body * flops.body(c, 64) + head * flops.head(c)
    )


@pytest.mark.parametrize("signal", ["hidden", "top_k", "sampled", "token"])
def test_a_cached_teacher_is_compiled_without_its_cache(signal):
    term = "cross_entropy" if signal == "sampled" else "next_token" if signal == "token" else "forward_kl"
    job = built(
        f"--config.teacher.signal={signal}", "--config.teacher.cache=gone", f"--config.objective.kd.divergence={term}"
    )
    batch = teaching.abstract_batch(job.experiment, job.models, job.mesh)
    layout = teaching.cache_layouts(job.experiment.teacher, job.models, job.experiment.data.length)["train"]
    stored = codec.encode(layout, codec.empty(layout), np.zeros(layout.length, bool))
    rows = codec.decode_rows(layout, [stored] * 8)
    if signal == "token":
        assert batch.teacher is None
    else:
        assert type(batch.teacher) is type(rows)
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), batch.teacher, rows)
        assert all(jax.tree.leaves(same))
    teacher = teaching.build_teacher(job.experiment, job.models, plan.teacher_weights(job.models), {}).train
    with jax.set_mesh(job.mesh):
        after, measured = jax.eval_shape(program.jitted_step(job, teacher), job.state, job.frozen, teacher.state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, job.state)
    assert {"loss", "lr"} <= set(measured)


@pytest.fixture(scope="module")
def example():
    """A plan with given numbers."""
    job = built("--config.optim.micro_batches=1")
    memory = plan.Memory(limit=16_000, peak=10_000, params=1_000, optimizer=2_000, teacher=3_000, temp=4_000)
    step = flops.Step(teacher=2e12, student=6e12, recomputed=1e12, masked=1e12)
    rows = (Collective("all-gather", "data", 1 << 20, True, 12, overlapped=True),)
    return plan.Plan(topologys.topology("v5e:2x4"), job, memory, step, rows, plan.Estimate(0.5, 0.25, 0.125))


def text(p) -> str:
    return "\n".join(plan_report.lines(p))


def test_the_json_object_and_the_text_of_a_plan(example, monkeypatch):
    values = json.loads(json.dumps(example.json()))
    assert {key: values[key] for key in ("topology", "slices", "devices", "fits")} == {
        "topology": "v5e:2x4", "slices": 1, "devices": 8, "fits": True,
    }  # fmt: skip
    assert values["hbm_bytes"] == example.memory._asdict()
    assert values["flops"] == {"model": 8e12, "teacher": 2e12, "student": 6e12}
    one = {"op": "all-gather", "axis": "data", "bytes": 1 << 20, "in_loop": True, "count": 12, "overlapped": True}
    assert values["collectives"] == [one]
    estimate = {"step_s": 0.5, "tokens_per_s": 1024.0, "mfu": 8e12 / 0.5 / (8 * 197e12), "bound": "compute"}
    hours = 20 * 0.5 / 3600
    estimate |= {"exposed_s": 0.0, "hours": hours, "chip_hours": 8 * hours, "hbm_gb": 0.25 * 819}
    assert values["estimate"].pop("bound") == estimate.pop("bound")
    assert values["estimate"] == pytest.approx(estimate)
    none = example._replace(estimate=None).json()["estimate"]
    assert none == dict.fromkeys((*estimate, "bound"))
    # The text.
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    for part in (
        "bash launch/host.sh --chip v5e -- plan",
        "all-gather over data: 1 MiB x 12, in a loop, overlapped",
        "205 GB a step",
        "0.5 s a step, bound by compute",
        "20 steps: at least 10 seconds, 1.33 chip-minutes",
        "k parameters",
    ):
        assert part in text(example)
    assert "dcn" not in text(example)
    assert " 0.0M" not in text(example)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--one=true --two=3")
    assert "2 in LIBTPU_INIT_ARGS" in text(example)
    # A plan that does not fit.
    gib = 2**30
    large = plan.Memory(4 * gib, 10 * gib, gib, 2 * gib, 2 * gib, 5 * gib)
    refused = text(example._replace(memory=large, estimate=None))
    assert "DOES NOT FIT: 6.00 GiB too much, parameters, optimizer and teacher alone are 5.00 GiB" in refused
    assert "--suggest" in refused
    small = text(example._replace(memory=large._replace(teacher=0), estimate=None))
    assert "alone are" not in small
    # Several slices, and chips of two devices.
    estimate = plan.Estimate(0.5, 0.25, 0.125, 0.75)
    two = example._replace(topology=topologys.topology("v5e:2x4", 2), estimate=estimate)
    assert "2 x v5e:2x4: 16 chips, 2 hosts, 16 JAX devices" in text(two)
    assert "0.75 s a step, bound by dcn" in text(two)
    assert (two.json()["slices"], two.json()["estimate"]["bound"]) == (2, "dcn")
    assert "not published" in text(two._replace(topology=topologys.topology("v4:2x2x2", 2)))
    pairs = example._replace(topology=topologys.topology("tpu7x:2x2x1"))
    assert pairs.topology.devices == pairs.job.mesh.size == 8
    assert pairs.rates()["chip_hours"] == pytest.approx(4 * 20 * 0.5 / 3600)
    assert pairs.rates()["mfu"] == pytest.approx(8e12 / 0.5 / (4 * 2 * 1153e12))


def test_durations():
    seconds = (1.5e-5, 90, 7_200, 385_200)
    assert [*map(plan_report.duration, seconds)] == ["15 microseconds", "1.5 minutes", "2 hours", "107 hours"]
    estimate = plan.Estimate(0.5, 0.25, 0.125, exposed=0.0625)
    assert (estimate.step_s, estimate.bound) == (0.5625, "compute")
    assert plan.Estimate(0.25, 0.125, 0.5, exposed=0.375).bound == "ici"
    assert plan.Estimate(0.5, 0.75, 0.125, 0, 0.125).step_s == 0.75


Device = namedtuple("Device", "coords slice_index")


class Grid:
    def __init__(self, device, **sizes):
        self.axis_names, self.devices = tuple(sizes), np.empty(tuple(sizes.values()), object)
        for index in np.ndindex(self.devices.shape):
            self.devices[index] = device(*index)


FLAT = Grid(lambda x, y: Device((x, y, 0), 0), data=4, model=4)
SLICES = Grid(lambda s, x, y: Device((x, y, 0), s), replica=2, data=4, model=4)
HALVES = Grid(lambda x, core: Device((x, 0, 0), 0), data=4, model=2)  # four tpu7x chips in a row, two devices each
NETWORK = 50 / 3.125  # of v5e: how much slower it is than a link


@pytest.mark.parametrize(
    ("name", "mesh", "op", "axis", "links", "network"),
    [
        ("v5e:4x4", FLAT, "all-gather", "data", 3 / 4, 0),  # one line of four: three quarters through one link
        ("v5e:4x4", FLAT, "reduce-scatter", "data", 3 / 4, 0),
        ("v5e:4x4", FLAT, "all-reduce", "model", 3 / 2, 0),
        ("v5e:4x4", FLAT, "all-gather", "data+model", 15 / 16 / 2, 0),  # both sides of the grid at once
        ("v5e:4x4", FLAT, "collective-permute", "data", 1.0, 0),
        ("v5e:4x4", FLAT, "collective-permute", "data+model", 1 / 2, 0),
        ("v5e:16x16", FLAT, "all-gather", "data", 3 / 4, 0),  # four of sixteen in a row are no ring
        ("v5p:4x4x4", FLAT, "all-gather", "data", 3 / 4 / 2 / 2, 0),  # a ring, used both ways; links twice as fast
        # Between slices each device exchanges its share of the array with its counterparts.
        ("v5e:4x4", SLICES, "all-reduce", "replica", 0, NETWORK),
        ("v5e:4x4", SLICES, "all-reduce", "replica+data", 3 / 2, NETWORK / 4),
        ("v5e:4x4", SLICES, "all-gather", "replica", 0, NETWORK / 2),
        ("v5e:4x4", SLICES, "collective-permute", "replica", 0, NETWORK),
        ("v5e:4x4", SLICES, "all-gather", "data", 3 / 4, 0),
        ("v4:4x4x4", SLICES, "all-reduce", "replica", 0, 0),  # its network is not published
        # Data come once to each chip, over the links of both of its devices; between these, through their memory.
        ("tpu7x:4x2x1", HALVES, "all-gather", "data+model", 3 / 4 / 2, 0),
        ("tpu7x:4x2x1", HALVES, "all-reduce", "data+model", 3 / 2 / 2, 0),
        ("tpu7x:4x2x1", HALVES, "collective-permute", "data+model", 1 / 2, 0),
        ("tpu7x:4x2x1", HALVES, "all-gather", "data", 3 / 4, 0),
        ("tpu7x:4x2x1", HALVES, "all-gather", "model", 1 / 2 * 50 / 3690, 0),
    ],
)
def test_collectives_take_their_bytes_over_their_links(name, mesh, op, axis, links, network):
    """In multiples of the time that the array takes over one link of 50 GB/s."""
    topology = topologys.topology(name, 2 if mesh is SLICES else 1)
    seconds = plan.collective_seconds(Collective(op, axis, 10**9, True, 1), mesh, topology)
    assert seconds == pytest.approx((links * 10**9 / 50e9, network * 10**9 / 50e9))


def failing(message: str) -> Mock:
    """A step whose compilation runs out of memory with this message."""
    step = Mock()
    step.lower.return_value.compile.side_effect = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")
    return step


HBM = [
    ("the total memory required for HLO temporaries (2.00G) exceeds available HBM (15.75G).", 2 * 2**30, True),
    ("the total memory required for the program (2.00G) exceeds available HBM (15.75G).", 2 * 2**30, False),
    ("Ran out of memory in memory space hbm. Used 512.00M of 15.75M hbm.", 2**29, False),
    ("TPU TensorCore Hbm usage: 1.00G, SparseCore Hbm usage 512.00M, exceeding available bytes: 1G", 3 * 2**29, False),
]


@pytest.mark.parametrize(("message", "used", "temporaries"), HBM)
def test_out_of_hbm_is_a_plan_that_does_not_fit(example, message, used, temporaries, monkeypatch, capsys):
    monkeypatch.setattr(program, "jitted_step", lambda *_: failing(message))
    planned = plan.plan(example.job, topologys.topology("v5e:2x4"))
    m = planned.memory
    assert not planned.fits
    arguments = m.peak - m.temp
    assert m.peak == used + arguments * temporaries
    assert arguments > m.params + m.optimizer + m.teacher > 0
    assert "compiling the step for v5e:2x4" in capsys.readouterr().err


def test_a_rollout_that_does_not_fit_is_a_plan_that_does_not(example, monkeypatch):
    """The teacher's text is written by a program of its own before the step, beside the train state."""
    message, used, _ = HBM[2]
    memory = dict.fromkeys(("argument", "temp", "output", "alias", "generated_code"), 0)
    step, sizes = Mock(), types.SimpleNamespace(**{f"{k}_size_in_bytes": v for k, v in memory.items()})
    step.lower.return_value.compile.return_value.memory_analysis.return_value = sizes
    monkeypatch.setattr(program, "jitted_step", lambda *_: step)
    monkeypatch.setattr(rollouts, "jitted", lambda *_: rollouts.Rollouts(failing(message), None))
    monkeypatch.setattr(rollouts, "abstract_written", lambda _, params, batch, *more: batch)
    planned = plan.plan(example.job, topologys.topology("v5e:2x4"))
    assert (planned.fits, planned.memory.peak) == (False, used)


def test_what_is_not_compiled_takes_long_or_cannot_be_planned(capsys, monkeypatch):
    planned = plan.plan(
        built("--config.teacher.path=meta-llama/Llama-3.1-70B", name=POD), topologys.topology("v5e:2x4")
    )
    assert not planned.fits
    assert planned.memory.teacher == pytest.approx(2 * 70_553_706_496 / 8, rel=1e-3)
    assert (planned.memory.temp, capsys.readouterr().err) == (0, "")
    with plan.progress("compiling", every=0.01):
        time.sleep(0.05)
    assert re.search(r"compiling \.\.\.\ncompiling: \d+ s", capsys.readouterr().err)
    command = ["plan", f"--config={REPOSITORY / 'configs' / 'tiny.py'}", "--topology", "v5e:2x2"]
    with pytest.raises(ValueError, match="--slices 0"):
        main.main([*command, "--slices", "0"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu.*jax\[tpu\]"):
        main.main(command)


STACK = (
    "E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while allocating on stack for %widen.1 = "
    "f32[8192,2048]{1,0:T(8,128)} custom-call(%x.1), frontend_attributes={kernel_metadata={}}. Scoped allocation with "
    "size 128.00M and limit 16.00M exceeded scoped vmem limit by 112.00M. It should not be possible to run out of it"
)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space vmem. Used 17.50M of 16.00M vmem. "
            "Exceeded vmem capacity by 1.50M.",
            r"vmem.*17.50 MiB of 16.00 MiB.*xla_tpu_scoped_vmem_limit_kib",
        ),
        (STACK, r"vmem.*widen.1.*128.00 MiB of 16.00 MiB"),
        ("Ran out of memory in memory space smem. Used 1.01M of 1.00M smem.", r"smem.*1.01 MiB of 1.00 MiB[^-]*$"),
        ("Ran out of memory in memory space sflag.", "sflag"),
        ("Something else is used up.\nAnd more of it.", "RESOURCE_EXHAUSTED: Something else is used up.$"),
        ("Ran out of memory in memory space hbm.", "RESOURCE_EXHAUSTED: Ran out of memory"),
    ],
)
def test_out_of_other_memory_is_an_error(example, message, named, monkeypatch):
    """It does not depend on the job's size: no verdict on batch, mesh and slice."""
    monkeypatch.setattr(program, "jitted_step", lambda *_: failing(message))
    with pytest.raises(oom.OnChipOom, match=named) as error:
        plan.plan(example.job, topologys.topology("v5e:2x4"))
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)
