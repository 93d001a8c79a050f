"""The training loop, from a run's first evaluation to its last."""

import contextlib
import itertools
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxkd.core import metrics, seeds
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import Batch, Metrics, PyTree
from jaxkd.data import loader, rules
from jaxkd.evals import compare
from jaxkd.losses import group_dro
from jaxkd.models import flops
from jaxkd.report import records
from jaxkd.run import load, preflight, program, restore, rollouts, samples
from jaxkd.run.job import Job
from jaxkd.run.mixing import Mixing, make_gradients, make_losses
from jaxkd.run.teacher import build_teacher, open_stores
from jaxkd.runtime import log, multihost
from jaxkd.runtime.phases import Phases
from jaxkd.runtime.profiling import Profile
from jaxkd.train import faults, guard, optim, replay
from jaxkd.train.state import TrainState, assemble, init_state


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Yields a poll for Ctrl-C and SIGTERM: whether to save and stop now, the same on all processes at the same poll.

    The first Ctrl-C is a request to stop; a second one raises KeyboardInterrupt.
    """
    requested, polls = False, itertools.count(1)

    def request(number: int, frame: Any) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        if multihost.is_multihost():
            signal.raise_signal(signal.SIGTERM)  # JAX passes it on to all processes

    def interrupt() -> bool:
        # JAX stops every process at the poll after the largest number that any of them had reached, compared by
        # equality: so numbers count this process's polls, from 1, and not steps.
        signalled = multihost_utils.reached_preemption_sync_point(next(polls))
        return signalled or (requested and not multihost.is_multihost())

    before = signal.signal(signal.SIGINT, request)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class _Stopped(Exception):
    """A signal came in the middle of an evaluation."""


class Run:
    """A training run: what it has loaded and how far it is; `go` trains it to the last step."""

    def __init__(
        self,
        job: Job,
        workdir: Path,
        rows: load.Domains,
        say: Callable[[str], None] = print,
        started: float | None = None,
    ):
        """Load the models, or restore the newest checkpoint; compile nothing yet.

        `say` prints a line; `started` is `time.time()` when the process began, None for now.
        """
        self.job, self.workdir, self.rows = job, workdir, rows
        self.seconds: list[float] = []  # per step of the current interval
        self.rule_s: float | None = None  # seconds that the rule took just before the next step
        e, models = job.experiment, job.models
        make_measure = make_gradients if job.rule.measures is rules.Gradients else make_losses
        measure = make_measure(models.student, models.vocab, rows, e.run, job.mesh)
        self.mixing = Mixing(job.rule, rows, e.data, job.lr, measure)
        self.stores = open_stores(e, models, rows.fingerprints)
        self.checkpoints = restore.writer(e.run, workdir)
        self.finished = False
        self.phases = Phases(workdir, e.run.stall_s, started or time.time(), jax.process_index())
        try:
            self._load(say)
            self.start = {row["domain"]: row["student_nats"] for row in self._evaluation(0)}
            self.step = program.jitted_step(job, self.teachers.train)
            self.rollouts = rollouts.jitted(e, models, job.mesh)
            self.comparison = self.teachers.comparison(models)
            count = samples.count(e)
            self.samples = samples.Samples(e, models, rows, self.teachers, job.mesh, count) if count else None
            self.flops = program.flops_of(e, models, job.objective.uses_teacher).model
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the checkpoints, whose threads would otherwise print after an error's own line."""
        self.checkpoints.close()
        self.phases.close(self.finished)

    def _load(self, say: Callable[[str], None]) -> None:
        """Load the teachers, and the state: the newest checkpoint's, or the initial one."""
        job, e = self.job, self.job.experiment
        newest = restore.recover(self.checkpoints, job.state, e, self.workdir)
        self.resumed, frozen = newest is not None, e.student.frozen
        weights = load.weights(job.models, e.student, self.rows, with_student=frozen or not self.resumed)
        self.teacher_params, self.kept_layers = weights.teachers, weights.kept_layers
        self.frozen = weights.student if frozen else {}
        if newest is None:
            self.mixing.first()
            self.state: TrainState = self._initial_state({} if frozen else weights.student)
            self.tokens = 0
        else:
            self.state, progress = newest.state, newest.progress
            if progress["rows"] != self.rows.fingerprints:
                changed = [n for n, f in self.rows.fingerprints.items() if progress["rows"].get(n) != f]
                raise ValueError(
                    f"the rows of {', '.join(changed) or 'some domains'} differ from those that {self.workdir} was "
                    "trained on: the text, the tokenizer or how rows are cut has changed; use a new --workdir"
                )
            self.mixing.restore(progress["mixture"])
            self.tokens = progress["tokens"]
            for line in [*newest.warnings, f"resuming at step {newest.step} of {e.run.steps}"]:
                say(line)
        self.teachers = build_teacher(e, job.models, self.teacher_params, self.stores, job.objective.uses_teacher)
        step = int(self.state.step)
        self.faults = faults.Faults(e.optim.skip_limit, step - int(optim.update_count(self.state.opt_state)))
        self.phases.restored(step)

    @property
    def student(self) -> PyTree:
        return assemble(self.state.params["student"], self.frozen)

    @property
    def average(self) -> PyTree:
        """Their running average, or the parameters themselves where none is kept."""
        return self.student if self.state.ema is None else assemble(self.state.ema, self.frozen)

    def loaded(self) -> preflight.Loaded:
        return preflight.Loaded(
            self.job.models, self.rows, self.teacher_params, self.teachers, self.student, self.average, self.comparison
        )

    def _initial_state(self, student: PyTree) -> TrainState:
        job, e = self.job, self.job.experiment

        def first(student: PyTree, key: jax.Array) -> TrainState:
            params = {"student": student, "objective": job.objective_init(key)}
            weights = group_dro.init(self.mixing.mixture.sampling) if job.rule.group_dro else None
            recent = None if job.state.recent is None else guard.init()
            texts = rollouts.initial_texts(e)
            return init_state(params, job.tx, e.teacher.is_self, weights, recent, texts)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, job.state)
        state = jax.jit(first, out_shardings=shardings)(student, seeds.key(e.run.seed))
        earlier = restore.objective_params(e.student.objective_from, job.state.params["objective"])
        return state._replace(params=state.params | {"objective": state.params["objective"] | earlier})

    def _progress(self) -> dict[str, Any]:
        """What a checkpoint holds beside the train state, as JSON values that keep every bit of floats."""
        progress = {"mixture": self.mixing.saved(), "tokens": self.tokens, "rows": self.rows.fingerprints}
        return progress | restore.identity(self.job.experiment)

    def _interval(self, step: int) -> Iterator[Batch]:
        """The current interval's rows from `step` on that are not read yet; nothing is read beyond the interval."""
        step += -step % self.job.experiment.run.rollout_every  # the others are in `state.texts`, written
        return loader.batches(
            self.rows.train,
            self.mixing.mixture,
            self.job.experiment.run.seed,
            self.job.experiment.data.batch,
            step,
            self.mixing.end,
            self.mixing.start,
            batch_sharding(self.job.mesh),
            self.teachers.train.host_features,
        )

    def _evaluation(self, step: int) -> list[compare.Row]:
        """Logged rows of a step's evaluation; "mean" is the last of a complete one."""
        read = lambda: [row for row in records.rows(self.workdir, records.EVALS) if row["step"] == step]
        return multihost.broadcast(f"evaluation of step {step}", read)

    def go(self, profile: tuple[int, int] = (0, 0)) -> bool:
        """Train to the last step; False when a signal stopped the run before it, with everything saved.

        `profile` is the first step to trace, and how many. FloatingPointError after too many losses or gradients that
        are not finite, none of which is saved; OSError for a checkpoint that cannot be written.
        """
        run, step = self.job.experiment.run, int(self.state.step)
        output = log.TrainLog(self.workdir, run.steps, step, self.mixing.start)
        trace = Profile(self.workdir / "profile", *profile)
        try:
            with interruptions() as interrupt, contextlib.closing(trace):
                stop = interrupt()
                if not stop and self._due(step) and "mean" not in [row["domain"] for row in self._evaluation(step)]:
                    output.restart_evaluation(step)
                    stop = self._evaluate(output, step, interrupt) is None
                if stop:
                    output.say("stopped by a signal before the first step: the same command starts over")
                    return False
                for row in self._evaluation(step):  # made before a checkpoint, or by a process that saved none after it
                    if row["domain"] == records.MEAN:
                        self._adapt(step, row["student_nats"])
                self.mixing.begin(self._evaluation(0))
                logged = [row["step"] for row in records.rows(self.workdir, records.MIXTURE)]
                if self.mixing.start not in logged:
                    output.mixture(self.mixing.line(self.tokens, group_dro.columns(self.state.group_dro)))
                with self.phases.during("steps"):
                    self.finished = self._steps(step, run, output, interrupt, trace)
            with self.phases.during("checkpoint"):
                self.checkpoints.wait()
                restore.mark(self.checkpoints, self.job.experiment.run, self.workdir)
            if not self.finished:
                at = f"step {int(self.state.step)} of {run.steps}"
                output.say(f"stopped by a signal: {at} is saved; the same command resumes from it")
            if self.finished and (weights := self.mixing.finish(self.state, self.workdir)):
                output.say(weights)
        finally:
            output.close()
        return self.finished

    def _steps(self, step: int, run, output: log.TrainLog, interrupt: Callable[[], bool], trace: Profile) -> bool:
        """Train; a step's metrics are fetched when the next step is dispatched and the batch after it is on devices."""
        waiting: tuple[int, Metrics] | None = None
        clock, batches = time.perf_counter(), None
        phase: contextlib.AbstractContextManager = self.phases.during("compile")  # of the first step
        if step < run.steps:
            output.compiling()
        while step < run.steps:
            if step == self.mixing.end:
                if waiting is not None:
                    self._record(output, *waiting, clock)
                batches, waiting = None, None
                with self.phases.during("mixture"):
                    rule_s = self.mixing.advance(self.student)
                    step_s = statistics.median(self.seconds) if self.seconds else None
                    weights = group_dro.columns(self.state.group_dro)
                    line = self.mixing.line(self.tokens, weights, rule_s, step_s)
                    output.mixture(line)
                    self.seconds, self.rule_s = [], line.get("rule_s")
                clock = time.perf_counter()
            batches = self._interval(step) if batches is None else batches
            with trace.step(step + 1), phase:
                batch, written = self._rows(step, batches)
                self.state, measured = self.step(self.state, self.frozen, self.teachers.train.state, batch)
                measured |= written
            phase = contextlib.nullcontext()
            if waiting is not None:
                clock = self._record(output, *waiting, clock)
            step, waiting = step + 1, (step + 1, measured)
            if trace.dispatched(step, measured):
                output.say(f"profile: steps up to {step} are traced in {self.workdir / 'profile'}")
            stop = interrupt()
            save = step == run.steps or step % run.checkpoint_every == 0
            if stop or save or self._due(step):
                # Checks the step's metrics first: a state whose loss is NaN must not be saved.
                clock = self._record(output, *waiting, clock)
                waiting = None
                held_out_nats = None
                # After a signal there is no time for an evaluation; the resumed run makes it.
                if self._due(step) and not stop:
                    held_out_nats = self._evaluate(output, step, interrupt)
                    stop = held_out_nats is None
                if stop or save:
                    output.flush()
                    with self.phases.during("checkpoint"):
                        self.checkpoints.save(step, self.state, self._progress(), held_out_nats)
                        restore.mark(self.checkpoints, self.job.experiment.run, self.workdir)
                clock = time.perf_counter()
            if stop:
                return False
        return True

    def _rows(self, step: int, batches: Iterator[Batch]) -> tuple[Batch, Metrics]:
        """The batch of a step, with the text that models write for it, and that text's metrics."""
        if self.rollouts is None:
            return next(batches), {}
        e, state, texts = self.job.experiment, self.state, self.state.texts
        count, written = e.run.rollout_every, None
        if step % count == 0:
            rows = tuple(next(batches) for _ in range(count))
            params = rollouts.params(e, self.student, self.teacher_params)
            written, texts = self.rollouts.write(params, rows, state.step, texts)
            self.state = state._replace(texts=texts)
        return self.rollouts.pick(texts.window, step % count) if written is None else written

    def _adapt(self, step: int, nats: float) -> None:
        """Move the share of the student's text by the mean loss of a step's evaluation (data.rollout.adaptive)."""
        if rise := self.job.experiment.data.rollout.adaptive:
            texts = self.state.texts
            self.state = self.state._replace(texts=texts._replace(replay=replay.adapt(texts.replay, step, nats, rise)))

    def _due(self, step: int) -> bool:
        run = self.job.experiment.run
        return step in (0, run.steps) or (run.eval_every > 0 and step % run.eval_every == 0)

    def _record(self, output: log.TrainLog, step: int, measured: Metrics, clock: float) -> float:
        """Fetch a step's metrics, log and check them; returns the time at which they had arrived."""
        self.checkpoints.check()
        values = metrics.read(measured)
        now = time.perf_counter()
        skipped = values.pop("skipped") > 0
        tokens = values.pop("tokens", 0)
        tokens = int(tokens) if math.isfinite(tokens) else 0
        self.tokens += tokens
        seconds = now - clock
        kind = self.job.mesh.devices.flat[0].device_kind
        more: dict[str, Any] = dict(flops.rates(self.flops, seconds, self.job.mesh.size, kind))
        self.seconds.append(seconds)
        if self.mixing.rule.measures:
            sampling = self.mixing.mixture.sampling.tolist()
            more |= {f"share/{name}": share for name, share in zip(self.rows.names, sampling, strict=True)}
        if self.rule_s is not None:  # not part of the times
            more["rule_s"], self.rule_s = self.rule_s, None
        broken = skipped or not math.isfinite(values["param_norm"])
        rows = faults.suspects(values, self._drawn(step)) if broken else {}
        more |= {"skipped": self.faults.total + 1} if skipped else {}
        more |= {"rows": rows} if broken else {}
        row = records.training(step, values, tokens=self.tokens, tokens_per_s=tokens / seconds, step_s=seconds, **more)
        output.step(row, broken or step % self.job.experiment.run.log_every == 0)
        self.phases.stepped(step, seconds, skipped)
        self.faults.record(step, values, skipped, rows, self.checkpoints.latest)
        return now

    def _drawn(self, step: int) -> dict[str, list[int]]:
        """Rows of a step of the current interval, by domain."""
        e, mixing = self.job.experiment, self.mixing
        interval = step - 1, mixing.end, mixing.start
        domain, row = loader.step_rows(self.rows.sizes, mixing.mixture, e.run.seed, e.data.batch, *interval)
        by_domain = {name: sorted(row[domain == d].tolist()) for d, name in enumerate(self.rows.names)}
        return {name: rows for name, rows in by_domain.items() if rows}

    def _evaluate(self, output: log.TrainLog, step: int, interrupt: Callable[[], bool]) -> float | None:
        """Evaluate and log; returns the student's mean loss, which ranks checkpoints, or None after a signal."""
        params, inputs = self.student, (self.teachers.evaluate.state, self.state.step, self.average)

        def sums(batch: Batch) -> compare.Sums:
            if interrupt():
                raise _Stopped
            self.phases.alive()
            return self.comparison(params, inputs, batch)

        size, sharding = self.job.experiment.run.eval_batch, batch_sharding(self.job.mesh)
        start = None if step == 0 else self.start
        try:
            with self.phases.during("evaluation"):
                held_out = load.held_out(self.rows, size, sharding, self.teachers.evaluate.host_features)
                # The gap to a teacher that moves cannot be closed.
                rows = compare.evaluate(sums, held_out, step, {} if self.job.models.is_self else start)
        except _Stopped:
            return None
        if step == 0:
            self.start = {row["domain"]: row["student_nats"] for row in rows}
        if self.samples is not None:
            with self.phases.during("evaluation"):
                texts, figures, degenerate = self.samples.at(step, params, self.teacher_params, inputs)
            output.samples(texts, figures)
            if degenerate:
                output.say(
                    f"step {step}: the student's text is degenerate after the prompts of {', '.join(degenerate)}"
                )
        output.evaluation(rows)
        mean = rows[-1]
        self._adapt(step, mean["student_nats"])
        if step < self.job.experiment.run.steps:
            output.say(
                f"step {step}: student {mean['student_nats']:.3f} nats/token (teacher {mean['teacher_nats']:.3f}), "
                f"KL {mean['kl']:.3f}, agreement {mean['agreement']:.1%}"
            )
        return mean["student_nats"]
