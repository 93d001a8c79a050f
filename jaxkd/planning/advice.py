"""A plan to read, and where a step does not fit, which settings would: each is checked by arithmetic first."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

from jaxkd.config.schema import Experiment
from jaxkd.models.transformer import parameter_count
from jaxkd.planning import memory as footprint
from jaxkd.planning import topology as topologys
from jaxkd.planning.memory import Setting
from jaxkd.planning.plan import Plan
from jaxkd.planning.topology import Topology

_WIDER = (2, 4, 8, 16)
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a teacher's weight


def would_fit(p: Plan) -> list[str]:
    """For a step that does not fit: settings that are estimated to, a line each.

    First what is cheapest: the whole slice where the mesh is a part of it, rematerialisation, more micro-batches. Then
    what holds less of teacher and student, then other axes of the mesh, then all of it at once, then larger slices.
    """
    asked, topology, found = p.job.experiment, p.topology, list[str]()

    def say(settings: Iterable[Setting | None]) -> bool:
        for s in filter(None, settings):
            memory = footprint.estimated(p, s)
            if memory.peak > memory.limit:
                continue
            place = [] if s.topology == topology else [f"--topology {s.topology.name}"]
            line = " ".join([*place, *footprint.overrides(asked, s.experiment)])
            line += f" ({binary(memory.peak)} of {binary(memory.limit)} a device)"
            if line not in found:
                found.append(line)
            return True
        return False

    known = p.job.mesh.size == topology.devices  # otherwise `data` is for fewer
    of = lambda e, place: e if known and place is topology else _mesh(e, data=-1)
    whole = lambda e, place=topology: _whole(Setting(of(e, place), place))

    def eased(start: Setting | None) -> list[Setting]:
        # Where what lies there is too much, it does not matter what a step makes.
        fits = start and footprint.lying(p.job, p.memory, start).peak <= start.topology.chip.hbm
        return list(_eased(start)) if start and fits else []

    easing = lambda e, places: (s for place in places for s in eased(whole(e, place)))
    start, least = whole(asked), _fully(asked)
    if say([start]):  # the rest of the slice is enough
        return found
    options = eased(start)
    kept, made = ([s for s in options if s.experiment.run.remat == r] for r in (asked.run.remat, "layer"))
    enough = say(kept)
    enough = say(made[:1] if enough else made) or enough
    # Where micro-batches are enough, nothing else is said with them.
    settings = (lambda s: [s]) if enough else eased
    for changes in _narrower(asked):
        say(s for e in changes for s in settings(whole(e)))
    for axis in ("model", "teacher", "context"):
        if axis != "teacher" or footprint.live(p.job):
            say(s for ways in _WIDER for s in settings(_along(start, axis, ways)))
    if not found:
        say(s for ways in (1, *_WIDER) for s in eased(_along(whole(least), "model", ways)))
    larger, others = list(_larger(topology)), list(_others(topology))
    for places in (larger, others):
        if say(whole(asked, place) for place in places) or say(easing(asked, places)) or say(easing(least, places)):
            break
    return found or ["nothing that was tried: a smaller model or shorter rows"]


def _mesh(e: Experiment, **sizes: int) -> Experiment:
    return dataclasses.replace(e, run=dataclasses.replace(e.run, mesh=dataclasses.replace(e.run.mesh, **sizes)))


def _whole(s: Setting) -> Setting | None:
    """On all of the slice; where the batch does not divide over it, with a longer `model` axis."""
    return next(filter(None, (_along(s, "model", ways) for ways in (1, *_WIDER))), None)


def _along(s: Setting | None, axis: str, ways: int) -> Setting | None:
    """With so many times as many devices along an axis of the mesh, and fewer along `data`."""
    if s is None:
        return None
    longer = {axis: getattr(s.experiment.run.mesh, axis) * ways} | ({"data": -1} if ways > 1 else {})
    return footprint.divided(s._replace(experiment=_mesh(s.experiment, **longer)))


def _eased(start: Setting) -> Iterator[Setting]:
    """As it is, and with more micro-batches and rematerialisation; the fewest micro-batches first."""
    e = start.experiment
    for parts in (n for n in range(e.optim.micro_batches, start.rows + 1) if start.rows % n == 0):
        for remat in dict.fromkeys((e.run.remat, "layer")):
            optim, run = dataclasses.replace(e.optim, micro_batches=parts), dataclasses.replace(e.run, remat=remat)
            yield start._replace(experiment=dataclasses.replace(e, optim=optim, run=run))


def _teachers(e: Experiment, **changes: Any) -> Experiment:
    """With other values of every teacher's block; weights are made no wider, and those of a cached one stay."""

    def changed(block: Any) -> Any:
        mine = dict(changes)
        if "dtype" in mine and (block.cache or _BYTES[mine["dtype"]] > _BYTES[block.dtype]):
            del mine["dtype"]
        return dataclasses.replace(block, **mine)

    if not e.teacher.models:
        return e
    members = {name: changed(m) for name, m in e.teacher.members.items()}
    teacher = dataclasses.replace(e.teacher, members=members) if members else changed(e.teacher)
    return dataclasses.replace(e, teacher=teacher)


def _student(e: Experiment) -> Experiment:
    return dataclasses.replace(e, student=dataclasses.replace(e.student, sharding="fsdp"))


def _narrower(e: Experiment) -> Iterator[list[Experiment]]:
    """With less of the models on a device: each change by itself, what costs least of several first."""
    dtypes = [_teachers(e, dtype=dtype) for dtype in ("bfloat16", "int8")]
    for changes in ([_teachers(e, sharding="fsdp")], dtypes, [_student(e)]):
        yield [changed for changed in changes if changed != e]


def _fully(e: Experiment) -> Experiment:
    """With as little of the models on a device as there is."""
    return _student(_teachers(e, sharding="fsdp", dtype="int8"))


def _larger(topology: Topology) -> Iterator[Topology]:
    """Slices of the same chips with more of them, the smallest first."""
    g = topology.generation
    more = [shape for shape in g.shapes if math.prod(shape) > math.prod(topology.shape)]
    yield from (Topology("", g, shape, topology.slices) for shape in sorted(more, key=math.prod))


def _others(topology: Topology) -> Iterator[Topology]:
    """Slices of other chips, the least memory first."""
    others = [g for g in topologys.GENERATIONS if g != topology.generation]
    places = [Topology("", g, shape, topology.slices) for g in others for shape in g.shapes]
    yield from sorted(places, key=lambda t: t.devices * t.chip.hbm)


def binary(number: float) -> str:
    """Bytes with the unit that leaves one to three digits before the point."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def _short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def lines(p: Plan) -> list[str]:
    """A plan to read."""
    e = p.job.experiment
    m, f, sizes = p.memory, p.flops, p.job.mesh.shape
    mesh = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name in ("data", "model"))
    named = lambda name: "the student's average" if p.job.own else e.teacher.models[name].path
    paths = [(name, model, named(name)) for name, model in p.job.teachers.items()]
    found = [f"slice     {p.topology.sentence()}", f"mesh      {mesh}", *(f"          {note}" for note in p.job.notes)]
    # What is compiled depends on them, and a launcher sets some.
    flags = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    as_launched = f"none; a launcher's: bash launch/host.sh --chip {p.topology.generation.name} -- plan ..."
    found.insert(1, f"flags     {f'{len(flags)} in LIBTPU_INIT_ARGS' if flags else as_launched}")
    for name, model, path in [*paths, ("student", p.job.student, e.student.path)]:
        found.append(f"{name:9} {path}, {_short(parameter_count(model.config) / 1e6)}M parameters")
    found.append(
        f"batch     {e.data.batch} x {e.data.length} = {p.tokens:,} tokens, micro-batches: {e.optim.micro_batches}, "
        f"remat: {e.run.remat}"
    )
    found.append(
        f"memory    {binary(m.peak)} of {binary(m.limit)} a device: parameters {binary(m.params)}, optimizer "
        f"{binary(m.optimizer)}, teacher {binary(m.teacher)}, temporary {binary(m.temp)}"
    )
    tera = lambda number: _short(number / 1e12)
    found.append(
        f"products  {tera(f.model)} TFLOP a step: teacher {tera(f.teacher)}, student {tera(f.student)}; beside them "
        f"{tera(f.recomputed)} recomputed and {tera(f.masked)} masked by attention"
    )
    if p.estimate is None:
        state = m.params + m.optimizer + m.teacher
        alone = f", parameters, optimizer and teacher alone are {binary(state)}" if state > m.limit else ""
        found.append(f"verdict   DOES NOT FIT: {binary(m.peak - m.limit)} too much{alone}")
        found.append("what would fit (estimated, not compiled):")
        return found + [f"          {line}" for line in would_fit(p)]
    for c in p.collectives:
        if c.bytes * c.count * 100 >= max(x.bytes * x.count for x in p.collectives):  # the rest is noise
            where = "in a loop" if c.in_loop else "once a step"
            beside = "beside products" if c.overlapped else "alone"
            found.append(f"exchange  {c.op} over {c.axis}: {binary(c.bytes)} x {c.count:,}, {where}, {beside}")
    t = p.estimate
    assert p.hours is not None
    assert p.chip_hours is not None
    assert p.traffic is not None
    found.append(f"traffic   {_short(p.traffic / 1e9)} GB a step between a device and its HBM")
    found.append(
        f"time      at least {_short(t.step_s)} s a step, bound by {t.bound}: compute {_short(t.compute)}, hbm "
        f"{_short(t.memory)}, ici {_short(t.links)}"
        + (f", dcn {_short(t.network)}" if p.topology.slices > 1 else "")
        + f", of both alone {_short(t.exposed)}"
    )
    if p.topology.slices > 1 and p.topology.chip.dcn is None:
        found.append(f"          the network of {p.topology.generation.name} is not published: its time is left out")
    found.append(f"speed     at most {p.tokens / t.step_s:,.0f} tokens/s, MFU {p.mfu:.1%}")
    cost = f"{_short(p.hours)} hours, {_short(p.chip_hours)} chip-hours"
    found.append(f"run       {e.run.steps:,} steps: at least {cost}")
    return [*found, "verdict   fits"]
