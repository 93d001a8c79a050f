"""The teacher that a recipe describes, made of loaded weights and opened caches."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxkd.config import validate
from jaxkd.config.resolve import teacher_weights
from jaxkd.config.schema import DataBlock, Experiment, TeacherBlock
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import Batch, PyTree
from jaxkd.evals import compare
from jaxkd.models import heads
from jaxkd.run.batch import rows_batch
from jaxkd.run.open_models import Models
from jaxkd.teachers import codec, ensemble, signals
from jaxkd.teachers.base import Teacher
from jaxkd.teachers.cached import cached, recorded
from jaxkd.teachers.online import no_teacher, online, self_teacher
from jaxkd.teachers.store import Store


class Teachers(NamedTuple):
    """The teacher twice, over the same arrays."""

    train: Teacher  # gives the signal that the objective learns from
    evaluate: Teacher  # always the whole distribution, on held-out rows

    def held_out_signal(self, inputs: tuple[PyTree, Any, PyTree], batch: Batch) -> Any:
        """`evaluate`'s signal; `inputs` are its state, the step, and `TrainState.ema` or the student's parameters."""
        state, step, average = inputs
        options = {"step": step, "own": average}
        return self.evaluate.signal(state, batch, **{n: options[n] for n in self.evaluate.requires if n in options})

    def comparison(self, models: Models) -> Callable[[PyTree, Any, Batch], compare.Sums]:
        """`(student, inputs, batch) -> sums` against `evaluate`, jitted; `inputs` are those of `held_out_signal`."""
        return jax.jit(compare.make_comparison(models.student.forward, self.held_out_signal, models.vocab))


def build_teacher(
    e: Experiment, models: Models, params: Mapping[str, PyTree], stores: Mapping[str, Store], uses_teacher: bool = True
) -> Teachers:
    """The recipe's teacher, from the parameters of each by name (of a cached one its head) and the opened caches.

    A cached teacher without its store can be compiled, not run. `uses_teacher` says whether the objective does.
    """
    t, names = e.teacher, tuple(e.data.domains)

    def one(name: str, split: str) -> Teacher:
        model, store = models.teachers[name], stores.get(name)
        if not model.cache:
            return online(params[name], model.forward)
        head = lambda params, hidden: heads.output(model.config, params, hidden.astype(model.dtype))
        return recorded(params[name], head) if store is None else cached(store, split, names, params[name], head)

    if models.is_self:
        evaluate = train = self_teacher(models.teacher.forward)
    elif t.members:
        weigh, geometric = teacher_weights(t.members, names, e.run.steps), t.average == "log_probabilities"
        train, evaluate = (
            ensemble.ensemble([one(name, split) for name in models.teachers], weigh, geometric=geometric)
            for split in ("train", "valid")
        )
    else:
        train, evaluate = (one("teacher", split) for split in ("train", "valid"))
    if not any(model.cache for model in models.teachers.values()):
        train = reduced(t, models, train, e.run.seed)
    if not uses_teacher and not (t.signal == "token" and t.cache):  # whose host side replaces the rows
        train = no_teacher()._replace(state=evaluate.state)
    return Teachers(train, evaluate)


def reduced(t: TeacherBlock, models: Models, teacher: Teacher, seed: int) -> Teacher:
    """An online teacher cut down to the signal `t.signal`; `seed` is of what is drawn from it."""
    if t.signal == "top_k":
        return signals.top_k(teacher, t.entries, t.temperatures, models.vocab)
    if t.signal == "sampled":
        return signals.sampled(teacher, t.entries, seed, models.vocab)
    return teacher


def cache_facts(
    t: TeacherBlock, models: Models, data: DataBlock, rows: Mapping[str, str], name: str = "teacher"
) -> dict[str, Any]:
    """What the manifest of a teacher's cache must say to serve this recipe; `rows` is a fingerprint per domain."""
    layouts = cache_layouts(t, models, data.length, name)
    stored = {split: dataclasses.asdict(layout) for split, layout in layouts.items()}
    if t.members:
        del stored["train"]["dtype"]  # an ensemble takes hidden states of any dtype
    block, model = t.models[name], models.teachers[name]
    if model.checkpoint is not None:
        fingerprint = model.checkpoint.fingerprint
    else:
        random = json.dumps({"random": model.seed} | dict(block.shape), sort_keys=True)
        fingerprint = hashlib.sha256(random.encode()).hexdigest()
    facts: dict[str, Any] = {
        "layouts": stored,
        "teacher": {"fingerprint": fingerprint, "dtype": block.dtype},
        "tokenizer": models.tokenizer.fingerprint,
        "rows": dict(rows),
    }
    if t.signal == "token":
        facts["text"] = {"prompt": t.prompt, "temperature": t.temperatures[0]}
    return json.loads(json.dumps(facts))


def cache_layouts(t: TeacherBlock, models: Models, length: int, name: str = "teacher") -> dict[str, codec.Layout]:
    """What is stored of a row: of held-out ones always the hidden states, in the teacher's compute dtype."""
    width, vocab = models.teachers[name].config.embed, models.vocab
    signal = "hidden" if t.members else t.signal
    dtype = t.stored or codec.DTYPES[signal][0]
    if signal == "hidden":
        train = codec.Layout("hidden", length, width=width, dtype=dtype)
    elif signal == "top_k":
        train = codec.Layout("top_k", length, vocab, t.entries, t.temperatures, dtype=dtype)
    else:
        train = codec.Layout(signal, length, vocab, t.entries if signal == "sampled" else 0)
    valid = codec.Layout("hidden", length, width=width, dtype=validate.STORED[t.models[name].dtype])
    return {"train": train, "valid": valid}


def abstract_batch(e: Experiment, models: Models, mesh: Mesh) -> Batch:
    """Shapes and shardings of a global batch, with what caches add to it."""
    batch = rows_batch(e.data, batch_sharding(mesh))
    payloads = []
    for name, model in e.teacher.models.items():
        row = codec.empty(cache_layouts(e.teacher, models, e.data.length, name)["train"]) if model.cache else None
        payloads.append(None if isinstance(row, codec.Text) else row)  # text replaces the batch's own fields
    leaf = lambda x: jax.ShapeDtypeStruct((e.data.batch, *x.shape), x.dtype, sharding=batch.row.sharding)
    stored = jax.tree.map(leaf, tuple(payloads) if e.teacher.members else next(iter(payloads), None))
    return batch._replace(teacher=stored if jax.tree.leaves(stored) else None)


def open_stores(e: Experiment, models: Models, rows: Mapping[str, str]) -> dict[str, Store]:
    """The caches that the recipe names, by teacher; `rows` has a fingerprint per domain.

    FileNotFoundError for one that does not exist yet, ValueError for one of another teacher or other rows, or damaged.
    """
    stores = {}
    for name, model in e.teacher.models.items():
        if model.cache:
            served = {domain for domain, factor in getattr(model, "domains", {}).items() if factor} or set(rows)
            stores[name] = Store(model.cache)
            fingerprints = {domain: f for domain, f in rows.items() if domain in served}
            stores[name].expect(cache_facts(e.teacher, models, e.data, fingerprints, name))
    return stores


def bytes_per_device(params: Mapping[str, PyTree]) -> dict[str, int]:
    """Of each teacher's arrays on the device that holds most of them."""
    totals = {}
    for name, tree in params.items():
        by_device: Counter = Counter()
        for shard in (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards):
            by_device[shard.device] += shard.data.nbytes
        totals[name] = max(by_device.values(), default=0)
    return totals
