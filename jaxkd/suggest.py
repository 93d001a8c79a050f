"""Which mesh, remat, micro-batches and place of the teacher to run with: ranked on paper, the best compiled."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxkd import flops
from jaxkd import plan as planning
from jaxkd.chips import Topology
from jaxkd.experiment import SELF, Experiment, TeacherBlock
from jaxkd.job import Job
from jaxkd.models.transformer import REMAT
from jaxkd.plan import Plan
from jaxkd.sharding import TABLES

_WIDEST = 16  # devices on the model axis: beyond it every layer waits for its sums
_ROOM = 1.25  # how far an estimate on paper may be above the limit and still be worth a compilation


class Guess(NamedTuple):
    """A candidate, as far as arithmetic tells."""

    experiment: Experiment
    bytes: float  # on a device
    seconds: float  # of a step, at best
    whole: float  # of a step in which nothing hides anything: what decides among equals


class Suggestion(NamedTuple):
    """The fastest that was compiled and fits, or what was asked for if none does."""

    plan: Plan
    asked: Experiment
    compiled: int
    known: int  # candidates on paper
    seconds: float  # that were spent


def suggest(e: Experiment, topology: Topology, budget: float, say: Callable[[str], None]) -> Suggestion:
    """Rank what a recipe may set, compile the best within a budget, and keep the fastest that fits.

    Args:
        e: what was asked for.
        topology: to run on.
        budget: seconds; no compilation is begun that would go beyond it if it took as long as the last one.
        say: prints a line on each.

    Raises:
        ValueError: when no mesh of the slice divides the batch.
    """
    start, place = time.monotonic(), planning.devices(topology)
    guesses = sorted(_guesses(e, topology, place), key=lambda g: (g.seconds, g.whole))
    if not guesses:
        raise ValueError(
            f"data.batch={e.data.batch} rows do not divide over any mesh of {topology.name}: with {topology.devices} "
            f"devices and up to {_WIDEST} on the model axis it must be a multiple of "
            f"{max(topology.devices // _WIDEST, 1)}"
        )
    likely = [g for g in guesses if g.bytes <= _ROOM * topology.chip.hbm] or guesses
    best: Plan | None = None
    last, compiled = 0.0, 0
    for guess in likely:
        began = time.monotonic()
        if compiled and (began - start + last > budget or (best and best.estimate and _hopeless(guess, best))):
            break
        found = planning.plan(planning.build(guess.experiment, place), topology)
        last, compiled = time.monotonic() - began, compiled + 1
        said = f"{found.estimate.step_s:.3g} s" if found.estimate else "does not fit"
        say(f"{' '.join(overrides(e, guess.experiment)) or 'as it is'}: {said} ({last:.0f} s to compile)")
        if best is None or _better(found, best):
            best = found
    assert best is not None
    return Suggestion(best, e, compiled, len(guesses), time.monotonic() - start)


def _hopeless(guess: Guess, best: Plan) -> bool:
    """Whether a candidate is slower on paper, where everything is at its peak, than what was compiled."""
    return best.estimate is not None and guess.seconds > best.estimate.step_s


def _better(found: Plan, best: Plan) -> bool:
    if found.estimate is None or best.estimate is None:
        return found.fits or (not best.fits and found.memory.peak < best.memory.peak)
    return found.estimate.step_s < best.estimate.step_s


def _guesses(e: Experiment, topology: Topology, place: list) -> Iterator[Guess]:
    """Every mesh and place of the teacher, with each remat and the number of micro-batches, on paper."""
    context, aside, model = e.run.mesh.context, e.run.mesh.teacher, 1
    replica = topology.slices if e.run.mesh.replica == -1 else e.run.mesh.replica
    optim = dataclasses.replace(e.optim, micro_batches=1)
    while model <= min(_WIDEST, topology.devices):
        data = topology.devices // (replica * context * aside * model)
        over = replica * data * aside
        rows = e.data.batch // over if over else 0
        if over * context * model == topology.devices and rows and e.data.batch % over == 0:
            evaluated = -(-e.run.eval_batch // over) * over
            mesh = dataclasses.replace(e.run.mesh, data=data, model=model)
            run = dataclasses.replace(e.run, mesh=mesh, eval_batch=evaluated)
            for teacher in _places(e.teacher):
                built = planning.build(dataclasses.replace(e, run=run, optim=optim, teacher=teacher), place)
                for remat in REMAT:
                    for parts in (n for n in range(1, rows + 1) if rows % n == 0):
                        tried = dataclasses.replace(
                            built.experiment,
                            run=dataclasses.replace(built.experiment.run, remat=remat),
                            optim=dataclasses.replace(optim, micro_batches=parts),
                        )
                        yield _guess(built._replace(experiment=tried), topology)
        model *= 2


def _places(teacher: TeacherBlock) -> list[TeacherBlock]:
    """How the only teacher's parameters may lie; those of several, and none, stay as they are."""
    if teacher.members or teacher.path == SELF:
        return [teacher]
    return [dataclasses.replace(teacher, sharding=table) for table in TABLES]


def _guess(built: Job, topology: Topology) -> Guess:
    """Memory and time of a candidate from its shapes.

    memory = state + teacher + gradients + activations of a micro-batch + the heads, gathered
    time = max(products, weights and attention through memory, weights and sums through links, gradients between slices)
    """
    e, chip, student = built.experiment, topology.chip, built.student.config
    sizes = built.mesh.shape
    model, aside = sizes["model"], sizes["teacher"]
    split = sizes["data"] * sizes["context"] * aside
    parts, kept = e.optim.micro_batches, e.run.remat == "layer"
    tokens = e.data.batch * e.data.length // (sizes["replica"] * split) // parts  # of a micro-batch, on a device
    models = [] if built.own else [m for n, m in built.teachers.items() if not e.teacher.models[n].cache]
    teachers = [m.config for m in models]
    taught = planning.held(planning.weights_of(built))
    own = planning.held(built.state.params)

    # To a teacher `aside` splits layers and not rows: `wide` is 1 for the student.
    layer = lambda c, wide=1: tokens * (12 * wide * c.embed + (3 * c.mlp + 6 * c.heads * e.data.length) / model * 2)
    saved = student.layers * (2 * tokens * student.embed if kept else layer(student))
    head = student.embed * student.padded_vocab * 10 / model + sum(
        2 * c.embed * c.padded_vocab / model for c in teachers
    )
    largest = max([layer(student), *[layer(c, aside) for c in teachers]])
    temporary = saved + largest + head + own * (2 if parts > 1 else 1)
    fixed = planning.held(built.state) + taught

    # bfloat16, gathered over data
    weights = lambda c, wide=1: 2 * (flops.body(c, 1) / 2 / wide + c.embed * c.padded_vocab) / model
    passes = 4 if kept else 3
    through = parts * (passes * weights(student) + sum(weights(c, aside) for c in teachers))
    whole = parts * sum(weights(m.config, aside) for m in models if not m.rules["embed"])
    whole += parts * passes * weights(student) * (not built.student.rules["embed"])
    attention = lambda c: c.layers * c.heads / model * tokens * e.data.length * 12 * parts
    moved = through + passes * attention(student) + sum(map(attention, teachers)) + 28 / 4 * own
    gathered = (1 - 1 / split) * (through - whole + parts * weights(student))
    sums = lambda c, wide=1: 4 * c.layers * tokens * wide * c.embed * 2 * parts * (1 - 1 / (model * wide))
    exchanged = gathered + (passes - 1) * sums(student) + sum(sums(c, aside) for c in teachers)
    links = sum(2 if wraps else 1 for n, wraps in zip(topology.shape, topology.wraps, strict=True) if n > 1) or math.inf
    times = (
        planning.flops_of(built).executed / topology.devices / chip.flops,
        moved / chip.bandwidth,
        exchanged / (links * chip.link),
        parts * 2 * own * (1 - 1 / topology.slices) / chip.dcn if chip.dcn else 0.0,
    )
    return Guess(e, fixed + temporary, max(times), sum(times))


def overrides(asked: Experiment, e: Experiment) -> list[str]:
    """The command line's arguments that make one experiment of another, as far as candidates differ."""
    values = lambda x: {
        "run.mesh.data": x.run.mesh.data,
        "run.mesh.model": x.run.mesh.model,
        "teacher.sharding": x.teacher.sharding,
        "run.remat": x.run.remat,
        "optim.micro_batches": x.optim.micro_batches,
        "run.eval_batch": x.run.eval_batch,
    }
    before = values(asked)
    return [f"--config.{key}={value}" for key, value in values(e).items() if value != before[key]]


def lines(s: Suggestion) -> list[str]:
    """A suggestion to read: the plan, how it was found, and what to add to the command."""
    added = " ".join(overrides(s.asked, s.plan.job.experiment)) or "nothing: the recipe is the fastest as it is"
    found = [
        *planning.lines(s.plan),
        f"looked at {s.known} candidates on paper, {s.compiled} compiled in {s.seconds:.0f} s",
    ]
    return [
        *found,
        f"add       {added}" if s.plan.fits else "add       none of what was compiled fits: a larger slice, see above",
    ]
