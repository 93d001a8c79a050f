"""Which candidates are compiled and which is suggested, with plans of given figures: nothing is compiled."""

import json
import re

import jax
import pytest
from harness import recipe

from jaxkd.models import flops
from jaxkd.planning import plan, search
from jaxkd.planning import topology as topologys
from jaxkd.planning.oom import OnChipOom

POD = "llama_8b_to_1b.py"
SLICE = topologys.topology("v5e:2x4")


@pytest.fixture(scope="module")
def tiny():
    return plan.build(recipe("tiny.py", "--config.data.batch=64", "--config.optim.micro_batches=2"), jax.devices())


@pytest.fixture
def suggest(tiny, monkeypatch):
    """`suggest(outcomes, budget)`: a search where settings that match a pattern have these seconds and peak bytes.

    No seconds: it does not fit; an exception is raised. What matches no pattern takes 99 s.
    """

    def go(outcomes, budget=1e9, e=tiny.experiment):
        def planned(job, topology):
            name = " ".join(search.overrides(e, job.experiment))
            outcome = next((o for pattern, o in outcomes.items() if re.fullmatch(pattern, name)), (99.0, 1))
            if isinstance(outcome, Exception):
                raise outcome
            estimate = None if outcome[0] is None else plan.Estimate(outcome[0], 0.0, 0.0)
            memory = plan.Memory(2_000, outcome[1], 1, 2, 3, 4)
            return plan.Plan(topology, job, memory, flops.Step(1.0, 1.0, 0.0, 0.0), (), estimate)

        monkeypatch.setattr(plan, "devices", lambda topology: jax.devices())
        monkeypatch.setattr(plan, "build", lambda e, devices: tiny._replace(experiment=e))
        monkeypatch.setattr(plan, "plan", planned)
        go.lines = []
        return search.suggest(e, SLICE, budget, go.lines.append)

    return go


def test_the_fastest_that_fits_is_suggested(suggest):
    one = "--config.optim.micro_batches=1"
    suggestion = suggest({"": (4.0, 800), one: (3.0, 900), f"{one}|.*replicated.*": (None, 5_000)})
    values = json.loads(json.dumps(suggestion.json()))
    assert values["overrides"] == [one]
    assert (values["fits"], values["estimate"]["step_s"]) == (True, 3.0)
    first, second, *_, last = [{k: v for k, v in c.items() if k != "compile_s"} for c in values["candidates"]]
    assert first == {"overrides": [one], "fits": True, "step_s": 3.0, "peak_bytes": 900}
    assert second == {"overrides": [], "fits": True, "step_s": 4.0, "peak_bytes": 800}
    assert (last["fits"], last["step_s"], last["peak_bytes"]) == (False, None, 5_000)
    assert suggestion.lines()[-1] == f"add       {one}"
    assert any(line.startswith(f"{one}: 3 s") for line in suggest.lines)
    # One setting changes at a time, and the recipe may be the best.
    suggestion = suggest({"": (1.0, 900)})
    assert suggestion.json()["overrides"] == []
    tried = [c["overrides"] for c in suggestion.json()["candidates"]]
    changed = ["optim.micro_batches=1", "run.mesh.model=2", "run.mesh.teacher=2", "teacher.sharding=replicated"]
    assert sorted(tried) == [[], *([f"--config.{key}"] for key in changed)]
    # What does not fit takes more micro-batches until it does.
    suggestion = suggest({"": (None, 5_000), ".*micro_batches=4": (None, 3_000), ".*micro_batches=8": (9.0, 1_000)})
    assert suggestion.tried[0].rank == (False, 9.0)
    assert suggestion.json()["overrides"] == ["--config.optim.micro_batches=8"]
    # Where nothing fits the smallest is shown, and no arguments.
    suggestion = suggest({".*remat=layer.*": (None, 3_000), ".*": (None, 4_000)})
    assert (suggestion.plan.fits, suggestion.plan.memory.peak) == (False, 3_000)
    assert suggestion.json()["overrides"] is None
    assert "larger slice" in suggestion.lines()[-1]
    # No compilation is begun beyond the budget.
    assert len(suggest({}, budget=0).tried) == 1


def test_a_kernel_out_of_vmem_is_one_candidate_less(suggest):
    error = OnChipOom("vmem")
    suggestion = suggest({"": error, ".*micro_batches=4": (3.0, 900)})
    assert suggestion.plan.estimate.step_s == 3.0
    assert suggestion.json()["candidates"][-1]["fits"] is False
    assert "vmem" in suggest.lines[0]
    with pytest.raises(OnChipOom, match="vmem"):
        suggest({".*": error})


def test_candidates_fill_the_slice_and_divide_its_rows():
    """What the compiler is asked is what `job.build` accepts: batch, micro-batches and evaluation rows divide."""
    e = search._fitted(recipe(POD), SLICE)
    for fits in (True, False):
        estimate = plan.Estimate(1, 1, 1) if fits else None
        result = plan.Plan(SLICE, plan.build(e, jax.devices()), None, None, (), estimate)
        variants = list(search._variants(search.Tried(e, result, 0.0), SLICE))
        meshes = {(v.run.mesh.model, v.run.mesh.teacher, v.run.mesh.context) for v in variants}
        assert meshes == {(1, 1, 1), (2, 1, 1), (1, 2, 1), *([] if fits else [(1, 1, 2)])}  # the teacher is the larger
        for v in variants:
            over = 8 // v.run.mesh.model // v.run.mesh.context
            assert v.data.batch % (v.optim.micro_batches * over) == 0
            assert v.run.eval_batch % over == 0
    two = search._fitted(recipe(POD, "--config.run.mesh.replica=2"), topologys.topology("v5e:2x2", 2))
    assert (two.run.mesh.replica, search._sizes(two, topologys.topology("v5e:2x2", 2))["data"]) == (2, 4)
    with pytest.raises(ValueError, match=r"data\.batch"):
        search.suggest(recipe("tiny.py", "--config.data.batch=3"), topologys.topology("v5e:4x8"), 1.0, print)
