"""What a run takes on TPUs that are not here: its real step, compiled for them, and what follows from the program.

Memory is the compiler's own count. Exchanges and memory traffic are read from the program, every loop multiplied by its
trips. Time is a roofline: products, memory and links each at their peak and all at once, but for the exchanges beside
which the program computes nothing, so no run is faster.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkd.config.schema import SELF, Experiment, from_mapping
from jaxkd.models import families, flops, formats, heads, weights
from jaxkd.models.transformer import Config
from jaxkd.planning import oom, published
from jaxkd.planning.hlo import Collective, Program
from jaxkd.planning.topology import Topology
from jaxkd.run import job, program
from jaxkd.run import teacher as teaching
from jaxkd.run.job import Job

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

    @property
    def hours(self) -> float | None:
        """Of the whole run, at best, evaluations and checkpoints left out."""
        return None if self.estimate is None else self.estimate.step_s * self.job.experiment.run.steps / 3600

    @property
    def chip_hours(self) -> float | None:
        """Of all chips of all slices, however many devices each of them is."""
        return None if self.hours is None else self.hours * self.topology.chips

    @property
    def traffic(self) -> float | None:
        """Bytes between a device and its HBM in a step."""
        return None if self.estimate is None else self.estimate.memory * self.topology.chip.bandwidth

    def json(self) -> dict[str, Any]:
        """As one object of plain values: bytes and `hbm_gb` are of a device, FLOPs of a step on all of them."""
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
                "hours": self.hours,
                "chip_hours": self.chip_hours,
                "hbm_gb": None if self.traffic is None else self.traffic / 1e9,
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
            config_file = local / "config.json"
            read = formats.read_json(config_file)
            found[block.path] = families.from_hf(read, str(config_file), length=e.data.length)
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

    Raises:
        Refused: for want of another memory than HBM, which is no matter of the job's size.
    """
    teacher = teaching.build_teacher(built, weights_of(built), {}).train
    batch = teaching.abstract_batch(built)
    needed = program.flops_of(built)
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
            said = oom.read(str(error))
            if said.space != "hbm" or said.used is None:
                raise oom.Refused(oom.sentence(said, str(error))) from None
            return refused(said.used + arguments * said.temporaries)
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
