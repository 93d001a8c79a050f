"""Searches for faster settings on a slice: compiles candidates and ranks them by the compiler's own figures."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxkd.config.schema import Experiment
from jaxkd.core import sharding
from jaxkd.models.transformer import parameter_count
from jaxkd.planning import plan as planning
from jaxkd.planning import plan_report
from jaxkd.planning.oom import OnChipOom
from jaxkd.planning.plan import Plan
from jaxkd.planning.topology import Topology
from jaxkd.run.job import Job

SETTINGS = (
    *("run.mesh.data", "run.mesh.model", "run.mesh.context", "run.mesh.teacher", "teacher.sharding"),
    *("student.sharding", "run.remat", "optim.micro_batches", "run.eval_batch"),
)
_WIDEST = 16  # devices on the `model` and `teacher` axes together: beyond it every layer waits for all-reduces


class Tried(NamedTuple):
    """A candidate that was compiled."""

    experiment: Experiment
    plan: Plan | None  # None where a kernel ran out of on-chip memory
    seconds: float  # to compile

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better: those that fit by step time, then the others by their memory."""
        if self.plan is None:
            return True, math.inf
        return (False, self.plan.estimate.step_s) if self.plan.estimate else (True, self.plan.memory.peak)


class Suggestion(NamedTuple):
    """The candidates that were compiled, best first."""

    asked: Experiment
    tried: tuple[Tried, ...]
    seconds: float

    @property
    def plan(self) -> Plan:
        """The fastest that fits, or the one with the least memory if none does."""
        assert self.tried[0].plan is not None
        return self.tried[0].plan

    def json(self) -> dict[str, Any]:
        """The best plan as a JSON object, with `overrides` (null where none fits) and all `candidates`."""
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
        best = overrides(self.asked, self.tried[0].experiment) if self.plan.fits else None
        return {**self.plan.json(), "overrides": best, "candidates": candidates}

    def lines(self) -> list[str]:
        """The best plan, the ranked candidates, and what to add to the command."""
        added = " ".join(overrides(self.asked, self.tried[0].experiment)) or "nothing: the recipe is the best of them"
        return [
            *plan_report.lines(self.plan),
            f"compiled  {len(self.tried)} candidates in {self.seconds:.0f} s, best first:",
            *(f"          {_outcome(t)}: {_name(self.asked, t.experiment)}" for t in self.tried),
            f"add       {added}" if self.plan.fits else "add       nothing that was compiled fits: take a larger slice",
        ]


def suggest(e: Experiment, topology: Topology, budget: float, report: Callable[[str], None]) -> Suggestion:
    """Compile the recipe on the whole slice, then variants of the best candidate so far that differ in one setting.

    Ends when no variant of the best is left, or when another compilation as long as the last would exceed the budget,
    in seconds; one candidate is always compiled. `report` is called with a line per candidate.

    Raises ValueError where no mesh of the slice divides the batch, and OnChipOom where no candidate compiles for it.
    """
    began = time.monotonic()
    wider = (_with(e, "run.mesh.model", e.run.mesh.model * n) for n in (1, 2, 4, 8, 16))
    first = next(filter(None, (_fitted(x, topology) for x in wider)), None)
    if first is None:
        meshes = f"any mesh of {topology.name} with up to {_WIDEST} devices on the model axis"
        multiple = max(topology.devices // _WIDEST, 1)
        raise ValueError(f"data.batch={e.data.batch} does not divide over {meshes}: take a multiple of {multiple}")
    devices = planning.devices(topology)
    tried: list[Tried] = []
    error: OnChipOom | None = None
    candidate: Experiment | None = first
    while candidate is not None:
        start, result = time.monotonic(), None
        if tried and start - began + tried[-1].seconds > budget:
            break
        try:
            result = planning.plan(planning.build(candidate, devices), topology)
        except OnChipOom as raised:
            error = raised
        tried.append(Tried(candidate, result, time.monotonic() - start))
        why = "" if result else f" ({error})"
        report(f"{_name(e, candidate)}: {_outcome(tried[-1])}{why}, {tried[-1].seconds:.0f} s to compile")
        best = min(tried, key=lambda t: t.rank)
        seen = [overrides(e, t.experiment) for t in tried]
        candidate = next((v for v in _variants(best, topology) if overrides(e, v) not in seen), None)
    if best.plan is None:
        assert error is not None
        raise error
    return Suggestion(e, tuple(sorted(tried, key=lambda t: t.rank)), time.monotonic() - began)


def _variants(best: Tried, topology: Topology) -> Iterator[Experiment]:
    """Experiments that differ in one setting: where the best fits those that may be faster, else with less memory."""
    e, fits = best.experiment, best.plan is not None and best.plan.fits
    sizes = _sizes(e, topology)
    rows, parts = e.data.batch // math.prod(sizes[name] for name in sharding.ROWS), e.optim.micro_batches
    counts = [n for n in range(1, rows + 1) if rows % n == 0]
    counts = [n for n in reversed(counts) if n < parts] if fits else [n for n in counts if n > parts]
    changes: list[tuple[str, Any]] = [("optim.micro_batches", n) for n in counts[:1]]
    changes.append(("run.remat", "none" if fits else "layer"))
    if e.teacher.models and not e.teacher.members:
        changes.append(("teacher.sharding", "replicated" if fits else "fsdp"))
    changes += [] if fits else [("student.sharding", "fsdp")]
    axes = ["model", *(["teacher"] if best.plan and _large_teacher(best.plan.job) else [])]
    if 2 * sizes["model"] * sizes["teacher"] <= _WIDEST:
        changes += [(f"run.mesh.{axis}", 2 * sizes[axis]) for axis in axes]
    changes += [(f"run.mesh.{a}", sizes[a] // 2) for a in (*axes, "context") if fits and sizes[a] % 2 == 0]
    changes += [] if fits else [("run.mesh.context", 2 * sizes["context"])]
    yield from filter(None, (_fitted(_with(e, key, value), topology) for key, value in changes))


def _sizes(e: Experiment, topology: Topology) -> dict[str, int]:
    """Devices along each mesh axis where `data` takes what the others leave of the slice."""
    mesh = e.run.mesh
    replica = topology.slices if mesh.replica == -1 else mesh.replica
    data = topology.devices // (replica * mesh.context * mesh.teacher * mesh.model)
    return dict(zip(sharding.MESH_AXES, (replica, data, mesh.context, mesh.teacher, mesh.model), strict=True))


def _fitted(e: Experiment, topology: Topology) -> Experiment | None:
    """On the whole slice, with micro-batches and evaluation rows that divide over it; None where the batch does not."""
    sizes = _sizes(e, topology)
    over = math.prod(sizes[name] for name in sharding.ROWS)
    whole = math.prod(sizes.values()) == topology.devices and sizes["replica"] % topology.slices == 0
    if not whole or e.data.batch % over or e.data.length % sizes["context"]:
        return None
    rows = e.data.batch // over
    e = e if e.run.mesh.data == sizes["data"] else _with(e, "run.mesh.data", -1)
    e = _with(e, "run.eval_batch", -(-e.run.eval_batch // over) * over)
    return _with(e, "optim.micro_batches", max(n for n in range(1, e.optim.micro_batches + 1) if rows % n == 0))


def _large_teacher(job: Job) -> bool:
    """Whether a teacher that runs in the step is larger than the student, so that an axis of its own may pay."""
    blocks, models = job.experiment.teacher.models, job.models
    online = [models.teachers[name].config for name, block in blocks.items() if not block.cache]
    return any(parameter_count(config) > parameter_count(models.student.config) for config in online)


def _with(block: Any, key: str, value: Any) -> Any:
    """A block of the config with another value of a dotted key."""
    name, _, inner = key.partition(".")
    return dataclasses.replace(block, **{name: _with(getattr(block, name), inner, value) if inner else value})


def overrides(asked: Experiment, e: Experiment) -> list[str]:
    """Command-line arguments that turn one experiment into the other, of the settings that the search changes."""
    values = [(key, *(functools.reduce(getattr, key.split("."), x) for x in (asked, e))) for key in SETTINGS]
    return [f"--config.{key}={value}" for key, before, value in values if value != before]


def _name(asked: Experiment, e: Experiment) -> str:
    return " ".join(overrides(asked, e)) or "the recipe as it is"


def _outcome(t: Tried) -> str:
    if t.plan is None:
        return "out of on-chip memory"
    peak = plan_report.binary(t.plan.memory.peak)
    return f"{t.plan.estimate.step_s:.3g} s a step, {peak}" if t.plan.estimate else f"does not fit, {peak}"
