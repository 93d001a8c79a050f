"""Samples of fixed prompts at every evaluation, and what student and teacher say of the student's own text."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkd.config.schema import Experiment, RolloutBlock
from jaxkd.core import metrics, seeds
from jaxkd.core.sharding import ROWS, batch_sharding
from jaxkd.core.types import PyTree
from jaxkd.data import loader
from jaxkd.evals import own_text
from jaxkd.evals.metrics import distinct
from jaxkd.models import quantized
from jaxkd.report import records
from jaxkd.run import load, rollouts
from jaxkd.run.open_models import Model, Models
from jaxkd.run.teacher import Teachers
from jaxkd.train.rollout import STUDENT, TEACHER, prompts, rollout

_LENGTH = 64  # most tokens of a sample where a run has no rollouts
_ON_POLICY = 8  # prompts
_KEY = 2**31 + 1  # of all samples, so that evaluations differ by the student alone


def count(e: Experiment) -> int:
    """`run.samples`, or by its default so many that an on-policy run is never without figures of its text."""
    if e.run.samples >= 0:
        return e.run.samples
    r = rollouts.block(e)
    return _ON_POLICY if r is not None and (r.student or r.adaptive) else 0


class Samples:
    """The programs, and the `count` held-out rows whose prompts are continued, from all domains in turn."""

    def __init__(self, e: Experiment, models: Models, rows: load.Domains, teachers: Teachers, mesh: Mesh, count: int):
        chosen = [(d, i) for i in range(count) for d, valid in enumerate(rows.valid) if i < len(valid)][:count]
        self.sources = [(rows.names[d], i) for d, i in chosen]  # of the prompts
        # Every device has as many rows; those that fill up do not count.
        devices = math.prod(mesh.shape[name] for name in ROWS)
        count = -(-len(chosen) // devices) * devices
        domain, row = np.asarray(chosen + chosen[:1] * (count - len(chosen))).T
        values, sharding = loader.read_rows(rows.valid, domain, row), batch_sharding(mesh)
        local = loader.local_rows(count, sharding)
        self.batch = loader.to_devices(jax.tree.map(lambda x: x[local], values), count, local, sharding)
        counted = jnp.arange(count)[:, None] < len(chosen)
        r, length = rollouts.block(e), e.data.length
        conversations = not values["weights"][:, 0].any()
        r = r or RolloutBlock(prompt=0 if conversations else length // 4, length=_LENGTH, temperature=0.0)
        self.ends, self.tokenizer = models.tokenizer.ends, models.tokenizer
        options = rollouts.rollout_options(r, models)
        replicated = NamedSharding(mesh, PartitionSpec())
        key = jax.random.fold_in(seeds.key(e.run.seed), _KEY)

        def write(model: Model, author: int) -> Any:
            decoder = rollouts.own_decoder(model)
            own = quantized.quantize_traced if author == STUDENT and r.int8 else lambda params: params
            return jax.jit(lambda params, batch: rollout(decoder, own(params), batch, key, author=author, **options))

        self._write = {STUDENT: write(models.student, STUDENT)}
        if not models.is_self and len(models.teachers) == 1 and not models.teacher.cache:
            self._write[TEACHER] = write(models.teacher, TEACHER)
        cached = any(model.cache for model in models.teachers.values())  # of the data's text, not of this
        signal = (lambda inputs, batch: None) if cached else teachers.held_out_signal
        diagnostics = own_text.make_diagnostics(models.student.forward, signal, models.vocab)
        viewed = rollouts.make_view(e, models)
        only = lambda batch: batch._replace(weights=jnp.where(counted, batch.weights, 0))
        diagnose = lambda params, inputs, batch: diagnostics(params, inputs, viewed(only(batch)))
        self._diagnose = jax.jit(diagnose, out_shardings=replicated)
        fields = lambda written, batch: (
            written.tokens,
            written.weights,
            written.targets,
            prompts(batch, options["limits"])[1],
        )
        self._gather = jax.jit(fields, out_shardings=replicated)  # every process reads all of it

    def at(
        self, step: int, student: PyTree, teachers: Mapping[str, PyTree], inputs: tuple[PyTree, Any, PyTree]
    ) -> tuple[list[records.Row], records.Row, list[str]]:
        """Rows of samples.jsonl (at step 0 the teacher's too), the row of diagnostics.jsonl, degenerate rows.

        `inputs` are those of `Teachers.comparison`.
        """
        written = self._write[STUDENT](student, self.batch)
        own = self._texts(written)
        rows = [self._row(step, "student", i, prompt, ids) for i, (prompt, ids) in enumerate(own)]
        if step == 0 and TEACHER in self._write:
            other = self._texts(self._write[TEACHER](next(iter(teachers.values())), self.batch))
            rows += [self._row(step, "teacher", i, prompt, ids) for i, (prompt, ids) in enumerate(other)]
        values = metrics.read(self._diagnose(student, inputs, written))
        ids = [text for _, text in own]
        values |= {
            "tokens": sum(map(len, ids)) / len(ids),
            "ended": sum(bool(text) and text[-1] in self.ends for text in ids) / len(ids),
            **{f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)},
        }
        degenerate = [f"{row['domain']} {row['row']}" for row, text in zip(rows, ids) if own_text.is_degenerate(text)]
        return rows, records.diagnostics(step, values), degenerate

    def _texts(self, written: Any) -> list[tuple[list[int], list[int]]]:
        """Ids of each row's prompt and of what was written after it."""
        tokens, weights, targets, lengths = jax.device_get(self._gather(written, self.batch))
        n = len(self.sources)
        return [(tokens[i, : lengths[i]].tolist(), targets[i][weights[i] > 0].tolist()) for i in range(n)]

    def _row(self, step: int, author: str, i: int, prompt: list[int], ids: list[int]) -> records.Row:
        ended, decode = bool(ids) and ids[-1] in self.ends, self.tokenizer.decode
        return records.sample(step, author, *self.sources[i], decode(prompt), decode(ids), len(ids), ended)
