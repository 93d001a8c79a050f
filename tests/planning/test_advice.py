"""What is said of a plan, and what would fit where it does not, of figures made up by hand: nothing is compiled."""

import json

import jax
import pytest
from harness import REPOSITORY

from jaxkd.config.recipe import read_config
from jaxkd.config.schema import experiment
from jaxkd.models import flops
from jaxkd.planning import advice, plan
from jaxkd.planning import memory as footprint
from jaxkd.planning import topology as topologys
from jaxkd.planning.hlo import Collective
from jaxkd.run import program

TINY = f"--config={REPOSITORY / 'configs' / 'tiny.py'}"
POD = f"--config={REPOSITORY / 'configs' / 'llama_8b_to_1b.py'}"


def built(*overrides: str, recipe: str = TINY):
    return plan.build(experiment(read_config([recipe, *overrides])), jax.devices())


@pytest.fixture(scope="module")
def example():
    """A plan with numbers of our own: what is made of them is what is tested."""
    job = built("--config.optim.micro_batches=1")
    topology = topologys.topology("v5e:2x4")
    memory = plan.Memory(limit=16_000, peak=10_000, params=1_000, optimizer=2_000, teacher=3_000, temp=4_000)
    step = flops.Step(teacher=2e12, student=6e12, recomputed=1e12, masked=1e12)
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
            "hours": pytest.approx(20 * 0.5 / 3600),
            "chip_hours": pytest.approx(8 * 20 * 0.5 / 3600),
            "hbm_gb": pytest.approx(0.25 * 819),
        },
    }


def test_what_is_said_of_a_plan(example):
    said = "\n".join(advice.lines(example))
    assert "bound by compute" in said
    assert "all-gather over data: 1 MiB x 12, in a loop, beside products" in said
    assert "205 GB a step between a device and its HBM" in said
    assert "20 steps: at least 0.00278 hours, 0.0222 chip-hours" in said
    assert said.endswith("fits")
    assert "dcn" not in said


def test_chip_hours_are_of_chips_that_are_two_devices(example):
    """Four tpu7x chips are eight devices, and cost four chips' time."""
    found = example._replace(topology=topologys.topology("tpu7x:2x2x1"))
    assert found.topology.devices == found.job.mesh.size == 8
    assert found.chip_hours == pytest.approx(4 * 20 * 0.5 / 3600)
    assert found.mfu == pytest.approx(8e12 / 0.5 / (4 * 2 * 1153e12))


def test_products_wait_for_what_is_exchanged_alone(example):
    """Half of the links' time hidden: the rest is added to the products, and is the bound once it is more than they."""
    time = plan.Estimate(0.5, 0.25, 0.125, exposed=0.0625)
    assert (time.step_s, time.bound) == (0.5625, "compute")
    assert (plan.Estimate(0.25, 0.125, 0.5, exposed=0.375).bound, plan.Estimate(0.5, 0.75, 0.125, 0, 0.125).step_s) == (
        "ici",
        0.75,
    )
    said = "\n".join(advice.lines(example._replace(estimate=time)))
    assert "0.562 s a step, bound by compute: compute 0.5, hbm 0.25, ici 0.125, of both alone 0.0625" in said


def test_a_plan_says_which_flags_it_was_compiled_with(example, monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert "flags     none; a launcher's: bash launch/host.sh --chip v5e -- plan" in "\n".join(advice.lines(example))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--one=true --two=3")
    assert "flags     2 in LIBTPU_INIT_ARGS" in advice.lines(example)


def test_what_is_said_of_several_slices(example):
    """The network's time, and what is spent in all; where nothing is known of the network, that."""
    time = plan.Estimate(0.5, 0.25, 0.125, 0.75)
    found = example._replace(topology=topologys.topology("v5e:2x4", 2), estimate=time)
    said = "\n".join(advice.lines(found))
    assert "2 x v5e:2x4: 16 chips, 2 hosts, 16 JAX devices" in said
    assert "0.75 s a step, bound by dcn: compute 0.5, hbm 0.25, ici 0.125, dcn 0.75" in said
    assert "20 steps: at least 0.00417 hours, 0.0667 chip-hours" in said
    assert (found.json()["slices"], found.json()["estimate"]["bound"]) == (2, "dcn")
    v4 = found._replace(topology=topologys.topology("v4:2x2x2", 2))
    assert "the network of v4 is not published: its time is left out" in "\n".join(advice.lines(v4))


# -------------------------------------------------------------------------------- what would fit

GIB = 2**30


def refused(*overrides: str, recipe: str = TINY, name: str = "v5e:2x4", **memory: float) -> plan.Plan:
    """A plan that does not fit, with these GiB on a device."""
    job, topology = built(*overrides, recipe=recipe), topologys.topology(name)
    sizes = {"params": 0.5, "optimizer": 1.0, "teacher": 1.0, "temp": 4.0} | memory
    held = {part: int(size * GIB) for part, size in sizes.items()}
    memory_ = plan.Memory(topology.chip.hbm, sum(held.values()), **held)
    assert memory_.peak > memory_.limit
    return plan.Plan(topology, job, memory_, program.flops_of(job), (), None)


def keys(line: str) -> list[str]:
    """What a line of advice sets."""
    return [word.removeprefix("--config.") for word in line.split() if word.startswith("--")]


def test_activations_that_do_not_fit_take_fewer_rows_or_less_of_each():
    found = refused("--config.data.batch=64", temp=20)
    assert found.json()["estimate"] == dict.fromkeys(
        ("step_s", "tokens_per_s", "mfu", "bound", "exposed_s", "hours", "chip_hours", "hbm_gb")
    )
    said = advice.lines(found)
    assert "what would fit (estimated, not compiled):" in said
    assert any(line.startswith("verdict   DOES NOT FIT: 6.75 GiB too much") for line in said)
    assert not any("alone are" in line for line in said)  # the state is not what is too large
    micro, remat, *rest = advice.would_fit(found)
    assert keys(micro) == ["optim.micro_batches=2"]
    assert keys(remat) == ["run.remat=layer"]
    assert any(line.startswith("--topology v5e:4x4 --config.run.eval_batch=16 (") for line in rest)


@pytest.mark.slow
def test_no_number_of_micro_batches_is_advised_that_is_not_enough():
    """Eight rows on eight devices are not to be divided, and eight times as many are still too much."""
    for found in (refused(temp=40), refused("--config.data.batch=64", temp=4_000)):
        alone = lambda line: all(key.startswith(("optim.", "run.remat")) for key in keys(line))
        assert not [line for line in advice.would_fit(found) if line.startswith("--") and alone(line)]


def test_a_mesh_that_is_smaller_than_its_slice_grows_first():
    """One device of sixteen: no smaller slice is advised, but the rest of the one that was asked for."""
    one = ("--config.run.mesh.data=1", "--config.data.batch=64")
    found = refused(*one, name="v5e:4x4", params=4, optimizer=8, temp=12)
    assert found.job.mesh.size == 1
    (line,) = advice.would_fit(found)
    assert keys(line) == ["run.mesh.data=-1", "run.eval_batch=16"]
    (line,) = advice.would_fit(refused(*one, name="v5e:4x4", params=130, optimizer=260))
    assert line.startswith("--topology v5e:4x8 ")  # where it is not enough, a slice that is larger
    assert keys(line) == ["--topology", "run.mesh.data=-1", "run.eval_batch=32"]


def test_a_replicated_teacher_that_is_too_large_is_spread_first():
    found = refused("--config.teacher.sharding=replicated", teacher=16, temp=3)
    said = [keys(line) for line in advice.would_fit(found)]
    assert said[0] == ["teacher.sharding=fsdp"]
    assert said[1] == ["teacher.dtype=bfloat16"]  # half is enough
    assert ["teacher.dtype=int8"] not in said
    assert said.index(["run.mesh.model=2"]) < said.index(["run.mesh.teacher=2"])  # both split what `data` does not
    verdicts = [line for line in advice.lines(found) if line.startswith("verdict   DOES NOT FIT: ")]
    assert "parameters, optimizer and teacher alone are 17.50 GiB" in verdicts[0]


def test_a_teacher_that_is_spread_and_too_large_is_stored_narrower():
    found = refused(recipe=POD, teacher=16)
    said = [keys(line) for line in advice.would_fit(found)]
    assert said[0] == ["teacher.dtype=int8"]
    assert not [line for line in said if "teacher.sharding=fsdp" in line]  # it is
    assert not [line for line in said if any(key.startswith("run.mesh") for key in line)]  # no axis holds less
    assert said[-1][:1] == ["--topology"]
    cached = refused("--config.teacher.signal=hidden", "--config.teacher.cache=gone", teacher=16)
    assert not [line for line in advice.would_fit(cached) if "dtype" in line]  # what is left is its head


def test_what_no_change_makes_fit_alone_takes_several():
    found = refused("--config.teacher.sharding=replicated", teacher=200)
    assert keys(advice.would_fit(found)[0])[:2] == ["teacher.sharding=fsdp", "teacher.dtype=int8"]


def test_a_slice_that_is_advised_is_larger_and_enough():
    (line,) = advice.would_fit(refused("--config.data.batch=64", params=10, optimizer=20))
    assert line.startswith("--topology v5e:4x8 --config.run.eval_batch=32 (")  # half of it is still too much
    other = advice.would_fit(refused("--config.data.batch=64", params=30, optimizer=60))
    assert other[-1].startswith("--topology v5p:2x2x2 (")  # none of v5e is
    assert advice.would_fit(refused(params=3e6)) == ["nothing that was tried: a smaller model or shorter rows"]


def test_a_state_beyond_the_limit_is_refused_without_compiling():
    job = built("--config.teacher.path=meta-llama/Llama-3.1-70B", recipe=POD)
    found = plan.plan(job, topologys.topology("v5e:2x4"))
    assert not found.fits
    assert found.memory.teacher == pytest.approx(2 * 70_553_706_496 / 8, rel=1e-3)
    assert found.memory.temp == 0
    assert found.memory.peak > found.memory.limit
    said = advice.would_fit(found)
    assert "teacher.dtype=int8" in keys(said[0])
    assert said[-1].startswith("--topology v5e:4x")


def test_what_lies_on_a_device_is_what_another_mesh_holds():
    """State and teacher from shapes equal those of a job that is built so, and each part of another setting, too."""
    job = built("--config.data.batch=64", "--config.teacher.sharding=replicated")
    other = built(
        "--config.run.mesh.data=2", "--config.run.mesh.model=2", "--config.run.mesh.teacher=2", "--config.data.batch=64"
    )
    held = lambda j: (
        plan.held((j.state.params, j.state.ema)),
        plan.held(j.state.opt_state),
        plan.held(plan.weights_of(j)),
    )
    now = plan.Memory(0, sum(held(job)), *held(job), temp=0)
    found = footprint.lying(job, now, footprint.Setting(other.experiment, topologys.topology("v5e:2x4")))
    assert (found.params, found.teacher) == (held(other)[0], held(other)[2])
    assert found.optimizer == pytest.approx(held(other)[1], abs=16)  # a counter is no array
    int8 = built("--config.teacher.dtype=int8", "--config.run.dtype=bfloat16")
    found = footprint.lying(job, now, footprint.Setting(int8.experiment, topologys.topology("v5e:2x4")))
    assert found.teacher == held(int8)[2]
