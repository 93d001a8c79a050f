"""Plans a run for TPUs that are not attached: compiles its real step and reads memory and time from the program.

Memory is the compiler's own count. Collectives and HBM traffic come from the HLO, each instruction as often as it runs.
Step time is a roofline, a lower bound: compute, HBM and links at peak rate and overlapped but for exposed collectives.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkd.config.schema import SELF, Experiment, from_mapping
from jaxkd.models import families, flops, heads, weights
from jaxkd.models.transformer import Config
from jaxkd.planning import oom, published
from jaxkd.planning.hlo import Collective, Program
from jaxkd.planning.topology import Topology
from jaxkd.run import job, program, rollouts
from jaxkd.run.job import Job
from jaxkd.run.open_models import Models
from jaxkd.run.teacher import abstract_batch, build_teacher
from jaxkd.runtime import files
from jaxkd.train.state import assemble

_COST = {"all-reduce": 2.0, "all-to-all": 0.25}  # relative to an all-gather of as many bytes, on a bidirectional ring


class Memory(NamedTuple):
    """Bytes on one device."""

    limit: int
    peak: int
    params: int  # with the EMA of a self-teaching student
    optimizer: int
    teacher: int
    temp: int


class Estimate(NamedTuple):
    """Seconds of one step at peak rates, a lower bound."""

    compute: float
    memory: float
    links: float
    network: float = 0.0  # between slices
    exposed: float = 0.0  # the part of links and network that no compute overlaps

    def _parts(self) -> dict[str, float]:
        return {"compute": self.compute + self.exposed, "hbm": self.memory, "ici": self.links, "dcn": self.network}

    @property
    def step_s(self) -> float:
        return max(self._parts().values())

    @property
    def bound(self) -> str:
        """Which part takes longest: compute, hbm, ici or dcn."""
        parts = self._parts()
        name = max(parts, key=lambda part: parts[part])
        return "ici" if name == "compute" and self.exposed > self.compute else name


class Plan(NamedTuple):
    """A training step on a slice: its memory, FLOPs, collectives and time."""

    topology: Topology
    job: Job
    memory: Memory
    flops: flops.Step
    collectives: tuple[Collective, ...]
    estimate: Estimate | None  # None where the step does not fit

    @property
    def fits(self) -> bool:
        return self.estimate is not None

    @property
    def tokens(self) -> int:
        return self.job.experiment.data.batch * self.job.experiment.data.length

    def rates(self) -> dict[str, Any]:
        """What follows from the time of a step, at best; values are None where the step does not fit.

        `mfu` is model FLOPs (without rematerialisation and masked attention) over the peak. `hours` are of all training
        steps, without evaluations; in `chip_hours` a chip of two devices counts once. `hbm_gb` is per device and step.
        """
        names = ("step_s", "tokens_per_s", "mfu", "bound", "exposed_s", "hours", "chip_hours", "hbm_gb")
        t, chip = self.estimate, self.topology.chip
        if t is None:
            return dict.fromkeys(names)
        mfu = self.flops.model / t.step_s / (chip.flops * self.job.mesh.size)
        hours = t.step_s * self.job.experiment.run.steps / 3600
        values = (t.step_s, self.tokens / t.step_s, mfu, t.bound, t.exposed, hours, hours * self.topology.chips)
        return dict(zip(names, (*values, t.memory * chip.bandwidth / 1e9), strict=True))

    def json(self) -> dict[str, Any]:
        """As a JSON object: bytes are per device, FLOPs of a step on all devices."""
        return {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "devices": self.job.mesh.size,
            "fits": self.fits,
            "hbm_bytes": self.memory._asdict(),
            "flops": {"model": self.flops.model, "teacher": self.flops.teacher, "student": self.flops.student},
            "collectives": [dataclasses.asdict(c) for c in self.collectives],
            "estimate": self.rates(),
        }


def devices(topology: Topology) -> list:
    """The devices of slices that are not here, as libtpu describes them."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("planning needs libtpu, and no TPU: pip install 'jax[tpu]' (or bash launch/setup.sh tpu)")
    # No TPU is queried, and none has to be locked against other processes; the type only silences a warning.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in (settings | {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}).items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental.topologies import get_topology_desc

    try:
        return list(get_topology_desc(topology_name=topology.name, platform="tpu", **topology.options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"libtpu knows no slice {topology.name}: {str(error).splitlines()[0]}") from None


def shapes(e: Experiment) -> dict[str, Config]:
    """Shapes, by path, of models whose weights are not on this machine: from config.json, the recipe, or by name."""
    blocks: dict[str, Any] = {f"teacher.members.{name}": m for name, m in e.teacher.members.items()}
    blocks |= {"teacher": e.teacher, "student": e.student}
    by_path = {}
    for key, block in blocks.items():
        if block.path in ("", "random", "teacher", SELF):
            continue
        local = Path(block.path).expanduser()
        bundled = weights.KNOWN.get(block.path)
        if (local / "config.json").is_file() and not list(local.glob("*.safetensors")):
            values = files.read_json(local / "config.json")
            by_path[block.path] = families.from_hf(values, str(local / "config.json"), length=e.data.length)
        elif local.exists() or (bundled and importlib.util.find_spec(bundled.package)):
            continue
        elif block.shape:
            by_path[block.path] = from_mapping(Config, block.shape, f"{key}.shape")
        elif (config := published.shape(block.path)) is not None:
            by_path[block.path] = config
        else:
            raise ValueError(
                f"{key}.path '{block.path}' is not on this machine and its shape is not known here: put its "
                f"config.json into that directory, set --config.{key}.shape.KEY=VALUE for each of vocab, embed, "
                f"layers, heads, kv_heads, head_dim and mlp, or take one of {', '.join(published.MODELS)}"
            )
    return by_path


def build(e: Experiment, devices: Sequence[Any]) -> Job:
    """The job on a topology's devices; models that are not on this machine are known by their shapes."""
    if e.data.tokenizer not in ("teacher", "bytes") and not Path(e.data.tokenizer).expanduser().exists():
        e = dataclasses.replace(e, data=dataclasses.replace(e.data, tokenizer="teacher"))
    return job.build(e, list(devices), shapes(e))


def plan(built: Job, topology: Topology) -> Plan:
    """Compile the step of a job on a slice's devices. If its arguments alone exceed their memory, nothing is compiled.

    Raises OnChipOom where a kernel needs more on-chip memory than there is, whatever the size of the job.
    """
    e, models, uses_teacher = built.experiment, built.models, built.objective.uses_teacher
    teacher = build_teacher(e, models, teacher_weights(models), {}, uses_teacher).train
    batch = abstract_batch(e, models, built.mesh)
    arrays = rollouts.params(e, assemble(built.state.params["student"], built.frozen), teacher_weights(models))
    texts, writes = built.state.texts, rollouts.jitted(e, models, built.mesh)
    rows = (batch,) * e.run.rollout_every
    if writes is not None:
        with jax.set_mesh(built.mesh):
            batch = rollouts.abstract_written(writes, arrays, batch, texts, e)
    step_flops = program.flops_of(e, models, uses_teacher)
    limit, state = topology.chip.hbm, built.state
    parts = {
        "params": device_bytes((state.params, state.ema, built.frozen)),
        "optimizer": device_bytes(state.opt_state),
        "teacher": device_bytes(teacher.state),
    }
    arguments = sum(parts.values()) + device_bytes((state.step, batch))
    too_large = lambda peak: Plan(
        topology, built, Memory(limit, peak, **parts, temp=peak - arguments), step_flops, (), None
    )
    if arguments > limit:
        return too_large(arguments)
    with jax.set_mesh(built.mesh), progress(f"compiling the step for {topology.name}"):
        lowered = program.jitted_step(built, teacher).lower(state, built.frozen, teacher.state, batch)
        compiled = compiled_or_short(lowered)
        if isinstance(compiled, oom.Oom):
            return too_large((compiled.used or 0) + arguments * compiled.temporaries)
        peak = peak_bytes(compiled)
        if writes is not None:
            # Before the step and beside the state; the step itself may not take the teacher as an argument.
            written = compiled_or_short(writes.write.lower(arrays, rows, state.step, texts))
            if isinstance(written, oom.Oom):
                return too_large((written.used or 0) + arguments * written.temporaries)
            by_student = (r := rollouts.block(e)) is not None and (r.student or r.adaptive)
            taken = device_bytes(built.state.params["student"]) if by_student else 0
            taken += parts["teacher"] if "teacher" in arrays else 0
            beside = parts["params"] + parts["optimizer"] + parts["teacher"] - taken
            peak = max(peak + (0 if uses_teacher else parts["teacher"]), peak_bytes(written) + beside)
    estimate, collectives = estimate_of(compiled, step_flops.executed, built.mesh, topology)
    memory = Memory(limit, peak, **parts, temp=compiled.memory_analysis().temp_size_in_bytes)
    return Plan(topology, built, memory, step_flops, collectives, estimate)


def estimate_of(compiled: Any, count: float, mesh: Any, topology: Topology) -> tuple[Estimate, tuple[Collective, ...]]:
    """Times and collectives of a compiled program that executes `count` FLOPs on all devices of the mesh."""
    hlo = Program(compiled.as_text())
    collectives = tuple(hlo.collectives(dict(mesh.shape), [d.id for d in mesh.devices.flat]))
    times = [(c, *collective_seconds(c, mesh, topology)) for c in collectives]
    estimate = Estimate(
        count / mesh.size / topology.chip.flops,
        hlo.traffic() / topology.chip.bandwidth,
        sum(c.count * links for c, links, _ in times),
        sum(c.count * network for c, _, network in times),
        sum(c.count * (links + network) for c, links, network in times if not c.overlapped),
    )
    return estimate, collectives


def compiled_or_short(lowered: Any) -> Any:
    """The compiled program, or the shortage of HBM that the compiler reports; raises OnChipOom."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        shortage = oom.read(str(error))
        if shortage.space != "hbm" or shortage.used is None:
            raise oom.OnChipOom(oom.sentence(shortage, str(error))) from None
        return shortage


def peak_bytes(compiled: Any) -> int:
    """Bytes of a device that a program takes at once: arguments, temporaries, what is written anew, and its code."""
    stats = compiled.memory_analysis()
    written = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + written + stats.generated_code_size_in_bytes


@contextlib.contextmanager
def progress(what: str, every: float = 15.0) -> Iterator[None]:
    """Print to stderr that `what` has begun, and every so many seconds how long it has taken."""
    done, began = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(every):
            print(f"{what}: {time.monotonic() - began:.0f} s so far", file=sys.stderr, flush=True)

    print(f"{what} ...", file=sys.stderr, flush=True)
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def teacher_weights(models: Models) -> dict[str, Any]:
    """Each teacher's weights on the devices as abstract arrays; of a cached teacher only its head."""
    head = lambda model: {name: model.abstract[name] for name in heads.names(model.config)}
    teachers = {} if models.is_self else models.teachers
    return {name: head(model) if model.cache else model.abstract for name, model in teachers.items()}


def device_bytes(tree: Any) -> int:
    """Bytes that a tree of abstract arrays takes on one device."""
    shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(shard, jax.tree.leaves(tree)))


def collective_seconds(c: Collective, mesh: Any, topology: Topology) -> tuple[float, float]:
    """Least seconds of one execution on the links within a slice, and on the network between slices.

        all-gather, reduce-scatter: bytes (n - 1) / n / bandwidth;  all-reduce: twice that;  permutation: one hop

    The bandwidth is that of all links between the n members of a group. Over several slices, each device of a slice
    exchanges its share of the array with its counterparts. Devices of one chip receive data from other chips once, over
    the links of both.
    """
    axes = c.axis.split("+")
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    group = mesh.devices[index].ravel()
    slice_of = [getattr(d, "slice_index", 0) for d in group]
    slices = len(set(slice_of))
    inside = [d for d, s in zip(group, slice_of, strict=True) if s == slice_of[0]]
    coords = np.asarray([d.coords for d in inside])
    links = 0
    for dimension, (extent, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
        spanned = len(set(coords[:, dimension]))
        links += 0 if spanned == 1 else 2 if wraps and spanned == extent else 1
    chips = len(set(map(tuple, coords)))
    # Devices of one chip communicate through its memory.
    bandwidth = links * topology.chip.link * len(inside) / chips or topology.chip.bandwidth

    def part(count: int) -> float:
        hop = c.op == "collective-permute" and count > 1
        return 1.0 if hop else _COST.get(c.op, 1.0) * (count - 1) / count

    network = part(slices) * c.bytes / len(inside) / topology.chip.dcn if topology.chip.dcn else 0.0
    return part(chips if links else len(inside)) * c.bytes / bandwidth, network
