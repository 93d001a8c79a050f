"""Time of a train step, bytes and KL of every form of a teacher's signal."""

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.config.recipe import read_config
from jaxkd.config.schema import experiment
from jaxkd.core.sharding import batch_sharding
from jaxkd.data import loader
from jaxkd.data import mixture as mixtures
from jaxkd.models import flops
from jaxkd.run import cache_teacher, job, load
from jaxkd.run.teacher import build_teacher, bytes_per_device, open_stores
from jaxkd.teachers import codec
from jaxkd.train.state import init_state
from jaxkd.train.step import make_step

RECIPE = str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.py")


class Form(NamedTuple):
    """A kind of signal, and what of the config it sets."""

    options: dict[str, Any]
    divergence: str = "forward_kl"
    cached: bool = True


FORMS = {
    "sft": Form({}, "", False),
    "head, live": Form({}, "forward_kl", False),
    "hidden bfloat16": Form({"signal": "hidden", "stored": "bfloat16"}),
    "hidden int8": Form({"signal": "hidden", "stored": "int8"}),
    "top-64": Form({"signal": "top_k", "entries": 64}),
    "top-8": Form({"signal": "top_k", "entries": 8}),
    "sampled 50": Form({"signal": "sampled", "entries": 50}, "cross_entropy"),
    "sampled 12": Form({"signal": "sampled", "entries": 12}, "cross_entropy"),
    "top-64, live": Form({"signal": "top_k", "entries": 64}, "forward_kl", False),
}


def say(*words: Any) -> None:
    print(*words, file=sys.stderr, flush=True)


def arguments(form: Form, where: Path, rows: int, domains: tuple[str, ...], both: bool = False) -> list[str]:
    """`--config...` of a form: the quickstart's models and its batch, on a few rows."""
    cache = where / "cache" / "-".join(str(v) for v in form.options.values())
    named = form.options | ({"cache": cache} if form.cached else {})
    left_out = {"code", "manual", "legal", "scripture", "dialogue", "math"} - set(domains)
    objective = {
        "kd.divergence": form.divergence or "next_token",
        "kd.weight": 1.0 if form.divergence else 0.0,
        "ce.weight": 1.0 if both or not form.divergence else 0.0,
    }
    return [
        f"--config={RECIPE}",
        *[f"--config.teacher.{key}={value}" for key, value in named.items()],
        *[f"--config.objective.{key}={value}" for key, value in objective.items()],
        *[f"--config.data.domains.{name}=" for name in left_out],
        f"--config.data.directory={where / 'rows'}",
        f"--config.data.train_rows={rows}",
        "--config.data.valid_rows=4",
    ]


class _Ready(NamedTuple):
    """A form, compiled, with its teacher and batches at hand."""

    step: Any
    state: Any  # the teacher's
    batches: Iterator
    facts: dict[str, Any]


def _ready(name: str, form: Form, where: Path, count: int, both: bool, student: Any) -> tuple[_Ready, Any]:
    say(f"{name}{' with cross-entropy' if both else ''}: preparing")
    built = job.build(experiment(read_config(arguments(form, where, count, ("dialogue", "math"), both))))
    e, models = built.experiment, built.models
    rows = load.domains(e.data, models.tokenizer, progress=False)
    facts: dict[str, Any] = {}
    if form.cached:
        for line in cache_teacher.write(e, models, built.mesh, rows, progress=False):
            say(f"  {line}")
    stores = open_stores(e, models, rows.fingerprints)
    weights = load.weights(models, e.student, rows)
    student = weights.student if student is None else student
    taught = build_teacher(e, models, weights.teachers, stores, built.objective.uses_teacher)
    if form.cached:
        facts = _facts(built, rows, stores["teacher"])
    memory = bytes_per_device(weights.teachers) if form.divergence else {"teacher": 0}
    plain = make_step(models.student.forward, taught.train, built.objective, built.tx)
    state = init_state({"student": student, "objective": {}}, built.tx)
    mixture = mixtures.init(mixtures.uniform(rows.sizes))
    place = batch_sharding(built.mesh)
    batches = loader.batches(rows.train, mixture, 0, 4, 0, 64, 0, place, taught.train.host_features)
    step = jax.jit(plain)
    batch = next(batches)
    jax.block_until_ready(step(state, {}, taught.train.state, batch))
    whole = flops.body(models.teacher.config, 128) + flops.head(models.teacher.config)
    spent = 0 if not form.divergence else whole if not form.cached else 0
    if form.options.get("signal") == "hidden":
        spent = flops.head(models.teacher.config)
    facts |= {"teacher_bytes": memory["teacher"], "teacher_gflop_a_step": round(spent * 512 / 1e9, 1)}
    return _Ready(step, taught.train.state, batches, facts), student


def _facts(built: job.Job, rows: load.Domains, store: Any) -> dict[str, Any]:
    """Bytes a token on disk, with the files' own and without, and KL of the payload."""
    tokens = sum(rows.sizes) * built.experiment.data.length
    disk = sum(file.stat().length for name in rows.names for file in store.root.glob(f"{name}/*/*-train.array_record*"))
    payload = sum(len(p) for name, n in zip(rows.names, rows.sizes) for p in store.read(name, "train", list(range(n))))
    recorder = cache_teacher.make_recorder(built.experiment, built.models, built.mesh)
    total, live = 0.0, 0.0
    for d, name in enumerate(rows.names):
        local = loader.read_rows(rows.train, jnp.full(4, d), jnp.arange(4))
        batch = loader.to_devices(local, 4, jnp.arange(4), batch_sharding(built.mesh))
        stored: Any = codec.decode_rows(recorder.layouts["train"], store.read(name, "train", range(4)))
        kl = recorder.kl(recorder.params, batch, jax.tree.map(jnp.asarray, stored))
        total += float(jnp.where(batch.weights != 0, kl, 0.0).sum())
        live += float(batch.weights.sum())
    return {
        "bytes_per_token": round(disk / tokens, 1),
        "payload_bytes_per_token": round(payload / tokens, 1),
        "kl_of_payload": float(f"{total / live:.3g}"),
    }


def table(where: Path, quick: bool) -> Iterator[dict]:
    """A row per form; ratios are medians of rounds in which every form makes one step.

    Args:
        where: rows and caches go.
        quick: few rounds and rows, and no second figure.
    """
    count, rounds = (16, 3) if quick else (64, 15)
    ready: dict[tuple[str, bool], _Ready] = {}
    student: Any = None
    with jax.set_mesh(job.build(experiment(read_config([f"--config={RECIPE}"]))).mesh):
        for both in (False,) if quick else (False, True):
            for name, form in FORMS.items():
                if both and not form.divergence:
                    continue
                ready[name, both], student = _ready(name, form, where, count, both, student)
        state = init_state(
            {"student": student, "objective": {}}, job.build(experiment(read_config([f"--config={RECIPE}"]))).tx
        )
        seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in ready}
        for _ in range(rounds):
            for key, each in ready.items():
                start = time.perf_counter()
                jax.block_until_ready(each.step(state, {}, each.state, next(each.batches)))
                seconds[key].append(time.perf_counter() - start)
    base = seconds["sft", False]

    def over(key: tuple[str, bool]) -> float | None:
        if key not in seconds:
            return None
        return round(statistics.median(a / b for a, b in zip(seconds[key], base, strict=True)), 3)

    for name in FORMS:
        facts = ready[name, False].facts
        row = {
            "signal": name,
            "bytes_per_token": facts.get("bytes_per_token"),
            "payload_bytes_per_token": facts.get("payload_bytes_per_token"),
            "step_over_sft": over((name, False)),
            "kl_of_payload": facts.get("kl_of_payload", 0.0 if name.startswith("head") else None),
            "teacher_bytes": facts["teacher_bytes"],
            "teacher_gflop_a_step": facts["teacher_gflop_a_step"],
        }
        yield row if quick else row | {"step_with_ce_over_sft": over((name, True))}
    say(f"a step of plain fine-tuning: {statistics.median(base):.2f} s")
