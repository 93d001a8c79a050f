"""Which mesh, remat, micro-batches and place of the teacher to run with: ranked on paper, the best compiled."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxkd.config.schema import SELF, Experiment, TeacherBlock
from jaxkd.core import sharding
from jaxkd.models import flops
from jaxkd.models.transformer import REMAT, parameter_count
from jaxkd.planning import advice, memory
from jaxkd.planning import plan as planning
from jaxkd.planning.memory import Setting, overrides
from jaxkd.planning.oom import Refused
from jaxkd.planning.plan import Memory, Plan
from jaxkd.planning.topology import Topology
from jaxkd.run import program
from jaxkd.run.job import Job

_WIDEST = 16  # devices on the model axis: beyond it every layer waits for its sums
_ASIDE = (1, 2, 4, 8)  # devices on the teacher's axis, where it may pay
_ROOM = 1.25  # how far an estimate on paper may be above the limit and still be worth a compilation


class Guess(NamedTuple):
    """A candidate, as far as arithmetic tells."""

    experiment: Experiment
    bytes: float  # on a device
    seconds: float  # of a step, at best
    whole: float  # of a step in which nothing hides anything: what decides among equals


class Tried(NamedTuple):
    """A candidate that was compiled."""

    experiment: Experiment
    plan: Plan | None  # None where the compiler refused it for want of another memory than HBM
    seconds: float


class Suggestion(NamedTuple):
    """The fastest that was compiled and fits, or what takes least if none does."""

    plan: Plan
    asked: Experiment
    tried: tuple[Tried, ...]
    known: int  # candidates on paper
    seconds: float  # that were spent

    def json(self) -> dict[str, Any]:
        """The plan as one object of plain values, with what makes it of what was asked for; null where none fits."""
        candidates = [
            {
                "overrides": overrides(self.asked, t.experiment),
                "fits": t.plan is not None and t.plan.fits,
                "step_s": t.plan and t.plan.estimate and t.plan.estimate.step_s,
                "peak_bytes": t.plan and t.plan.memory.peak,
                "compile_s": t.seconds,
            }
            for t in self.tried
        ]
        best = overrides(self.asked, self.plan.job.experiment) if self.plan.fits else None
        return {**self.plan.json(), "overrides": best, "candidates": candidates}


def suggest(e: Experiment, topology: Topology, budget: float, say: Callable[[str], None]) -> Suggestion:
    """Rank what a recipe may set, compile the best within a budget, and keep the fastest that fits.

    Args:
        e: what was asked for.
        topology: to run on.
        budget: seconds; no compilation is begun that would go beyond it if it took as long as the last one.
        say: prints a line on each.

    Raises:
        ValueError: when no mesh of the slice divides the batch.
        Refused: when all that was compiled wants another memory than HBM.
    """
    start, place = time.monotonic(), planning.devices(topology)
    guesses = _guesses(e, topology, place)
    if not guesses:
        raise ValueError(
            f"data.batch={e.data.batch} rows do not divide over any mesh of {topology.name}: with {topology.devices} "
            f"devices and up to {_WIDEST} on the model axis it must be a multiple of "
            f"{max(topology.devices // _WIDEST, 1)}"
        )
    waiting, tried = _ranked(guesses, topology.chip.hbm), list[Tried]()
    best: Plan | None = None
    refusal: Refused | None = None
    while waiting:
        guess = waiting.pop(0)
        if best and _hopeless(guess, best):
            continue
        began = time.monotonic()
        if tried and began - start + tried[-1].seconds > budget:
            break
        found: Plan | None = None
        try:
            found = planning.plan(planning.build(guess.experiment, place), topology)
            said = f"{found.estimate.step_s:.3g} s" if found.estimate else "does not fit"
        except Refused as error:
            refusal, said = error, str(error)
        tried.append(Tried(guess.experiment, found, time.monotonic() - began))
        say(f"{' '.join(overrides(e, guess.experiment)) or 'as it is'}: {said} ({tried[-1].seconds:.0f} s to compile)")
        if found is None:
            continue
        if not found.fits:  # what is estimated to take as much waits
            smaller = [g for g in waiting if g.bytes < guess.bytes]
            waiting = smaller + [g for g in waiting if g.bytes >= guess.bytes]
        if best is None or _better(found, best):
            best = found
    if best is None:
        assert refusal is not None
        raise refusal
    return Suggestion(best, e, tuple(tried), len(guesses), time.monotonic() - start)


def _ranked(guesses: Sequence[Guess], limit: float) -> list[Guess]:
    """In the order to compile in: what is estimated to fit by its speed, then what is near it, likewise.

    Where nothing is estimated to fit, what takes least comes first.
    """
    fast = sorted(guesses, key=lambda g: (g.seconds, g.whole))
    fitting = [g for g in fast if g.bytes <= limit]
    if not fitting:
        return sorted(fast, key=lambda g: g.bytes)
    return [*fitting, *(g for g in fast if limit < g.bytes <= _ROOM * limit)]


def _hopeless(guess: Guess, best: Plan) -> bool:
    """Whether a candidate is slower on paper, where everything is at its peak, than what was compiled."""
    return best.estimate is not None and guess.seconds > best.estimate.step_s


def _better(found: Plan, best: Plan) -> bool:
    if found.estimate is None or best.estimate is None:
        return found.fits or (not best.fits and found.memory.peak < best.memory.peak)
    return found.estimate.step_s < best.estimate.step_s


def _guesses(e: Experiment, topology: Topology, place: list) -> list[Guess]:
    """Every mesh and place of the teacher, with each remat and the number of micro-batches, on paper.

    A row is shared by more devices only where nothing is estimated to fit otherwise.
    """
    found: list[Guess] = []
    job: Job | None = None
    asides: Sequence[int] = (e.run.mesh.teacher,)
    for sharing in (1, 2, 4, 8):
        for aside in asides:
            for s in _meshes(e, topology, e.run.mesh.context * sharing, aside):
                if job is None:
                    job = planning.build(s.experiment, place)
                found += _on(job, s)
        if job is not None and sharing == 1 and _larger(job):
            asides = sorted({*_ASIDE, *asides})
            rest = [s for n in asides if n != e.run.mesh.teacher for s in _meshes(e, topology, e.run.mesh.context, n)]
            found += [g for s in rest for g in _on(job, s)]
        if any(g.bytes <= topology.chip.hbm for g in found):
            break
    return found


def _meshes(e: Experiment, topology: Topology, context: int, aside: int) -> Iterator[Setting]:
    """The slice with each size of `model`."""
    model = 1
    while model == 1 or model * aside <= min(_WIDEST, topology.devices):
        sizes = dataclasses.replace(e.run.mesh, data=-1, model=model, context=context, teacher=aside)
        tried = Setting(dataclasses.replace(e, run=dataclasses.replace(e.run, mesh=sizes)), topology)
        if (s := memory.divided(tried)) is not None:
            mesh = dataclasses.replace(sizes, data=s.sizes["data"])
            run = dataclasses.replace(s.experiment.run, mesh=mesh)
            yield s._replace(experiment=dataclasses.replace(s.experiment, run=run))
        model *= 2


def _larger(job: Job) -> bool:
    """Whether a teacher that runs in the step is larger than its student: it may want an axis of its own."""
    return any(parameter_count(c) > parameter_count(job.student.config) for _, c in memory.live(job))


def _places(teacher: TeacherBlock) -> list[TeacherBlock]:
    """How the only teacher's parameters may lie; those of several, and none, stay as they are."""
    if teacher.members or teacher.path == SELF:
        return [teacher]
    return [dataclasses.replace(teacher, sharding=table) for table in sharding.TABLES]


def _on(job: Job, s: Setting) -> Iterator[Guess]:
    """The candidates of one mesh."""
    parts = {
        "params": planning.held((job.state.params, job.state.ema)),
        "optimizer": planning.held(job.state.opt_state),
        "teacher": planning.held(planning.weights_of(job)),
    }
    now = Memory(s.topology.chip.hbm, sum(parts.values()), **parts, temp=0)
    for teacher in _places(s.experiment.teacher):
        placed = s._replace(experiment=dataclasses.replace(s.experiment, teacher=teacher))
        lies = memory.lying(job, now, placed)
        own = memory.student_bytes(job, placed.experiment, placed.sizes)
        for remat in REMAT:
            run = dataclasses.replace(s.experiment.run, remat=remat)
            for number in (n for n in range(1, s.rows + 1) if s.rows % n == 0):
                optim = dataclasses.replace(s.experiment.optim, micro_batches=number)
                tried = placed._replace(experiment=dataclasses.replace(placed.experiment, run=run, optim=optim))
                yield _guess(job, tried, lies.peak, own)


def _guess(job: Job, s: Setting, lies: int, own: int) -> Guess:
    """Memory and time of a candidate from its shapes.

    memory = state + teacher + gradients + activations of a micro-batch + the heads, gathered
    time = max(products, weights and attention through memory, weights and sums through links, gradients between slices)
    """
    e, topology, sizes, student = s.experiment, s.topology, s.sizes, job.student.config
    chip, model, aside = topology.chip, sizes["model"], sizes["teacher"]
    parts, kept = e.optim.micro_batches, e.run.remat == "layer"
    tokens = memory.tokens_of(e, sizes)
    teachers = memory.live(job)

    # bfloat16, gathered over data. To a teacher `aside` splits layers and not rows: `wide` is 1 for the student.
    weights = lambda c, wide=1: 2 * (flops.body(c, 1) / 2 / wide + c.embed * c.padded_vocab) / model
    passes = 4 if kept else 3
    through = parts * (passes * weights(student) + sum(weights(c, aside) for _, c in teachers))
    held_whole = lambda table: not sharding.TABLES[table]["embed"]
    whole = parts * sum(weights(c, aside) for name, c in teachers if held_whole(e.teacher.models[name].sharding))
    whole += parts * passes * weights(student) * held_whole(e.student.sharding)
    attention = lambda c: c.layers * c.heads / model * tokens * e.data.length * 12 * parts
    moved = through + passes * attention(student) + sum(attention(c) for _, c in teachers) + 28 / 4 * own
    split = math.prod(sizes.values()) // (model * sizes["replica"])
    gathered = (1 - 1 / split) * (through - whole + parts * weights(student))
    sums = lambda c, wide=1: 4 * c.layers * tokens * wide * c.embed * 2 * parts * (1 - 1 / (model * wide))
    exchanged = gathered + (passes - 1) * sums(student) + sum(sums(c, aside) for _, c in teachers)
    links = sum(2 if wraps else 1 for n, wraps in zip(topology.shape, topology.wraps, strict=True) if n > 1) or math.inf
    times = (
        program.flops_of(job._replace(experiment=e)).executed / topology.devices / chip.flops,
        moved / chip.bandwidth,
        exchanged / (links * chip.link),
        parts * 2 * own * (1 - 1 / topology.slices) / chip.dcn if chip.dcn else 0.0,
    )
    return Guess(e, lies + memory.temporary(job, e, sizes), max(times), sum(times))


def lines(s: Suggestion) -> list[str]:
    """A suggestion to read: the plan, how it was found, and what to add to the command."""
    added = " ".join(overrides(s.asked, s.plan.job.experiment)) or "nothing: the recipe is the fastest as it is"
    found = [
        *advice.lines(s.plan),
        f"looked at {s.known} candidates on paper, {len(s.tried)} compiled in {s.seconds:.0f} s",
    ]
    return [
        *found,
        f"add       {added}" if s.plan.fits else "add       none of what was compiled fits: a larger slice, see above",
    ]
