"""Whole train steps planned by the real compiler, without a TPU: what fits, what is exchanged, what does not fit."""

import json
import shlex
import subprocess
from collections import Counter

import pytest
from harness import REPOSITORY, here, jaxkd

GIB = 2**30
RECIPE = f"--config={REPOSITORY / 'configs' / 'tiny.py'}"


def planned(topology: str, *more: str, command=here) -> dict:
    result = command("plan", RECIPE, "--topology", topology, "--json", *more)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_step_is_planned_on_a_mesh():
    plan = planned("v5litepod-4", "--config.run.mesh.model=2", "--config.optim.micro_batches=2")
    assert (plan["topology"], plan["devices"], plan["fits"]) == ("v5e:2x2", 4, True)
    memory, time = plan["hbm_bytes"], plan["estimate"]
    assert memory["limit"] == int(15.75 * GIB)
    assert memory["params"] + memory["optimizer"] + memory["teacher"] < memory["peak"] < GIB
    rows = plan["collectives"]
    # Weights are gathered over `data`: in each of two micro-batches at least two of every layer.
    gathered = [c for c in rows if c["op"] == "all-gather" and c["in_loop"] and c["bytes"] == 32 * 32 * 4]
    assert {c["axis"] for c in gathered} == {"data"}
    assert sum(c["count"] for c in gathered) >= 2 * 2 * (4 + 2)
    assert all(c["count"] % 2 == 0 for c in rows if c["in_loop"])
    assert any(c["op"] == "all-reduce" and "model" in c["axis"] for c in rows)
    assert time["bound"] in ("compute", "hbm", "ici")
    assert time["tokens_per_s"] == pytest.approx(8 * 64 / time["step_s"])
    assert 0 < time["mfu"] < 1


@pytest.mark.parametrize(
    ("topology", "devices", "limit"),
    [("v4:2x2x1", 4, 30.75), ("tpu7x:2x2x1", 8, 94.75)],  # a chip is one device, or two
)
def test_a_step_is_planned_for_four_chips(topology, devices, limit):
    plan = planned(topology)
    assert (plan["topology"], plan["devices"], plan["fits"]) == (topology, devices, True)
    memory, time = plan["hbm_bytes"], plan["estimate"]
    assert memory["limit"] == int(limit * GIB)
    assert 0 < memory["params"] + memory["optimizer"] + memory["teacher"] < memory["peak"] < GIB
    assert {c["axis"] for c in plan["collectives"]} == {"data"}
    assert time["hours"] == pytest.approx(20 * time["step_s"] / 3600)
    assert time["chip_hours"] == pytest.approx(4 * time["hours"])
    assert time["hbm_gb"] > 0


def test_a_suggestion_is_compiled_and_fits():
    plan = planned("v6e:2x4", "--suggest", "--budget", "1")
    assert (plan["devices"], plan["fits"]) == (8, True)
    assert len(plan["candidates"]) == 1
    assert plan["candidates"][0]["overrides"] == plan["overrides"]


def test_what_does_not_fit_is_a_verdict():
    large = ("--config.data.batch=8192", "--config.data.length=2048", "--config.run.eval_batch=4")
    plan = planned("v5e:2x2", *large)
    assert not plan["fits"]
    assert plan["hbm_bytes"]["peak"] > 2 * plan["hbm_bytes"]["limit"]
    assert plan["hbm_bytes"]["temp"] > plan["hbm_bytes"]["limit"]
    assert plan["estimate"] == dict.fromkeys(
        ("step_s", "tokens_per_s", "mfu", "bound", "exposed_s", "hours", "chip_hours", "hbm_gb")
    )


LARGE_TEACHER = [
    f"--config.{side}.shape.{key}={value}"
    for side, sizes in {
        "teacher": {"embed": 512, "head_dim": 64, "mlp": 1024, "heads": 8, "kv_heads": 4, "layers": 4},
        "student": {"embed": 128, "head_dim": 32, "mlp": 256, "heads": 4, "kv_heads": 4, "layers": 2, "vocab": 257},
    }.items()
    for key, value in sizes.items()
]
LARGE_TEACHER += ["--config.student.path=random", "--config.student.layers=()", "--config.run.dtype=bfloat16"]
LARGE_TEACHER += ["--config.data.batch=16", "--config.data.length=256", "--config.run.eval_batch=16"]


def exchanged(plan: dict, op: str, axis: str) -> Counter:
    """How often each size goes over an axis in a step, in loops."""
    counts: Counter = Counter()
    for c in plan["collectives"]:
        if (c["op"], c["axis"], c["in_loop"]) == (op, axis, True):
            counts[c["bytes"]] += c["count"]
    return counts


def test_an_int8_teacher_is_gathered_as_such():
    """A byte a weight, where bfloat16 products read them: nothing is widened before it is sent."""
    plan = planned("v5e:2x2", *LARGE_TEACHER, "--config.teacher.dtype=int8")
    gathered = exchanged(plan, "all-gather", "data")
    assert gathered[512 * 1024] == 4 * 3  # gate, up and down
    assert gathered[512 * 512] == gathered[512 * 256] == 4 * 2  # q and o, k and v
    assert gathered[2 * 512 * 1024] == 0
    # Weights, scales, norms, and an embedding of two bytes, a quarter of them on each device.
    layer = (512 * 64 * 24 + 3 * 512 * 1024) // 4 + 4 * (64 * 16 + 2 * 1024) + 4 * 4 * 512 // 4
    assert plan["hbm_bytes"]["teacher"] == 4 * layer + 2 * 512 * 384 // 4 + 4 * 512 // 4


def test_a_teacher_on_its_own_axis_is_not_gathered_over_it():
    """Half of each weight over `data`, and over `teacher` two sums of activations a layer."""
    sizes = ("--config.run.mesh.data=2", "--config.run.mesh.teacher=2", "--config.teacher.dtype=bfloat16")
    plan = planned("v5e:2x2", *LARGE_TEACHER, *sizes)
    gathered = exchanged(plan, "all-gather", "data")
    assert gathered[512 * 1024 // 2 * 2] == 4 * 3
    assert gathered[512 * 512 // 2 * 2] == gathered[512 * 256 // 2 * 2] == 4 * 2
    assert exchanged(plan, "all-reduce", "teacher") == {8 * 256 * 512 * 2: 4 * 2}
    assert not exchanged(plan, "all-gather", "teacher")


def test_slices_exchange_gradients_and_a_teacher_is_gathered_once_a_micro_batch():
    widths = {
        "teacher": {"embed": 96, "layers": 4, "head_dim": 24, "mlp": 160},
        "student": {"embed": 32, "layers": 2, "head_dim": 8, "mlp": 64},
    }
    shapes = [
        f"--config.{side}.shape.{key}={value}"
        for side, sizes in widths.items()
        for key, value in {"vocab": 257, "heads": 4, "kv_heads": 2, **sizes}.items()
    ]
    plan = planned(
        *("v5e:2x2", "--slices", "2", "--config.optim.micro_batches=2", "--config.data.batch=16"),
        *("--config.student.path=random", "--config.student.layers=()", *shapes),
    )
    assert (plan["slices"], plan["devices"], plan["fits"]) == (2, 8, True)
    between = [c for c in plan["collectives"] if "replica" in c["axis"]]
    within = [c for c in plan["collectives"] if c["axis"] == "data" and c["op"] == "all-gather" and c["in_loop"]]
    gathered = lambda entries: sum(c["count"] for c in within if c["bytes"] == 2 * entries)  # as products read them
    assert gathered(96 * 160) == 2 * 4 * 3  # gate, up and down: micro-batches x layers x 3
    assert gathered(96 * 4 * 24) == gathered(96 * 2 * 24) == 2 * 4 * 2  # q and o, k and v
    # Between slices: sums of gradients in each micro-batch, the update once a step, and no activations.
    assert {c["op"] for c in between if c["in_loop"]} == {"all-reduce"}
    assert {c["op"] for c in between if not c["in_loop"]} == {"all-reduce", "all-gather"}
    assert all(c["count"] <= 8 for c in between)
    # The compiler starts them before what does not need them: all gradients, and most of the weights.
    assert all(c["overlapped"] for c in between if c["in_loop"])
    moved = lambda rows: sum(c["bytes"] * c["count"] for c in rows)
    assert moved(c for c in within if c["overlapped"]) > moved(within) / 2
    assert 0 < plan["estimate"]["exposed_s"] < plan["estimate"]["step_s"] / 2


@pytest.mark.parametrize(("chip", "topology"), [("v5p", "v5p:2x2x2"), ("v6e", "v6e:2x4")])
def test_the_flags_of_a_launcher_let_gathers_overlap(chip, topology, monkeypatch):
    """These compilers gather weights one by one unless they are told otherwise."""
    settings = ["--config.optim.micro_batches=2", "--config.data.batch=16"]

    def shares() -> float:
        plan = planned(topology, *settings, command=jaxkd)["collectives"]
        rows = [c for c in plan if c["op"] == "all-gather" and c["in_loop"]]
        moved = lambda rows: sum(c["bytes"] * c["count"] for c in rows)
        return moved(c for c in rows if c["overlapped"]) / moved(rows)

    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert shares() < 0.1
    command = ["bash", "launch/host.sh", "--chip", chip, "--dry-run", "--", "train"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name, value in (word.split("=", 1) for word in shlex.split(printed)[1:-2]):
        monkeypatch.setenv(name, value)
    assert shares() > 0.5


def test_a_rollout_is_planned():
    """Weights in their dtype and cache, per device; the rollout and the step of a token are the compiler's."""
    sizes = ("--config.data.batch=16", "--config.data.length=512", "--config.teacher.prompt=128")
    plan = planned("v5e:2x2", "--sampling", "--config.run.mesh.data=2", "--config.run.mesh.model=2", *sizes)
    rollout, config = plan["sampling"], {"layers": 2, "kv_heads": 2, "head_dim": 8}
    assert (rollout["writer"], rollout["rows"], rollout["tokens"]) == ("student", 16, 384)
    mean = 128 + 384 // 2
    of_rows = 2 * 16 * mean * config["layers"] * config["kv_heads"] * config["head_dim"]
    memory = rollout["hbm_bytes"]
    assert memory["cache"] == pytest.approx(of_rows / 4 * 4, rel=0.01)  # a quarter of float32 on each device
    assert memory["weights"] == 2 * plan["hbm_bytes"]["params"]  # gathered over `data`
    assert rollout["moved_bytes"] > memory["weights"] + memory["cache"]
    assert rollout["fits"]
    assert memory["peak"] > plan["hbm_bytes"]["params"] + plan["hbm_bytes"]["optimizer"]
    assert rollout["decode_s"] >= rollout["least_decode_s"]
    assert rollout["rollout_s"] == pytest.approx(
        rollout["prepare_s"] + rollout["prefill_s"] + 384 * rollout["decode_s"]
    )
    step = plan["estimate"]["step_s"]
    assert rollout["share"] == pytest.approx(rollout["rollout_s"] / (rollout["rollout_s"] + step))
    text = ("--config.teacher.signal=token", "--config.objective.kd.divergence=next_token")
    teacher = planned("v5e:2x2", "--sampling", *text)["sampling"]
    assert teacher["writer"] == "teacher"
    mix = ("--config.data.rollout.student=1.0", "--config.data.rollout.prompt=16", "--config.data.rollout.mix=0.2")
    both = planned("v5e:2x2", "--sampling", *mix)["sampling"]
    assert both["writer"] == "student and teacher"
    assert both["hbm_bytes"]["weights"] > teacher["hbm_bytes"]["weights"]  # those of both
    assert teacher["hbm_bytes"]["weights"] != memory["weights"]
