"""Memory of settings that nothing has compiled: what lies on a device from shapes, what a step makes by arithmetic."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from jaxkd.config.schema import Experiment
from jaxkd.config.validate import DTYPES
from jaxkd.core import sharding
from jaxkd.core.types import PyTree
from jaxkd.models import heads, quantized, transformer
from jaxkd.models.transformer import Config
from jaxkd.planning.plan import Memory, Plan
from jaxkd.planning.topology import Topology
from jaxkd.run.job import Job


class Setting(NamedTuple):
    """An experiment on a slice, all of it in use."""

    experiment: Experiment
    topology: Topology

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each mesh axis; `data` is what the others leave."""
        mesh, topology = self.experiment.run.mesh, self.topology
        replica = topology.slices if mesh.replica == -1 else mesh.replica
        data = max(topology.devices // (replica * mesh.context * mesh.teacher * mesh.model), 1)
        return dict(zip(sharding.MESH_AXES, (replica, data, mesh.context, mesh.teacher, mesh.model), strict=True))

    @property
    def rows(self) -> int:
        """Rows of a batch on each device, of all micro-batches."""
        sizes = self.sizes
        return self.experiment.data.batch // math.prod(sizes[name] for name in sharding.ROWS)


def divided(s: Setting) -> Setting | None:
    """The setting with micro-batches and evaluation rows that its mesh divides; None where it divides no batch."""
    e, sizes = s.experiment, s.sizes
    over = math.prod(sizes[name] for name in sharding.ROWS)
    whole = math.prod(sizes.values()) == s.topology.devices and sizes["replica"] % s.topology.slices == 0
    if not whole or e.data.batch % over or e.data.length % sizes["context"]:
        return None
    parts = max(n for n in range(1, e.optim.micro_batches + 1) if s.rows % n == 0)
    run = dataclasses.replace(e.run, eval_batch=-(-e.run.eval_batch // over) * over)
    return s._replace(
        experiment=dataclasses.replace(e, run=run, optim=dataclasses.replace(e.optim, micro_batches=parts))
    )


def lying(job: Job, now: Memory, s: Setting) -> Memory:
    """What lies on a device before a step: state and teacher, spread as another setting spreads them.

    Args:
        job: any of the same models.
        now: what lies on a device of its mesh, and beside that what does not change with the setting, in `peak`.
        s: the setting.
    """
    e, old, new = s.experiment, job.mesh.shape, s.sizes
    params = now.params * student_bytes(job, e, new) // student_bytes(job, job.experiment, old)
    moments = [_bytes(job.student.config, sizes, "moments") for sizes in (new, old)]
    optimizer = now.optimizer * moments[0] // moments[1]
    teacher = now.teacher * _taught(job, e, new) // max(_taught(job, job.experiment, old), 1)
    rest = now.peak - now.params - now.optimizer - now.teacher - now.temp
    return Memory(s.topology.chip.hbm, rest + params + optimizer + teacher, params, optimizer, teacher, temp=0)


def temporary(job: Job, e: Experiment, sizes: Mapping[str, int]) -> float:
    """What a step makes on a device, by arithmetic.

        inputs or insides of the student's layers + the largest layer + heads as they are gathered + gradients

    Args:
        job: of the same models.
        e: batch, micro-batches and rematerialisation.
        sizes: devices along each mesh axis.
    """
    student, parts, model = job.student.config, e.optim.micro_batches, sizes["model"]
    tokens = tokens_of(e, sizes)

    def layer(c: Config, *axes: str) -> float:
        ways = lambda size: math.prod(sizes[name] for name in sharding.over((*axes, "model"), size, sizes))
        inside = 3 * c.mlp / ways(c.mlp) + 6 * c.heads * e.data.length / ways(c.heads)
        return math.prod(sizes[name] for name in axes) * tokens * (12 * c.embed + 2 * inside)

    teachers = [c for _, c in live(job)]
    saved = student.layers * (2 * tokens * student.embed if e.run.remat == "layer" else layer(student))
    # To a teacher its axis splits layers and not rows.
    largest = max([layer(student), *[layer(c, "teacher") for c in teachers]])
    head = student.embed * student.padded_vocab * 10 / model
    head += sum(2 * c.embed * c.padded_vocab / model for c in teachers)
    return saved + largest + head + student_bytes(job, e, sizes) * (2 if parts > 1 else 1)


def estimated(p: Plan, s: Setting) -> Memory:
    """A plan's memory with another setting: what was compiled, scaled as arithmetic says; that alone where nothing was.

    Args:
        p: of the same models.
        s: the setting.
    """
    asked, found = p.job.experiment, lying(p.job, p.memory, s)
    made = temporary(p.job, s.experiment, s.sizes)
    if p.memory.temp > 0:
        made *= p.memory.temp / temporary(p.job, asked, p.job.mesh.shape)
    return found._replace(peak=found.peak + int(made), temp=int(made))


def tokens_of(e: Experiment, sizes: Mapping[str, int]) -> int:
    """Of a micro-batch, on a device."""
    split = math.prod(size for name, size in sizes.items() if name != "model")
    return e.data.batch * e.data.length // split // e.optim.micro_batches


def live(job: Job) -> list[tuple[str, Config]]:
    """Names and shapes of the teachers whose layers run in a step."""
    return [(name, job.teachers[name].config) for name, m in job.experiment.teacher.models.items() if not m.cache]


def student_bytes(job: Job, e: Experiment, sizes: Mapping[str, int]) -> int:
    """Bytes of the student's parameters on a device."""
    return _bytes(job.student.config, sizes, e.student.sharding)


def overrides(asked: Experiment, e: Experiment) -> list[str]:
    """The command line's arguments that make one experiment of another, as far as settings differ."""

    def values(x: Experiment) -> dict[str, Any]:
        teachers: dict[str, Any] = {f"teacher.members.{n}": m for n, m in x.teacher.members.items()}
        teachers = teachers or {"teacher": x.teacher}
        return {
            **{f"run.mesh.{name}": getattr(x.run.mesh, name) for name in ("data", "model", "context", "teacher")},
            **{f"{name}.{key}": getattr(t, key) for name, t in teachers.items() for key in ("sharding", "dtype")},
            "student.sharding": x.student.sharding,
            "run.remat": x.run.remat,
            "optim.micro_batches": x.optim.micro_batches,
            "run.eval_batch": x.run.eval_batch,
        }

    before = values(asked)
    return [f"--config.{key}={value}" for key, value in values(e).items() if value != before[key]]


def _taught(job: Job, e: Experiment, sizes: Mapping[str, int]) -> int:
    """Bytes of the teachers' weights on a device: of a cached one its head."""
    total = 0
    for name, block in e.teacher.models.items():
        config = job.teachers[name].config
        kept = heads.names(config) if block.cache else ()
        total += _bytes(config, sizes, f"teacher {block.sharding}", block.dtype, kept)
    return total


_TABLES = {
    **sharding.TABLES,
    "moments": sharding.MOMENTS,
    **{f"teacher {name}": sharding.of_teacher(table) for name, table in sharding.TABLES.items()},
}


def _bytes(
    config: Config, sizes: Mapping[str, int], table: str, dtype: str = "float32", kept: tuple[str, ...] = ()
) -> int:
    """Of a model's weights, or those of some names, on one device."""
    return _held(config, tuple(sizes.items()), table, dtype, kept)


@functools.cache
def _held(config: Config, sizes: tuple[tuple[str, int], ...], table: str, dtype: str, kept: tuple[str, ...]) -> int:
    mesh, (shapes, axes) = (
        AbstractMesh(tuple(n for _, n in sizes), tuple(name for name, _ in sizes)),
        _stored(config, dtype),
    )
    names = kept or tuple(shapes)

    def one(leaf, logical):
        parts = sharding.spec(logical, leaf.shape, mesh, _TABLES[table])
        over = [name for part in parts if part for name in ([part] if isinstance(part, str) else part)]
        return math.prod(leaf.shape) // math.prod(mesh.shape[name] for name in over) * leaf.dtype.itemsize

    each = jax.tree.map(one, {name: shapes[name] for name in names}, {name: axes[name] for name in names})
    return sum(jax.tree.leaves(each))


@functools.cache
def _stored(config: Config, dtype: str) -> tuple[PyTree, PyTree]:
    """Shapes and axes of a model's weights."""
    shapes, axes = transformer.abstract(config)
    if dtype == "int8":
        return quantized.abstract(shapes, axes)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, DTYPES[dtype]), shapes), axes
