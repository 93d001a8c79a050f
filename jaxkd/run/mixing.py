"""A run's mixture: what its rule measures at an interval's end, and the shares of the next interval."""

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxkd.config.schema import DataBlock, RunBlock
from jaxkd.core import schedules
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import PyTree, Scalar
from jaxkd.data import loader, mixture, rules
from jaxkd.data.mixture import Mixture
from jaxkd.evals import compare
from jaxkd.losses import group_dro
from jaxkd.report import records
from jaxkd.run import load
from jaxkd.run.open_models import Model
from jaxkd.runtime import files, multihost
from jaxkd.train.state import TrainState

Measure = Callable[[PyTree, int], np.ndarray]  # (student's parameters, interval) -> values per domain or pair of them


def make_losses(student: Model, vocab: int, rows: load.Domains, run: RunBlock, mesh: Mesh) -> Measure:
    """The student's nats per token on the held-out rows of each domain, [domains]; the whole mesh shares the rows."""
    scoring = jax.jit(compare.make_scoring(student.forward, vocab))

    def losses(params: PyTree, interval: int) -> np.ndarray:
        nats = []
        for batches in load.held_out(rows, run.eval_batch, batch_sharding(mesh)).values():
            sums = jax.device_get([scoring(params, batch) for batch, _ in batches])
            nats.append(math.fsum(float(v) for v, _ in sums) / math.fsum(float(n) for _, n in sums))
        return np.asarray(nats)

    return losses


def make_gradients(student: Model, vocab: int, rows: load.Domains, run: RunBlock, mesh: Mesh) -> Measure:
    """Inner products of the domains' loss gradients, [domains domains], of `run.eval_batch` training rows each."""
    scoring = compare.make_scoring(student.forward, vocab)
    gradient = jax.jit(
        jax.grad(lambda params, batch: operator.truediv(*scoring(params, batch))), out_shardings=student.shardings
    )
    product = jax.jit(lambda a, b: jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b)))
    size, sharding = run.eval_batch, batch_sharding(mesh)

    def products(params: PyTree, interval: int) -> np.ndarray:
        local, gradients = loader.local_rows(size, sharding), []
        for d, train in enumerate(rows.train):
            row = mixture.probe(d, len(train), run.seed, interval, size)[local]
            values = loader.read_rows(rows.train, np.full(len(row), d), row)
            gradients.append(gradient(params, loader.to_devices(values, size, local, sharding)))
        pairs = [(i, j) for i in range(len(gradients)) for j in range(i + 1)]
        matrix = np.zeros((len(gradients), len(gradients)))
        for (i, j), value in zip(pairs, jax.device_get([product(gradients[i], gradients[j]) for i, j in pairs])):
            matrix[i, j] = matrix[j, i] = value
        return matrix

    return products


def check_rule(rule: rules.Rule, domains: int) -> None:
    """Compute the first shares of a rule that measures nothing: raises where a run that it reads is missing."""
    if not rule.measures:
        rule.init([1] * domains, None)


class Mixing:
    """The mixture of the present interval, and the rule that gives the next one."""

    mixture: Mixture  # set by `first` or `restore`

    def __init__(self, rule: rules.Rule, rows: load.Domains, data: DataBlock, lr: Scalar, measure: Measure):
        """`measure` is `make_gradients` or `make_losses`, as the rule asks; it is compiled when first called."""
        self.rule, self._rows, self._data, self._lr, self._measure = rule, rows, data, lr, measure
        self.gaps: rules.Gaps | None = None  # as last measured by this process

    def first(self) -> None:
        if self.rule.measures is rules.Gaps:
            # Such a rule starts from the first evaluation (`begin`); until then the domains' own sizes count.
            self.mixture = mixture.init(mixture.natural(self._rows.whole))
        else:
            sampling, state = self.rule.init(self._rows.whole, None)
            self.mixture = mixture.init(sampling)._replace(rule_state={"rule": state})
        self._agree()

    def _agree(self) -> None:
        """Take the mixture of process 0: all hosts must draw the same rows, and last bits may differ between them."""
        if multihost.is_multihost():
            self.restore(multihost.broadcast("mixture", self.saved))

    @property
    def start(self) -> int:
        """The current interval's first step."""
        return self.mixture.interval * self._data.interval

    @property
    def end(self) -> int:
        return self.start + self._data.interval

    def saved(self) -> dict[str, Any]:
        """The mixture as JSON values; floats keep every bit."""
        m = self.mixture
        drawn = {"sampling": m.sampling.tolist(), "drawn": m.drawn.tolist()}
        return {**drawn, "rule_state": m.rule_state, "interval": m.interval}

    def restore(self, saved: Mapping[str, Any]) -> None:
        sampling, drawn = np.asarray(saved["sampling"], np.float64), np.asarray(saved["drawn"], np.int64)
        self.mixture = Mixture(sampling, saved["rule_state"], drawn, saved["interval"])

    def begin(self, evaluation: Sequence[Mapping[str, Any]]) -> None:
        """The initial state of a rule that measures gaps, unless it has one; from the rows of step 0's evaluation."""
        if self.mixture.rule_state:
            return
        rows = {row["domain"]: row for row in evaluation}
        column = lambda key: np.asarray([rows[name][key] for name in self._rows.names], np.float64)
        self.gaps = start = rules.Gaps(*(column(key) for key in rules.Gaps._fields))
        sampling, state = self.rule.init(self._rows.whole, start)
        # The teacher's losses are measured once; bytes per token do not depend on the student.
        constants = {"teacher_nats": start.teacher_nats, "teacher_bits_per_byte": start.teacher_bits_per_byte}
        constants["bits_per_nat"] = start.student_bits_per_byte / start.student_nats
        state = {"rule": state, **{name: values.tolist() for name, values in constants.items()}}
        self.mixture = self.mixture._replace(sampling=sampling, rule_state=state)
        self._agree()

    def advance(self, params: PyTree) -> float:
        """Start the next interval, with what the rule measures of the student's parameters.

        Returns the seconds that this took, without the wait for the steps before it.
        """
        if self.rule.measures:
            jax.block_until_ready(params)
        began = time.perf_counter()
        stored, interval = self.mixture.rule_state, self.mixture.interval + 1
        measured: Any = None
        if self.rule.measures is rules.Gradients:
            lr = float(schedules.value(self._lr, interval * self._data.interval))
            measured = rules.Gradients(self._measure(params, interval), lr)
        elif self.rule.measures:  # the student's losses now, beside the teacher's of the first evaluation
            teacher, teacher_bits, factor = (
                np.asarray(stored[name]) for name in ("teacher_nats", "teacher_bits_per_byte", "bits_per_nat")
            )
            student = self._measure(params, interval)
            measured = self.gaps = rules.Gaps(student, teacher, student * factor, teacher_bits)
        sampling, state = self.rule.update(stored["rule"], measured, interval)
        advanced = mixture.advance(self.mixture, self._data.interval * self._data.batch, sampling)
        self.mixture = advanced._replace(rule_state=stored | {"rule": state})
        self._agree()
        return time.perf_counter() - began

    def finish(self, state: TrainState, workdir: Path) -> str:
        """Write a proxy run's averaged domain weights; returns a line for the console, "" for other rules."""
        moving = group_dro.columns(state.group_dro) or self.mixture.rule_state["rule"]
        average = np.asarray(moving.get("average", []), np.float64)
        if not average.size:
            return ""
        weights = dict(zip(self._rows.names, (average / average.sum()).tolist(), strict=True))
        result = {"mixture": self._data.mixture, "steps": int(state.step), "weights": weights}
        if multihost.is_main():
            files.write_json(workdir / rules.DOMAIN_WEIGHTS, result)
        spelled = ",".join(f"{name}={weight:.4f}" for name, weight in weights.items())
        return f"weights of the domains, averaged: {spelled}; to draw by them: data.mixture='doremi(\"{workdir}\")'"

    def line(
        self,
        tokens: int,
        weights: Mapping[str, Sequence[float]] | None = None,
        seconds: float | None = None,
        step_s: float | None = None,
    ) -> dict[str, Any]:
        """The current interval's row of `mixture.jsonl`.

        `weights` in the loss are as from `group_dro.columns`; `seconds` is what `advance` took, None for the first
        interval; `step_s` the median seconds of the previous interval's steps, None where this process made none.
        """
        m = self.mixture
        columns: dict[str, Sequence[Any]] = {
            "share": m.sampling.tolist(),
            "rows": mixture.counts(m.sampling, self._data.interval * self._data.batch).tolist(),
            "drawn": m.drawn.tolist(),
            "epochs": (m.drawn / self._rows.sizes).tolist(),
        }
        if self.gaps is not None:
            columns["ratio"] = np.exp(self.gaps.student_nats - self.gaps.teacher_nats).tolist()
        columns |= weights or {}
        by_domain = {key: dict(zip(self._rows.names, values, strict=True)) for key, values in columns.items()}
        times = {}
        if seconds is not None and self.rule.measures:
            times["rule_s"] = seconds
            if step_s is not None:
                times["rule_share"] = seconds / (seconds + step_s * self._data.interval)
        return records.interval(self.start, m.interval, tokens, by_domain, **times)
