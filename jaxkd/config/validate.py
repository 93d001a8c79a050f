"""Checks of an experiment's values that need no file."""

import math
import operator
from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from jaxkd.config.schema import SELF, Experiment, RolloutBlock, Schedule, TeacherBlock, nearest
from jaxkd.core import seeds
from jaxkd.core.sharding import ROWS, TABLES
from jaxkd.models import transformer
from jaxkd.sampling.processors import Sampling
from jaxkd.teachers import codec
from jaxkd.teachers.signals import SIGNALS

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
STORED = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}  # of a teacher's weights -> activations
AVERAGES = ("probabilities", "log_probabilities")
AT_LEAST = {
    **dict.fromkeys(
        ("run.steps", "run.checkpoint_every", "run.log_every", "run.keep_checkpoints", "run.eval_batch"), 1
    ),
    **dict.fromkeys(("data.interval", "data.batch", "data.length", "optim.micro_batches", "run.rollout_every"), 1),
    **dict.fromkeys(("run.eval_every", "run.keep_every", "run.keep_best", "run.stall_s", "data.context"), 0),
    "run.samples": -1,
    **dict.fromkeys(("optim.skip_limit", "optim.spike", "optim.lr.peak", "optim.lr.warmup", "optim.lr.end"), 0),
    **dict.fromkeys(("data.train_rows", "data.valid_rows", "optim.weight_decay", "optim.eps", "optim.clip"), 0),
}


def _check_teacher(t: TeacherBlock) -> None:
    if t.members and t.path:
        raise ValueError("teacher.path and teacher.members exclude each other: give one teacher, or several")
    if not t.members and not t.path:
        raise ValueError("missing key teacher.path: name the teacher's weights, or give teacher.members")
    if t.signal == "hidden" and not t.cache:
        raise ValueError("teacher.signal 'hidden' is read from a cache: set teacher.cache, or take 'head'")
    if t.signal == "head" and t.cache:
        raise ValueError("teacher.signal 'head' cannot be cached: take 'hidden', which is exact too, or no cache")
    if t.members and t.signal != "head":
        raise ValueError(f"teacher.signal must be 'head' with teacher.members, got '{t.signal}': cache the members")
    if t.path == SELF and (t.cache or t.signal == "token"):
        raise ValueError("teacher.path 'self' changes at every step: it takes no teacher.cache and no signal 'token'")
    if t.path == SELF and t.dtype not in DTYPES:
        raise ValueError(f"teacher.dtype '{t.dtype}' is not for teacher.path 'self', which has the student's dtype")
    if not 0 <= t.decay <= 1:
        raise ValueError(f"teacher.decay must be from 0 to 1, got {t.decay}")
    if t.entries < 1:
        raise ValueError(f"teacher.entries must be at least 1, got {t.entries}")
    # Temperature 0 takes the most probable token; it defines no tail.
    low = {"token": lambda x: x >= 0}.get(t.signal, lambda x: x > 0)
    if not t.temperatures or not all(math.isfinite(x) and low(x) for x in t.temperatures):
        raise ValueError(f"teacher.temperatures must be finite and above 0 (or 0 for text), got {t.temperatures}")
    if t.signal == "token" and len(t.temperatures) > 1:
        raise ValueError(f"teacher.signal 'token' draws at one temperature, got teacher.temperatures {t.temperatures}")
    stored = codec.DTYPES.get(t.signal, ())
    if t.stored and t.stored not in stored:
        choices = ", ".join(filter(None, stored)) or "leave it out"
        raise ValueError(f"teacher.stored '{t.stored}' is not for teacher.signal '{t.signal}': {choices}")


def _check_rollout(e: Experiment) -> None:
    r, t, count = e.data.rollout, e.teacher, e.run.rollout_every
    ends = lambda share: (share.peak, share.end) if isinstance(share, Schedule) else (share, share)
    for name, values in (("student", ends(r.student)), ("teacher", ends(r.teacher)), ("adaptive", (r.adaptive,))):
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"data.rollout.{name} must be from 0 to 1, got {values[0]:g}")
    if max(ends(r.student)) + max(ends(r.teacher)) > 1:
        raise ValueError("data.rollout.student and data.rollout.teacher share the same rows: together at most 1")
    try:
        Sampling(r.temperature, r.top_k, r.top_p, r.min_p).check()
    except ValueError as error:
        raise ValueError(f"data.rollout.{error}") from None
    if not 0 <= r.mix < 1:
        raise ValueError(f"data.rollout.mix must be at least 0 and below 1, got {r.mix:g}")
    for key, value in (("prompt", r.prompt), ("length", r.length), ("buffer", r.buffer), ("proposals", r.proposals)):
        if value < 0:
            raise ValueError(f"data.rollout.{key} must be at least 0, got {value}")
    if r.prompt >= e.data.length:
        raise ValueError(f"data.rollout.prompt={r.prompt} leaves no room in rows of data.length={e.data.length}")
    if r.context and e.data.context:
        raise ValueError("data.rollout.context is of all rows and data.context of each record: give one")
    if r.mix and r.proposals:
        raise ValueError("data.rollout.mix and proposals are two ways to draw the student's text: give one")
    if (r.buffer or r.adaptive or r.mix or r.proposals or r.int8) and not (r.student or r.adaptive):
        raise ValueError("data.rollout.student is 0, so no text is written: give it a share, such as 0.5")
    if (r.mix or r.proposals) and any(term.feature.startswith("policy_gradient") for term in e.objective.values()):
        raise ValueError(
            "policy_gradient compares with the probability under the student alone, and data.rollout.mix or proposals "
            "draws from both models: take minillm() or a divergence"
        )
    if r.adaptive and not e.run.eval_every:
        raise ValueError("data.rollout.adaptive follows the evaluations while training: set run.eval_every")
    if r.adaptive and (not r.buffer or isinstance(r.student, Schedule)):
        raise ValueError(
            "data.rollout.adaptive moves a buffer's share: give data.rollout.buffer, and a number as student"
        )
    if not (
        r.student or r.teacher or r.adaptive or r.context or e.data.context or (t.signal == "token" and not t.cache)
    ):
        if count > 1:
            raise ValueError(f"run.rollout_every={count} has no rollouts: give data.rollout.student or teacher a share")
        return
    if t.signal == "token" and (r != RolloutBlock() or e.data.context):
        raise ValueError("teacher.signal 'token' is the teacher's text: take signal 'head' with data.rollout")
    single = not (t.members or t.path == SELF)
    for key, used in (("teacher", r.teacher), ("mix", r.mix), ("proposals", r.proposals)):
        if used and not single:
            raise ValueError(f"data.rollout.{key} needs one teacher model, not members or 'self': set teacher.path")
    if t.cache or any(member.cache for member in t.members.values()):
        raise ValueError("teacher.cache is of the data's text, not of rollouts: leave it out, the teacher runs online")
    for key, value in (("data.interval", e.data.interval), ("run.steps", e.run.steps)):
        if value % count:
            raise ValueError(f"{key}={value} must be a multiple of run.rollout_every={count}")


def check(e: Experiment, mesh: Mapping[str, int]) -> None:
    """Check values that can be judged without opening a file; `mesh` is the number of devices per axis."""
    models = {n if n == "teacher" else f"teacher.members.{n}": m for n, m in e.teacher.models.items()}
    if e.run.dtype in STORED and e.run.dtype not in DTYPES:
        raise ValueError(f"run.dtype '{e.run.dtype}' is for a teacher's weights only (teacher.dtype)")
    choices: list[tuple[str, str, Iterable[str]]] = [
        ("run.dtype", e.run.dtype, DTYPES),
        ("run.remat", e.run.remat, transformer.REMAT),
        ("student.sharding", e.student.sharding, TABLES),
        ("teacher.signal", e.teacher.signal, SIGNALS),
        ("teacher.average", e.teacher.average, AVERAGES),
        *((f"{name}.dtype", model.dtype, STORED) for name, model in models.items()),
        *((f"{name}.sharding", model.sharding, TABLES) for name, model in models.items()),
    ]
    for key, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"unknown {key} '{value}': {nearest(value, allowed)}")
    _check_teacher(e.teacher)
    for key, lowest in AT_LEAST.items():
        value = operator.attrgetter(key)(e)
        if not (math.isfinite(value) and value >= lowest):
            raise ValueError(f"{key} must be finite and at least {lowest}, got {value}")
    _check_rollout(e)
    if not e.data.domains:
        raise ValueError("data.domains is empty: name at least one domain and its source")
    if "mean" in e.data.domains:
        raise ValueError("data.domains.mean: the name is taken by the mean over domains; choose another")
    if e.student.layers and e.student.keep:
        raise ValueError("student.layers and student.keep exclude each other: give the layers, or how many to keep")
    if e.student.path == "random" and (e.student.layers or e.student.keep):
        raise ValueError("student.path is 'random': set its depth by student.shape.layers, not student.layers or keep")
    for key in ("optim.b1", "optim.b2"):
        if not 0 <= (value := operator.attrgetter(key)(e)) < 1:
            raise ValueError(f"{key} must be at least 0 and below 1, got {value}")
    if not 0 <= e.run.seed < seeds.LIMIT:
        raise ValueError(f"run.seed must be from 0 to 2**63 - 1, got {e.run.seed}")
    if (at := e.run.checkpoints) and not at.startswith(("gs://", "/", "~")):
        raise ValueError(f"run.checkpoints={at} must be absolute or gs://BUCKET/PATH, the same from any directory")
    if problems := _mesh_problems(e, mesh):
        raise ValueError(f"the recipe does not fit its mesh: {'; '.join(problems)}")


def _mesh_problems(e: Experiment, mesh: Mapping[str, int]) -> list[str]:
    """What does not divide over the mesh, each with the nearest values that do."""
    rows, parts, devices = e.data.batch, e.optim.micro_batches, math.prod(mesh[name] for name in ROWS)
    used = [name for name in ROWS if name == "data" or mesh[name] > 1]
    over = f"{devices} devices on the {' and '.join(used)} {'axis' if len(used) == 1 else 'axes'}"

    def nearest_multiples(value: int, of: int) -> str:
        below, above = value // of * of, -(-value // of) * of
        return f"{below} or {above}" if below else f"{above}"

    problems = []
    if rows % devices:
        fit = nearest_multiples(rows, devices)
        problems.append(f"data.batch={rows} must be a multiple of the {over}, such as {fit}")
        rows = -(-rows // devices) * devices
    if rows // devices % parts:
        counts = ", ".join(str(n) for n in range(1, rows // devices + 1) if rows // devices % n == 0)
        problems.append(
            f"optim.micro_batches={parts} must divide the {rows // devices} rows a device of data.batch={rows}: "
            f"take {counts}"
        )
    if e.run.eval_batch % devices:
        fit = nearest_multiples(e.run.eval_batch, devices)
        problems.append(f"run.eval_batch={e.run.eval_batch} must be a multiple of the {over}, such as {fit}")
    if e.data.length % mesh["context"]:
        fit = nearest_multiples(e.data.length, mesh["context"])
        problems.append(f"data.length={e.data.length} must be a multiple of run.mesh.context={mesh['context']}: {fit}")
    return problems
