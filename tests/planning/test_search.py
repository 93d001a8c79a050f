"""Which settings are compiled and which is taken, on figures of arithmetic or made by hand: nothing is compiled."""

import dataclasses
import json

import jax
import pytest
from harness import REPOSITORY

from jaxkd.config.recipe import read_config
from jaxkd.config.schema import experiment
from jaxkd.models import flops
from jaxkd.planning import plan
from jaxkd.planning import search as suggest
from jaxkd.planning import topology as topologys
from jaxkd.planning.oom import Refused
from jaxkd.planning.search import Guess

TINY = f"--config={REPOSITORY / 'configs' / 'tiny.py'}"
POD = f"--config={REPOSITORY / 'configs' / 'llama_8b_to_1b.py'}"
SLICE = topologys.topology("v5e:2x4")


def asked(*overrides: str, recipe: str = TINY):
    return experiment(read_config([recipe, *overrides]))


@pytest.fixture(scope="module")
def tiny():
    return plan.build(asked("--config.data.batch=64"), jax.devices())


def parts(e, number: int):
    return dataclasses.replace(e, optim=dataclasses.replace(e.optim, micro_batches=number))


def made(job, step_s: float | None, peak: int = 1_000, topology: topologys.Topology = SLICE) -> plan.Plan:
    """A plan with these figures; without a time it does not fit."""
    time = None if step_s is None else plan.Estimate(step_s, 0.0, 0.0)
    return plan.Plan(topology, job, plan.Memory(2_000, peak, 1, 2, 3, 4), flops.Step(1.0, 1.0, 0.0, 0.0), (), time)


# -------------------------------------------------------------------------------------- on paper


def test_candidates_divide_the_batch_and_are_ranked():
    e = asked(recipe=POD)
    guesses = suggest._guesses(e, SLICE, jax.devices())
    meshes = [g.experiment.run.mesh for g in guesses]
    assert {(m.data, m.model) for m in meshes if m.teacher == 1} == {(8, 1), (4, 2), (2, 4), (1, 8)}
    assert {m.teacher for m in meshes} == {1, 2, 4, 8}  # the teacher is the larger, and runs in the step
    assert {m.context for m in meshes} == {1}  # a row fits
    for g in guesses:
        mesh = g.experiment.run.mesh
        assert mesh.data * mesh.model * mesh.teacher == 8
        assert e.data.batch % (g.experiment.optim.micro_batches * mesh.data * mesh.teacher) == 0
        assert g.experiment.run.eval_batch % (mesh.data * mesh.teacher) == 0
    alone = [g for g in guesses if g.experiment.run.mesh.data == 8]
    one = {
        (g.experiment.run.remat, g.experiment.optim.micro_batches): g
        for g in alone
        if g.experiment.teacher.sharding == "fsdp"
    }
    whole = {
        g.experiment.teacher.sharding: g
        for g in alone
        if (g.experiment.optim.micro_batches, g.experiment.run.remat) == (8, "layer")
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


def test_what_lies_on_a_device_is_counted_as_a_job_holds_it():
    """On paper no mesh is built: state and teacher are those of one that is."""
    found = [
        g
        for g in suggest._guesses(asked("--config.data.batch=64"), SLICE, jax.devices())
        if (g.experiment.run.mesh.model, g.experiment.run.mesh.teacher) == (2, 2)
    ]
    g = next(g for g in found if g.experiment.teacher.sharding == "replicated")
    job = plan.build(g.experiment, jax.devices())
    state = (job.state.params, job.state.ema, job.state.opt_state)
    held = plan.held(state) + plan.held(plan.weights_of(job))
    made = suggest.footprint.temporary(job, job.experiment, job.mesh.shape)
    assert g.bytes == pytest.approx(held + made, abs=16)


def test_a_teacher_that_does_not_run_has_no_axis():
    cached = asked("--config.teacher.signal=hidden", "--config.teacher.cache=gone")
    assert {g.experiment.run.mesh.teacher for g in suggest._guesses(cached, SLICE, jax.devices())} == {1}


def test_a_row_is_shared_where_it_does_not_fit_alone():
    """Of a row of 48 thousand tokens the scores of a layer are 29 GB in each of four heads, which `model` can split."""
    e = asked("--config.data.length=49152", "--config.teacher.shape.max_length=49152")
    found = suggest._guesses(e, SLICE, jax.devices())
    assert {g.experiment.run.mesh.context for g in found} == {1, 2}
    fitting = [g for g in found if g.bytes <= SLICE.chip.hbm]
    assert {(g.experiment.run.mesh.context, g.experiment.run.mesh.model) for g in fitting} == {(2, 4)}
    assert "--config.run.mesh.context=2" in suggest.overrides(e, fitting[0].experiment)


# -------------------------------------------------------------------------------------- the order


def test_what_is_estimated_to_fit_comes_first_by_speed_then_what_is_near(tiny):
    e = tiny.experiment
    fast, slow, near, far = Guess(e, 9, 2.0, 3.0), Guess(e, 5, 4.0, 4.0), Guess(e, 12, 1.0, 1.0), Guess(e, 13, 0.5, 0.5)
    equal = Guess(e, 8, 2.0, 2.0)
    assert suggest._ranked([near, slow, far, fast, equal], 10) == [equal, fast, slow, near]
    assert suggest._ranked([far, near], 10) == [near, far]  # none: the smallest first
    assert suggest._ranked([Guess(e, 99, 0.1, 0.1), far, near], 10)[0] == near


def test_the_faster_of_two_that_fit_is_better_and_the_smaller_of_two_that_do_not(tiny):
    better = lambda a, b: suggest._better(made(tiny, *a), made(tiny, *b))
    assert better((1.0,), (2.0,))
    assert not better((2.0,), (1.0,))
    assert better((9.0,), (None, 3_000))
    assert not better((None, 3_000), (9.0,))
    assert better((None, 3_000), (None, 4_000))
    assert not better((None, 4_000), (None, 3_000))


def test_what_is_slower_on_paper_than_what_was_compiled_is_hopeless(tiny):
    guess = Guess(tiny.experiment, 1, 1.0, 1.0)
    assert suggest._hopeless(guess, made(tiny, 0.5))
    assert not suggest._hopeless(guess, made(tiny, 1.5))
    assert not suggest._hopeless(guess, made(tiny, None))


# -------------------------------------------------------------------------------------- the search


@pytest.fixture
def search(tiny, monkeypatch):
    """`search(guesses, times, budget)`: a suggestion among made guesses, whose micro-batches say what each takes."""
    said: list[str] = []

    def go(guesses, times, budget=1e9, recipe=tiny.experiment):
        def planned(job, topology):
            found = times[job.experiment.optim.micro_batches]
            if isinstance(found, Exception):
                raise found
            seconds, peak = found
            return made(job, seconds, peak)

        monkeypatch.setattr(plan, "devices", lambda topology: jax.devices())
        monkeypatch.setattr(plan, "build", lambda e, place: tiny._replace(experiment=e))
        monkeypatch.setattr(plan, "plan", planned)
        monkeypatch.setattr(suggest, "_guesses", lambda *_: [Guess(parts(recipe, n), *g) for n, g in guesses.items()])
        found = suggest.suggest(recipe, SLICE, budget, said.append)
        return found, [t.experiment.optim.micro_batches for t in found.tried]

    go.said = said
    return go


LIMIT = SLICE.chip.hbm


def test_the_fastest_that_fits_is_taken(search):
    guesses = {1: (LIMIT * 1.2, 1.0, 1.0), 2: (LIMIT / 2, 2.0, 2.0), 4: (LIMIT / 3, 3.0, 3.0), 8: (LIMIT / 4, 9.0, 9.0)}
    found, order = search(guesses, {1: (None, 5_000), 2: (4.0, 900), 4: (3.5, 800)})
    assert order == [2, 4, 1]  # 8 is slower on paper than 2 is
    assert found.plan.estimate.step_s == 3.5
    assert (found.known, len(found.tried)) == (4, 3)
    assert search.said[0].startswith("--config.optim.micro_batches=2: 4 s")
    values = json.loads(json.dumps(found.json()))
    assert values["overrides"] == ["--config.optim.micro_batches=4"]
    assert values["fits"]
    assert values["estimate"]["step_s"] == 3.5
    candidates = [{k: v for k, v in c.items() if k != "compile_s"} for c in values["candidates"]]
    assert candidates == [
        {"overrides": ["--config.optim.micro_batches=2"], "fits": True, "step_s": 4.0, "peak_bytes": 900},
        {"overrides": ["--config.optim.micro_batches=4"], "fits": True, "step_s": 3.5, "peak_bytes": 800},
        {"overrides": [], "fits": False, "step_s": None, "peak_bytes": 5_000},
    ]
    said = suggest.lines(found)
    assert "looked at 4 candidates on paper, 3 compiled in 0 s" in said
    assert said[-1] == "add       --config.optim.micro_batches=4"


def test_what_is_the_fastest_already_needs_nothing(search):
    found, _ = search({1: (1.0, 1.0, 1.0)}, {1: (1.0, 900)})
    assert found.json()["overrides"] == []
    assert suggest.lines(found)[-1] == "add       nothing: the recipe is the fastest as it is"


def test_where_nothing_is_estimated_to_fit_the_smallest_is_compiled_first(search):
    guesses = {1: (LIMIT * 1.1, 1.0, 1.0), 2: (LIMIT * 3, 0.5, 0.5), 4: (LIMIT * 1.05, 8.0, 8.0)}
    found, order = search(guesses, {4: (9.0, 900)}, budget=0)
    assert order == [4]
    assert found.plan.fits


def test_what_does_not_fit_sends_what_takes_as_much_to_the_end(search):
    guesses = {1: (LIMIT / 2, 1.0, 1.0), 2: (LIMIT * 0.6, 2.0, 2.0), 4: (LIMIT / 3, 3.0, 3.0)}
    _, order = search(guesses, {1: (None, 5_000), 2: (2.5, 900), 4: (3.5, 900)})
    assert order == [1, 4, 2]


def test_where_nothing_fits_that_is_said(search):
    found, order = search({1: (1.0, 1.0, 1.0), 2: (0.5, 2.0, 2.0)}, {1: (None, 5_000), 2: (None, 4_000)})
    assert order == [1, 2]
    assert (found.plan.fits, found.plan.memory.peak) == (False, 4_000)
    assert found.json()["overrides"] is None
    assert suggest.lines(found)[-1].startswith("add       none of what was compiled fits")


def test_a_kernel_that_is_refused_is_one_candidate_less(search):
    guesses, refusal = {1: (1.0, 1.0, 1.0), 2: (0.5, 2.0, 2.0)}, Refused("the compiler ran out of vmem")
    found, order = search(guesses, {1: refusal, 2: (3.0, 900)})
    assert order == [1, 2]
    assert found.plan.estimate.step_s == 3.0
    assert "as it is: the compiler ran out of vmem" in search.said[0]
    assert found.json()["candidates"][0]["fits"] is False
    with pytest.raises(Refused, match="out of vmem"):
        search(guesses, {1: refusal, 2: refusal})
