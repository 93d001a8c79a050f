"""What a run takes on TPUs that are not here: its real step, compiled for them, and what follows from the program.

Memory is the compiler's own count. Exchanges and memory traffic are read from the program, every loop multiplied by its
trips. Time is a roofline: products, memory and links each at their peak and all at once, but for the exchanges beside
which the program computes nothing, so no run is faster.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkd import divergences, flops, job, program, sharding, teaching, terms
from jaxkd.chips import Topology
from jaxkd.experiment import SELF, Experiment, from_mapping
from jaxkd.hlo import Collective, Program
from jaxkd.job import Job
from jaxkd.models import families, formats, heads, published, weights
from jaxkd.models.transformer import Config, parameter_count

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_WAYS = {"all-reduce": 2.0, "all-to-all": 0.25}  # of what a gather of as many bytes takes, on a ring used both ways


class Memory(NamedTuple):
    """Bytes on one device."""

    limit: int
    peak: int
    params: int  # and the running average of a student that teaches itself
    optimizer: int
    teacher: int
    temp: int


class Estimate(NamedTuple):
    """Seconds of one step, at best."""

    compute: float
    memory: float
    links: float
    network: float = 0.0  # between slices
    exposed: float = 0.0  # of links and network, beside which the program computes nothing

    @property
    def step_s(self) -> float:
        """The slowest, as if the others were hidden behind it; products wait for what is exchanged alone."""
        return max(self._together())

    @property
    def bound(self) -> str:
        """Which of them that is."""
        found = ("compute", "hbm", "ici", "dcn")[int(np.argmax(self._together()))]
        return "ici" if found == "compute" and self.exposed > self.compute else found

    def _together(self) -> tuple[float, ...]:
        return (self.compute + self.exposed, self.memory, self.links, self.network)


class Plan(NamedTuple):
    """A step on a slice."""

    topology: Topology
    job: Job
    memory: Memory
    flops: flops.Step
    collectives: tuple[Collective, ...]
    estimate: Estimate | None  # None where the step does not fit

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for everything."""
        return self.estimate is not None

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.job.experiment.data.batch * self.job.experiment.data.length

    @property
    def mfu(self) -> float | None:
        """Share of all devices' peak that the mathematics of teacher and student takes."""
        if self.estimate is None:
            return None
        peak = self.topology.chip.flops * self.job.mesh.size
        return self.flops.model / self.estimate.step_s / peak

    def json(self) -> dict[str, Any]:
        """As one object of plain values: bytes are of a device, FLOPs of a step on all of them."""
        time = self.estimate
        return {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "devices": self.job.mesh.size,
            "fits": self.fits,
            "hbm_bytes": self.memory._asdict(),
            "flops": {"model": self.flops.model, "teacher": self.flops.teacher, "student": self.flops.student},
            "collectives": [dataclasses.asdict(c) for c in self.collectives],
            "estimate": {
                "step_s": time and time.step_s,
                "tokens_per_s": time and self.tokens / time.step_s,
                "mfu": self.mfu,
                "bound": time and time.bound,
                "exposed_s": time and time.exposed,
            },
        }


# -------------------------------------------------------------------------------- what is compiled


def devices(topology: Topology) -> list:
    """The devices of slices that are not here, as libtpu describes them.

    Raises:
        ValueError: without libtpu, or where it does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning compiles with libtpu, which is not installed: pip install 'jax[tpu]' (or bash launch/setup.sh "
            "tpu); it needs no TPU"
        )
    # There is no TPU to ask about, and none that two processes could not share; the type only silences a warning.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in (settings | {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}).items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental.topologies import get_topology_desc

    try:
        found = get_topology_desc(topology_name=topology.name, platform="tpu", **topology.options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"libtpu knows no slice {topology.name}: {str(error).splitlines()[0]}") from None
    return list(found.devices)


def shapes(e: Experiment) -> dict[str, Config]:
    """Shapes of the models whose weights are not on this machine: from config.json, the recipe's `shape`, or by name.

    Raises:
        ValueError: for a model of which nothing is known.
    """
    blocks: dict[str, Any] = {f"teacher.members.{name}": m for name, m in e.teacher.members.items()}
    blocks |= {"teacher": e.teacher, "student": e.student}
    found = {}
    for where, block in blocks.items():
        if block.path in ("", "random", "teacher", SELF):
            continue
        local = Path(block.path).expanduser()
        known = weights.KNOWN.get(block.path)
        if (local / "config.json").is_file() and not list(local.glob("*.safetensors")):
            found[block.path] = families.from_hf(formats.read_json(local / "config.json"), str(local / "config.json"))
        elif local.exists() or (known and importlib.util.find_spec(known.package)):
            continue
        elif block.shape:
            found[block.path] = from_mapping(Config, block.shape, f"{where}.shape")
        elif (config := published.shape(block.path)) is not None:
            found[block.path] = config
        else:
            raise ValueError(
                f"{where}.path '{block.path}' is not on this machine and its shape is not known here: put its "
                f"config.json into that directory, set --config.{where}.shape.KEY=VALUE for each of vocab, embed, "
                f"layers, heads, kv_heads, head_dim and mlp, or take one of {', '.join(published.MODELS)}"
            )
    return found


def build(e: Experiment, place: Sequence[Any]) -> Job:
    """The job on a topology's devices; what is not on this machine is known by its shape."""
    if e.data.tokenizer not in ("teacher", "bytes") and not Path(e.data.tokenizer).expanduser().exists():
        e = dataclasses.replace(e, data=dataclasses.replace(e.data, tokenizer="teacher"))
    return job.build(e, list(place), shapes(e))


def plan(built: Job, topology: Topology) -> Plan:
    """Compile a job's step, and say what it takes. What it begins with must fit first: else nothing is compiled.

    Args:
        built: on the slice's devices.
        topology: the slice.
    """
    teacher = teaching.teach(built, weights_of(built), {}).train
    batch = teaching.abstract_batch(built)
    needed = flops_of(built)
    limit, state = topology.chip.hbm, built.state
    parts = {
        "params": held((state.params, state.ema)),
        "optimizer": held(state.opt_state),
        "teacher": held(teacher.state),
    }
    arguments = sum(parts.values()) + held((state.step, batch))
    refused = lambda peak: Plan(topology, built, Memory(limit, peak, **parts, temp=peak - arguments), needed, (), None)
    if arguments > limit:
        return refused(arguments)  # nothing that is compiled could fit beside it
    with jax.set_mesh(built.mesh):
        lowered = program.jitted_step(built, teacher).lower(state, teacher.state, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return refused(_wanted(str(error), arguments))
    memory, text = compiled.memory_analysis(), Program(compiled.as_text())
    written = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + written + memory.generated_code_size_in_bytes
    collectives = tuple(text.collectives(dict(built.mesh.shape), [d.id for d in built.mesh.devices.flat]))
    each = [(c.count, *seconds(c, built.mesh, topology)) for c in collectives]
    time = Estimate(
        needed.executed / built.mesh.size / topology.chip.flops,
        text.traffic() / topology.chip.bandwidth,
        sum(count * links for count, links, _ in each),
        sum(count * network for count, _, network in each),
        sum(n * (s + network) for c, (n, s, network) in zip(collectives, each, strict=True) if not c.overlapped),
    )
    held_now = Memory(limit, peak, **parts, temp=memory.temp_size_in_bytes)
    return Plan(topology, built, held_now, needed, collectives, time)


def weights_of(built: Job) -> dict[str, Any]:
    """What each teacher's weights on the devices are, abstractly: of a cached one its head."""
    found = {}
    for name, model in {} if built.own else built.teachers.items():
        place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
        whole = jax.tree.map(place, model.shapes, model.shardings)
        cached = bool(built.experiment.teacher.models[name].cache)
        found[name] = {n: whole[n] for n in heads.names(model.config)} if cached else whole
    return found


def held(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(shard, jax.tree.leaves(tree)))


def _wanted(message: str, arguments: int) -> int:
    """What the compiler says that a program would take, from its refusal."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds|Used ([\d.]+)([KMGT]?) of", message)
    if found is None:
        raise ValueError(f"the compiler ran out of memory and did not say how much it wants: {message.splitlines()[0]}")
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    total = int(float(number) * _UNITS[unit])
    return total + arguments if "HLO temporaries" in message else total


def flops_of(built: Job) -> flops.Step:
    """Of a job's step, counted from shapes: what is cached is not run, what no term needs is not multiplied."""
    e = built.experiment
    kept = [t for t in e.objective.values() if t.divergence and t.weight != 0]
    vocab = [terms.call(t.divergence, divergences, "objective") for t in kept]
    by_teacher = any(d.uses_teacher for d in vocab)
    sides = []
    if built.own and built.objective.uses_teacher:
        sides.append(flops.Side(built.teacher.config, head=by_teacher))
    for name, model in e.teacher.models.items():
        config = built.teachers[name].config
        if not model.cache and (built.objective.uses_teacher or e.teacher.signal == "token"):
            sides.append(flops.Side(config, head=by_teacher or e.teacher.signal == "token"))
        elif model.cache and (e.teacher.members or e.teacher.signal == "hidden"):
            sides.append(flops.Side(config, body=False, head=by_teacher))
    return flops.step(
        sides,
        flops.Side(built.student.config, head=bool(vocab)),
        e.data.batch * e.data.length,
        e.data.length,
        remat=e.run.remat != "none",
        moves=not e.student.frozen,
    )


def seconds(c: Collective, mesh: Any, topology: Topology) -> tuple[float, float]:
    """The least time of one exchange on the links between a slice's chips, and on the network between slices.

    A gather or a scatter over n devices moves (n - 1) / n of the array through every one of them, a reduction that
    keeps everything twice that; a permutation is one hop, and those in opposite directions go at once. On the links its
    bytes go over all that its group of devices has between its members. Of a group in several slices, each device of
    one slice has a share of the array to exchange with its like in the others. Two devices of a chip need what comes
    from other chips once, over the links of both.
    """
    axes = c.axis.split("+")
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    group = mesh.devices[index].ravel()
    places = [getattr(d, "slice_index", 0) for d in group]
    slices = len(set(places))
    inside = [d for d, place in zip(group, places, strict=True) if place == places[0]]
    coords = np.asarray([d.coords for d in inside])
    links = 0
    for dimension, (extent, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
        spanned = len(set(coords[:, dimension]))
        links += 0 if spanned == 1 else 2 if wraps and spanned == extent else 1
    chips = len(set(map(tuple, coords)))
    # Devices of one chip exchange through its memory.
    bandwidth = links * topology.chip.link * len(inside) / chips or topology.chip.bandwidth

    def part(count: int) -> float:
        hop = c.op == "collective-permute" and count > 1
        return 1.0 if hop else _WAYS.get(c.op, 1.0) * (count - 1) / count

    between = part(slices) * c.bytes / len(inside) / topology.chip.dcn if topology.chip.dcn else 0.0
    return part(chips if links else len(inside)) * c.bytes / bandwidth, between


# ---------------------------------------------------------------------------------- what is said


def would_fit(p: Plan) -> list[str]:
    """For a step that does not fit: the changes that the numbers speak for, a line each."""
    e, m, chip = p.job.experiment, p.memory, p.topology.chip
    fixed, lines = m.peak - m.temp, []
    rows = e.data.batch // e.optim.micro_batches // math.prod(p.job.mesh.shape[name] for name in sharding.ROWS)
    if fixed < m.limit:
        if e.run.remat == "none":
            lines.append("--config.run.remat=layer keeps each layer's input only")
        factors = [n for n in range(2, rows + 1) if rows % n == 0]
        enough = next((n for n in factors if fixed + m.temp / n <= m.limit), factors[-1] if factors else 0)
        if enough:
            parts = enough * e.optim.micro_batches
            lines.append(f"--config.optim.micro_batches={parts} holds {1 / enough:.0%} of the activations at a time")
    # Replicas hold the same, so that more slices are no more room.
    spread = p.job.mesh.size / p.topology.slices * m.peak / m.limit
    g = p.topology.generation
    larger = [s for s in g.shapes if math.prod(s) * g.devices_per_chip >= spread]
    if larger:
        lines.append(f"--topology {g.name}:{'x'.join(map(str, larger[0]))}, as far as everything is spread over it")
    lines.append(f"any slice with {spread * chip.hbm / 2**30:,.0f} GiB in all, as far as everything is spread over it")
    return lines


def _binary(number: float) -> str:
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
        f"memory    {_binary(m.peak)} of {_binary(m.limit)} a device: parameters {_binary(m.params)}, optimizer "
        f"{_binary(m.optimizer)}, teacher {_binary(m.teacher)}, temporary {_binary(m.temp)}"
    )
    tera = lambda number: _short(number / 1e12)
    found.append(
        f"products  {tera(f.model)} TFLOP a step: teacher {tera(f.teacher)}, student {tera(f.student)}; beside them "
        f"{tera(f.again)} made again and {tera(f.masked)} masked by attention"
    )
    if p.estimate is None:
        found.append(f"verdict   DOES NOT FIT: {_binary(m.peak - m.limit)} too much. What would fit:")
        return found + [f"          {line}" for line in would_fit(p)]
    for c in p.collectives:
        if c.bytes * c.count * 100 >= max(x.bytes * x.count for x in p.collectives):  # the rest is noise
            where = "in a loop" if c.in_loop else "once a step"
            beside = "beside products" if c.overlapped else "alone"
            found.append(f"exchange  {c.op} over {c.axis}: {_binary(c.bytes)} x {c.count:,}, {where}, {beside}")
    t = p.estimate
    found.append(
        f"time      at least {_short(t.step_s)} s a step, bound by {t.bound}: compute {_short(t.compute)}, hbm "
        f"{_short(t.memory)}, ici {_short(t.links)}"
        + (f", dcn {_short(t.network)}" if p.topology.slices > 1 else "")
        + f", of both alone {_short(t.exposed)}"
    )
    if p.topology.slices > 1 and p.topology.chip.dcn is None:
        found.append(f"          the network of {p.topology.generation.name} is not published: its time is left out")
    hours = t.step_s * e.run.steps / 3600
    found.append(f"speed     at most {p.tokens / t.step_s:,.0f} tokens/s, MFU {p.mfu:.1%}")
    cost = f"{_short(hours)} hours, {_short(hours * p.topology.chips)} chip-hours"
    found.append(f"run       {e.run.steps:,} steps: at least {cost}")
    return [*found, "verdict   fits"]
