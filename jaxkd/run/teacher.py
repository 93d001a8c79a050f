"""The teacher that a job describes, made of loaded weights and an opened cache."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxkd.config import validate
from jaxkd.core.types import Batch, Output, PyTree
from jaxkd.models import heads
from jaxkd.run import job as jobs
from jaxkd.run import load
from jaxkd.run.job import Job
from jaxkd.teachers import codec, ensemble, signals
from jaxkd.teachers.base import Teacher
from jaxkd.teachers.cached import cached, recorded
from jaxkd.teachers.online import no_teacher, online, self_teacher
from jaxkd.teachers.store import Store


class Teaching(NamedTuple):
    """The teacher twice, over the same arrays: as the student learns from it, and as it is judged beside it."""

    train: Teacher
    judge: Teacher  # always its whole distribution, on held-out rows

    def judged(self, known: tuple[PyTree, Any, PyTree], batch: Batch) -> Any:
        """The judge's signal, from (its state, the step, `TrainState.ema` or the student's parameters)."""
        state, step, average = known
        given = {"step": step, "own": average}
        return self.judge.signal(state, batch, **{name: given[name] for name in self.judge.requires if name in given})


def build_teacher(job: Job, params: Mapping[str, PyTree], stores: Mapping[str, Store]) -> Teaching:
    """The job's teacher.

    Args:
        job: what was asked for.
        params: of each teacher by name; of a cached one its head.
        stores: the opened caches of those that have one; without its store a cached teacher can be compiled, not run.
    """
    t = job.experiment.teacher
    if job.own:
        judge = train = self_teacher(job.teacher.forward)
    elif t.members:
        judge, train = (
            ensemble.ensemble(
                [_one(job, name, params[name], stores.get(name), split) for name in job.teachers],
                jobs.shares(job),
                geometric=t.average == "log_probabilities",
            )
            for split in ("valid", "train")
        )
    else:
        judge, train = (_one(job, "teacher", params["teacher"], stores.get("teacher"), s) for s in ("valid", "train"))
    if not any(model.cache for model in t.models.values()):
        train = reduced(job, train, job.experiment.run.seed)
    if not job.objective.uses_teacher and t.signal != "token":
        train = no_teacher()._replace(state=judge.state)
    return Teaching(train, judge)


def _one(job: Job, name: str, params: PyTree, store: Store | None, split: str) -> Teacher:
    """A model that teaches, live or from what is stored of it."""
    model = job.teachers[name]
    if not job.experiment.teacher.models[name].cache:
        return online(params, model.forward)

    def head(params: PyTree, hidden: jax.Array) -> Output:
        return heads.output(model.config, params, hidden.astype(model.dtype))

    if store is None:
        return recorded(params, head)
    return cached(store, split, job.domains, params, head)


def reduced(job: Job, teacher: Teacher, seed: int) -> Teacher:
    """A live teacher, less than its head where the job says so.

    Args:
        job: for the signal.
        teacher: the live one.
        seed: of what is drawn from it.
    """
    t, vocab = job.experiment.teacher, job.tokenizer.vocab
    if t.signal == "top_k":
        return signals.top_k(teacher, t.entries, t.temperatures, vocab)
    if t.signal == "sampled":
        return signals.sampled(teacher, t.entries, seed, vocab)
    if t.signal == "token":
        return signals.token(teacher.state, writing(job), seed)
    return teacher


def writing(job: Job) -> signals.Writing:
    """How the teacher's own text is made."""
    t, model = job.experiment.teacher, job.teacher
    return signals.Writing(
        model.config, t.prompt, t.temperatures[0], job.tokenizer.vocab, job.tokenizer.end, model.dtype, model.rules
    )


def fingerprint(job: Job, name: str) -> str:
    """Of a teacher's weights: its checkpoint's, or what random ones are made from."""
    model = job.teachers[name]
    if model.checkpoint is not None:
        return model.checkpoint.fingerprint
    made = {"random": load.teacher_seed(job.experiment, list(job.teachers).index(name))}
    return hashlib.sha256(json.dumps(made | dict(job.experiment.teacher.models[name].shape)).encode()).hexdigest()


def described(job: Job, rows: Mapping[str, str], name: str = "teacher") -> dict[str, Any]:
    """What a cache must say of itself to serve this job.

    Args:
        job: for the signal and the sizes.
        rows: fingerprint per domain.
        name: of the teacher.
    """
    t = job.experiment.teacher
    stored = {split: dataclasses.asdict(layout) for split, layout in layouts(job, name).items()}
    if t.members:
        del stored["train"]["dtype"]  # any that hidden states are stored in will do
    facts: dict[str, Any] = {
        "layouts": stored,
        "teacher": {"fingerprint": fingerprint(job, name), "dtype": t.models[name].dtype},
        "tokenizer": job.tokenizer.fingerprint,
        "rows": dict(rows),
    }
    if t.signal == "token":
        facts["text"] = {"prompt": t.prompt, "temperature": t.temperatures[0]}
    return json.loads(json.dumps(facts))


def layouts(job: Job, name: str = "teacher") -> dict[str, codec.Layout]:
    """What is stored of a row: of held-out ones always the hidden states, as exact as the teacher computes them."""
    t, length, vocab = job.experiment.teacher, job.experiment.data.length, job.tokenizer.vocab
    width = job.teachers[name].config.embed
    signal = "hidden" if t.members else t.signal
    stored = t.stored or codec.DTYPES[signal][0]
    train = {
        "hidden": lambda: codec.Layout("hidden", length, width=width, dtype=stored),
        "top_k": lambda: codec.Layout("top_k", length, vocab, t.entries, t.temperatures, dtype=stored),
        "sampled": lambda: codec.Layout("sampled", length, vocab, t.entries),
        "token": lambda: codec.Layout("token", length, vocab),
    }[signal]()
    return {
        "train": train,
        "valid": codec.Layout("hidden", length, width=width, dtype=validate.STORED[t.models[name].dtype]),
    }


def abstract_batch(job: Job) -> Batch:
    """Shapes and shardings of a global batch, with what caches add to it."""
    batch, found = jobs.abstract_batch(job), []
    for name, model in job.experiment.teacher.models.items():
        row = codec.empty(layouts(job, name)["train"]) if model.cache else None
        found.append(None if isinstance(row, codec.Text) else row)  # text stands in the batch's own fields
    place, rows = batch.row.sharding, job.experiment.data.batch
    put = lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=place)
    kept = jax.tree.map(put, tuple(found) if job.experiment.teacher.members else next(iter(found), None))
    return batch._replace(teacher=kept if jax.tree.leaves(kept) else None)


def open_stores(job: Job, rows: Mapping[str, str]) -> dict[str, Store]:
    """The caches that the job names, each found to be of its teacher and of the rows that it serves.

    Args:
        job: for the names.
        rows: fingerprint per domain.

    Raises:
        FileNotFoundError: there is none yet.
        ValueError: one is of something else, incomplete or damaged; the message names both sides.
    """
    found = {}
    for name, model in job.experiment.teacher.models.items():
        if model.cache:
            served = {domain for domain, factor in getattr(model, "domains", {}).items() if factor} or set(rows)
            found[name] = Store(model.cache)
            found[name].expect(described(job, {d: f for d, f in rows.items() if d in served}, name))
    return found


def bytes_per_device(params: Mapping[str, PyTree]) -> dict[str, int]:
    """What each teacher's arrays take on the fullest device."""
    total = {}
    for name, tree in params.items():
        held: dict[Any, int] = {}
        for leaf in jax.tree.leaves(tree):
            for shard in leaf.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        total[name] = max(held.values(), default=0)
    return total
