"""The mixture of a run: what its rule measures at an interval's end, and the shares that follow."""

import math
import operator
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core import schedules
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import PyTree
from jaxkd.data import loader, mixture, rules
from jaxkd.data.mixture import Mixture
from jaxkd.evals import compare
from jaxkd.losses import group_dro
from jaxkd.run import job as jobs
from jaxkd.run import load
from jaxkd.run.job import Job
from jaxkd.runtime import files, multihost
from jaxkd.train.state import TrainState


class Mixing:
    """The mixture of the present interval, and the rule that gives the next one."""

    mixture: Mixture  # from `first` or `restore` on

    def __init__(self, job: Job, rows: load.Domains):
        """Compile and decide nothing yet.

        Args:
            job: for the rule.
            rows: prepared.
        """
        self._job, self._rows = job, rows
        self.rule = jobs.rule(job)
        scoring = compare.make_scoring(job.student.forward, job.tokenizer.vocab)
        self._scoring = jax.jit(scoring)
        slope = jax.grad(lambda params, batch: operator.truediv(*scoring(params, batch)))
        self._slope = jax.jit(slope, out_shardings=job.student.shardings)
        self._product = jax.jit(lambda a, b: jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b)))
        self.gaps: rules.Gaps | None = None  # the newest of this process

    def first(self) -> None:
        """The mixture before the first step.

        Raises:
            ValueError, FileNotFoundError: when the rule does not fit the domains, or what it reads is not there.
        """
        if self.rule.measures is rules.Gaps:
            # Such a rule begins once the first evaluation is there; until then the pool is as it is.
            self.mixture = mixture.init(mixture.natural(self._rows.whole))
        else:
            sampling, state = self.rule.init(self._rows.whole, None)
            self.mixture = mixture.init(sampling)._replace(rule_state={"rule": state})
        self._agree()

    def _agree(self) -> None:
        """Take the mixture of process 0: rows are drawn from it, and a last bit may differ between hosts."""
        if multihost.is_multihost():
            self.restore(multihost.broadcast("mixture", self.saved))

    @property
    def start(self) -> int:
        """The present interval's first step."""
        return self.mixture.interval * self._job.experiment.data.interval

    @property
    def end(self) -> int:
        """The next interval's first step."""
        return self.start + self._job.experiment.data.interval

    @property
    def _count(self) -> int:
        """Rows in an interval."""
        data = self._job.experiment.data
        return data.interval * data.batch

    def saved(self) -> dict[str, Any]:
        """The mixture as JSON values; floats keep every bit."""
        m = self.mixture
        drawn = {"sampling": m.sampling.tolist(), "drawn": m.drawn.tolist()}
        return {**drawn, "rule_state": m.rule_state, "interval": m.interval}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `saved` gave."""
        sampling, drawn = np.asarray(saved["sampling"], np.float64), np.asarray(saved["drawn"], np.int64)
        self.mixture = Mixture(sampling, saved["rule_state"], drawn, saved["interval"])

    def begin(self, evaluation: Sequence[Mapping[str, Any]]) -> None:
        """The first state of a rule that measures gaps, unless it has one.

        Args:
            evaluation: rows of the one before the first step, a domain each.
        """
        if self.mixture.rule_state:
            return
        found = {row["domain"]: row for row in evaluation}
        column = lambda key: np.asarray([found[name][key] for name in self._rows.names], np.float64)
        self.gaps = start = rules.Gaps(*(column(key) for key in rules.Gaps._fields))
        sampling, state = self.rule.init(self._rows.whole, start)
        # The teacher's losses are measured once; bytes a token are the same for every student.
        known = {"teacher_nats": start.teacher_nats, "teacher_bits_per_byte": start.teacher_bits_per_byte}
        known["bits_per_nat"] = start.student_bits_per_byte / start.student_nats
        state = {"rule": state, **{name: values.tolist() for name, values in known.items()}}
        self.mixture = self.mixture._replace(sampling=sampling, rule_state=state)
        self._agree()

    def advance(self, params: PyTree) -> float:
        """Go on to the next interval, from what the student knows at its beginning.

        Args:
            params: the student's.

        Returns:
            Seconds that this took, the wait for the steps before it left out.
        """
        if self.rule.measures:
            jax.block_until_ready(params)
        began = time.perf_counter()
        kept, interval = self.mixture.rule_state, self.mixture.interval + 1
        measured: Any = None
        if self.rule.measures is rules.Gradients:
            measured = self._gradients(params, interval)
        elif self.rule.measures:
            measured = self.gaps = self._gaps(params)
        sampling, state = self.rule.update(kept["rule"], measured, interval)
        self.mixture = mixture.advance(self.mixture, self._count, sampling)._replace(rule_state=kept | {"rule": state})
        self._agree()
        return time.perf_counter() - began

    def _gradients(self, params: PyTree, interval: int) -> rules.Gradients:
        """Products of the domains' gradients: a backward pass on training rows of each, over the whole mesh."""
        job, count = self._job, len(self._rows.names)
        size, place = job.experiment.run.eval_batch, batch_sharding(job.mesh)
        where, found = loader.local_rows(size, place), []
        for d, rows in enumerate(self._rows.train):
            row = mixture.probe(d, len(rows), job.experiment.run.seed, interval, size)[where]
            local = loader.read_rows(self._rows.train, np.full(len(row), d), row)
            found.append(self._slope(params, loader.to_devices(local, size, where, place)))
        pairs = [(i, j) for i in range(count) for j in range(i + 1)]
        products = np.zeros((count, count))
        for (i, j), value in zip(pairs, jax.device_get([self._product(found[i], found[j]) for i, j in pairs])):
            products[i, j] = products[j, i] = value
        return rules.Gradients(products, float(schedules.value(job.lr, interval * job.experiment.data.interval)))

    def _gaps(self, params: PyTree) -> rules.Gaps:
        """The student's losses on the held-out rows, sharded over the whole mesh, beside what the teacher's were."""
        nats, kept = [], self.mixture.rule_state
        for batches in load.held_out(self._job, self._rows).values():
            sums = jax.device_get([self._scoring(params, batch) for batch, _ in batches])
            nats.append(math.fsum(float(v) for v, _ in sums) / math.fsum(float(n) for _, n in sums))
        student = np.asarray(nats)
        teacher, teacher_bits, factor = (
            np.asarray(kept[name]) for name in ("teacher_nats", "teacher_bits_per_byte", "bits_per_nat")
        )
        return rules.Gaps(student, teacher, student * factor, teacher_bits)

    def finish(self, state: TrainState, workdir: Path) -> str:
        """Store what a proxy run is for, the average of its weights; returns a line on it, empty for other rules."""
        moving = group_dro.columns(state.group_dro) or self.mixture.rule_state["rule"]
        average = np.asarray(moving.get("average", []), np.float64)
        if not average.size:
            return ""
        weights = dict(zip(self._rows.names, (average / average.sum()).tolist(), strict=True))
        told = {"mixture": self._job.experiment.data.mixture, "steps": int(state.step), "weights": weights}
        target = workdir / rules.DOMAIN_WEIGHTS
        if multihost.is_main():
            files.write_json(target, told)
        spelled = ",".join(f"{name}={weight:.4f}" for name, weight in weights.items())
        return f"weights of the domains, averaged: {spelled}; to draw by them: data.mixture='doremi(\"{workdir}\")'"

    def line(
        self,
        tokens: int,
        weights: Mapping[str, Sequence[float]] | None = None,
        seconds: float | None = None,
        step_s: float | None = None,
    ) -> dict[str, Any]:
        """What `mixture.jsonl` says of the present interval.

        Args:
            tokens: trained on before it.
            weights: of the domains in the loss, as from `group_dro.columns`.
            seconds: that the rule took for it; None for the first interval.
            step_s: seconds of a step of the interval before, the median; None where this process made none.
        """
        m = self.mixture
        row: dict[str, Any] = {"step": self.start, "interval": m.interval, "tokens": tokens}
        columns: dict[str, Sequence[Any]] = {
            "share": m.sampling.tolist(),
            "rows": mixture.counts(m.sampling, self._count).tolist(),
            "drawn": m.drawn.tolist(),
            "epochs": (m.drawn / [len(rows) for rows in self._rows.train]).tolist(),
        }
        if self.gaps is not None:
            columns["ratio"] = np.exp(self.gaps.student_nats - self.gaps.teacher_nats).tolist()
        columns |= weights or {}
        for key, values in columns.items():
            row |= {f"{key}/{name}": value for name, value in zip(self._rows.names, values, strict=True)}
        if seconds is not None and self.rule.measures:
            row["rule_s"] = seconds
            if step_s is not None:
                row["rule_share"] = seconds / (seconds + step_s * self._job.experiment.data.interval)
        return row
