"""Whether the values of an experiment fit together, as far as that shows before a file is opened."""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from jaxkd.config.schema import SELF, Experiment, TeacherBlock, nearest
from jaxkd.core.sharding import ROWS, TABLES
from jaxkd.models import transformer
from jaxkd.teachers import codec
from jaxkd.teachers.signals import SIGNALS

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
STORED = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}
"""What a teacher's weights may be stored in, and what its activations are in then."""
AVERAGES = ("probabilities", "log_probabilities")


def _check_teacher(t: TeacherBlock) -> None:
    if t.members and t.path:
        raise ValueError("teacher.path and teacher.members exclude each other: give one teacher, or several")
    if not t.members and not t.path:
        raise ValueError("missing key teacher.path: name the teacher's weights, or give teacher.members")
    if t.signal not in SIGNALS:
        raise ValueError(f"unknown teacher.signal '{t.signal}': {nearest(t.signal, SIGNALS)}")
    if t.average not in AVERAGES:
        raise ValueError(f"unknown teacher.average '{t.average}': {nearest(t.average, AVERAGES)}")
    if t.signal == "hidden" and not t.cache:
        raise ValueError("teacher.signal 'hidden' is a cached one: give teacher.cache a directory, or take 'head'")
    if t.signal == "head" and t.cache:
        raise ValueError(
            "a head cannot be cached: take teacher.signal 'hidden', which is as exact, or leave out the cache"
        )
    if t.members and t.signal != "head":
        raise ValueError(f"several teachers give one signal, 'head', not '{t.signal}': cache each of them by itself")
    if t.path == SELF and (t.cache or t.signal == "token"):
        raise ValueError("a teacher that is the student itself changes with it: it has no cache and no text of its own")
    if t.path == SELF and t.dtype not in DTYPES:
        raise ValueError(f"teacher.dtype is '{t.dtype}', but a teacher that is the student itself is stored as it is")
    if not 0 <= t.decay <= 1:
        raise ValueError(f"teacher.decay must be from 0 to 1, got {t.decay}")
    if t.entries < 1:
        raise ValueError(f"teacher.entries must be at least 1, got {t.entries}")
    # The teacher's own text may be the most probable one.
    low = {"token": lambda x: x >= 0}.get(t.signal, lambda x: x > 0)
    if not t.temperatures or not all(math.isfinite(x) and low(x) for x in t.temperatures):
        raise ValueError(f"teacher.temperatures must be finite and above 0 (or 0 for text), got {t.temperatures}")
    if t.signal == "token" and len(t.temperatures) > 1:
        raise ValueError(f"signal 'token' is text drawn at one temperature, got teacher.temperatures {t.temperatures}")
    known = codec.DTYPES.get(t.signal, ())
    if t.stored and t.stored not in known:
        choices = ", ".join(filter(None, known)) or "leave it out"
        raise ValueError(f"teacher.stored '{t.stored}' is not for signal '{t.signal}': {choices}")


def check(e: Experiment, mesh: Mapping[str, int]) -> None:
    """See that values which one can judge without opening anything fit together.

    Args:
        e: the experiment.
        mesh: devices along each of its axes.

    Raises:
        ValueError: naming the key, and what it may be.
    """
    _check_teacher(e.teacher)
    dtypes = {
        "teacher" if name == "teacher" else f"teacher.members.{name}": m.dtype for name, m in e.teacher.models.items()
    }
    if e.run.dtype not in DTYPES:
        why = "a student learns, and int8 is for a teacher's weights alone (teacher.dtype)"
        hint = why if e.run.dtype in STORED else nearest(e.run.dtype, DTYPES)
        raise ValueError(f"unknown run.dtype '{e.run.dtype}': {hint}")
    for where, name in dtypes.items():
        if name not in STORED:
            raise ValueError(f"unknown {where}.dtype '{name}': {nearest(name, STORED)}")
    tables = {"teacher" if n == "teacher" else f"teacher.members.{n}": m.sharding for n, m in e.teacher.models.items()}
    for where, name in {"student": e.student.sharding, **tables}.items():
        if name not in TABLES:
            raise ValueError(f"unknown {where}.sharding '{name}': {nearest(name, TABLES)}")
    if e.run.remat not in transformer.REMAT:
        raise ValueError(f"unknown run.remat '{e.run.remat}': {nearest(e.run.remat, transformer.REMAT)}")
    if not e.data.domains:
        raise ValueError("data.domains is empty: name at least one domain and its source")
    if "mean" in e.data.domains:
        raise ValueError("a domain cannot be called 'mean': that is the row of the mean over domains")
    if e.student.layers and e.student.keep:
        raise ValueError("student.layers and student.keep exclude each other: give the layers, or how many to keep")
    if e.student.path == "random" and (e.student.layers or e.student.keep):
        raise ValueError("a random student is not cut: set its depth in student.shape.layers")
    limits = {"optim.skip_limit": e.optim.skip_limit, "optim.spike": e.optim.spike, "run.stall_s": e.run.stall_s}
    for where, value in limits.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{where} must be finite and at least 0, got {value}")
    counts = {
        "run.steps": e.run.steps,
        "run.checkpoint_every": e.run.checkpoint_every,
        "run.log_every": e.run.log_every,
        "run.keep_checkpoints": e.run.keep_checkpoints,
        "run.eval_batch": e.run.eval_batch,
        "data.interval": e.data.interval,
        "data.batch": e.data.batch,
        "optim.micro_batches": e.optim.micro_batches,
    }
    for where, number in counts.items():
        if number < 1:
            raise ValueError(f"{where} must be at least 1, got {number}")
    if (at := e.run.checkpoints) and not at.startswith(("gs://", "/", "~")):
        raise ValueError(f"run.checkpoints={at} must be absolute, or gs://BUCKET/PATH: runs are resumed from anywhere")
    for where, number in {"run.keep_every": e.run.keep_every, "run.keep_best": e.run.keep_best}.items():
        if number < 0:
            raise ValueError(f"{where} must be at least 0, got {number}")
    rows, parts, devices = e.data.batch, e.optim.micro_batches, math.prod(mesh[name] for name in ROWS)
    used = [name for name in ROWS if name == "data" or mesh[name] > 1]
    lies = f"the {' and '.join(used)} {'axis' if len(used) == 1 else 'axes'}"
    if rows % (parts * devices):
        raise ValueError(
            f"data.batch={rows} must be a multiple of optim.micro_batches={parts} x {devices} devices on {lies}"
        )
    if e.run.eval_batch % devices:
        raise ValueError(f"run.eval_batch={e.run.eval_batch} must be a multiple of the {devices} devices on {lies}")
    if e.data.length % mesh["context"]:
        raise ValueError(
            f"data.length={e.data.length} must be a multiple of the run.mesh.context={mesh['context']} devices that "
            "share a row's tokens"
        )
