"""The command line: `jaxkd VERB --config=FILE:ARGUMENT --config.block.key=value`."""

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxkd.cli import arguments
from jaxkd.config.recipe import override, read_config, split
from jaxkd.config.schema import experiment
from jaxkd.run.workdir import claim, lock, saved_info, wait_for_lock, write_config
from jaxkd.runtime import cluster, files, multihost

Lines = Generator[str, None, None]  # what a verb prints, as it goes


def prepare(options: argparse.Namespace) -> Lines:
    """Build the packed rows of every domain, as `train` would."""
    from jaxkd.run import job, load

    built = job.build(job.fit_devices(experiment(read_config(options.recipe))))
    rows = load.domains(built.experiment.data, built.models.tokenizer)
    for p in rows.prepared:
        training = f"{p.train_rows:,}" + (f" of about {p.whole_rows:,}" if p.whole_rows > p.train_rows else "")
        yield (
            f"{p.name}: {training} training and {p.valid_rows:,} held-out rows from {p.documents:,} documents "
            f"({p.duplicates:,} duplicates dropped, {p.bad:,} bad records left out), "
            f"{'built in' if p.built else 'already in'} {p.path}"
        )


def train(options: argparse.Namespace) -> Lines:
    """Distil: evaluate, train with checkpoints, evaluate, report. The same command resumes."""
    started, e, workdir = time.time(), experiment(read_config(options.recipe)), Path(options.workdir)
    from jaxkd.report.records import write_run
    from jaxkd.run import job, load, loop, metadata, mixing, preflight, saved_student, teacher
    from jaxkd.runtime import compile_cache, profiling

    profile = profiling.parse_steps(options.profile)
    multihost.join(handles_sigterm=True)
    import jax

    built = job.build(e)
    with jax.set_mesh(built.mesh), contextlib.ExitStack() as held, multihost.abort_on_error():
        if not (workdir / "checkpoints").exists():  # the checkpoint's mixture needs no other run
            mixing.check_rule(built.rule, len(e.data.domains))
        take: Callable[[], list[Any]] = lambda: [
            claim(workdir, e, options.accept_changes),
            held.enter_context(lock(workdir)),
        ]
        changes, mark = multihost.broadcast("workdir", take)
        wait_for_lock(workdir, mark)
        if (directory := compile_cache.configure(workdir / "programs", jax.default_backend())) is not None:
            yield f"compiled programs: {directory}"
        yield from (f"mesh: {note}" for note in built.models.notes)
        rows = load.domains(e.data, built.models.tokenizer)
        with multihost.interruptible("stopped by a signal before the first step: the same command starts over"):
            run = held.enter_context(contextlib.closing(loop.Run(built, workdir, rows, multihost.print_main, started)))
            yield from (f"changed: {change}" for change in changes)
            if multihost.is_main():
                write_config(workdir, e)
                saved_student.save(workdir, built.models)
                layers = run.kept_layers or (saved_info(workdir).student.kept_layers if run.resumed else ())
                memory = teacher.bytes_per_device(run.teacher_params)
                record = metadata.info(built, rows, layers, memory, options.command)
                write_run(workdir, record)
                yield from metadata.model_lines(e.teacher, record, built.models.student.source_layers)
            if not run.resumed and not options.no_check:
                with run.phases.during("check"):
                    for line in preflight.run(run.loaded(), run.stores, e, built.mesh):
                        yield f"check: {line}"
        finished = run.go(profile)
    if multihost.is_main():
        yield from _outcome(workdir, run.start if finished else None)
    if not finished:
        raise SystemExit(cluster.EXIT_STOPPED)


def _outcome(workdir: Path, start: dict[str, float] | None) -> Iterator[str]:
    """What a run prints at its end; `start` is the nats per token at step 0 of a finished one, None if it stopped."""
    from jaxkd.evals import compare
    from jaxkd.report import goodput, mixture, records
    from jaxkd.report import run as report

    if start is not None:
        evaluations = records.rows(workdir, records.EVALS)
        last = max(row["step"] for row in evaluations)
        yield compare.table([row for row in evaluations if row["step"] == last], start)
        if cost := mixture.cost(records.rows(workdir, records.MIXTURE)):
            yield cost
    yield goodput.sentence(files.read_jsonl(workdir / "goodput.jsonl"))
    page = report.write(workdir) if records.rows(workdir, records.METRICS) else "none before step 1"
    yield f"report: {page}"
    yield f"all output: {workdir}/ (metrics.jsonl, evals.jsonl, checkpoints/, tensorboard/)"


def plan(options: argparse.Namespace) -> Lines:
    """Compile a run's step for TPUs that are not attached: memory, communication, time, settings that fit."""
    e = experiment(read_config(options.recipe))
    from jaxkd.planning import plan as planning
    from jaxkd.planning import plan_report, sampling, search
    from jaxkd.planning import topology as topologys
    from jaxkd.runtime import compile_cache

    topology = topologys.topology(options.topology, options.slices)
    if options.suggest and options.sampling:
        raise ValueError("--sampling plans the recipe's own mesh: give it without --suggest")
    with compile_cache.disabled():
        if options.suggest:
            suggested = search.suggest(
                e, topology, options.budget, lambda line: print(line, file=sys.stderr, flush=True)
            )
            values, text = suggested.json(), suggested.lines()
        else:
            planned = planning.plan(planning.build(e, planning.devices(topology)), topology)
            values, text = planned.json(), plan_report.lines(planned)
            if options.sampling:
                written = sampling.plan(planned)
                values, text = values | {"sampling": written.json()}, [*text, *written.lines()]
    yield json.dumps(values) if options.json else "\n".join(text)


def cache(options: argparse.Namespace) -> Lines:
    """Store the teacher's signal for every row, to train from it without the teacher. The same command resumes."""
    e = experiment(read_config(options.recipe))
    if not (e.teacher.cache or (options.verify and any(model.cache for model in e.teacher.models.values()))):
        raise ValueError("teacher.cache is empty: set --config.teacher.cache=DIRECTORY and teacher.signal")
    from jaxkd.run import cache_teacher, job, load

    if options.verify:
        yield from cache_teacher.verify(e.teacher)
        return
    multihost.join()
    import jax

    built = job.build(e)
    with jax.set_mesh(built.mesh), multihost.abort_on_error():
        rows = load.domains(e.data, built.models.tokenizer)
        yield from cache_teacher.write(e, built.models, built.mesh, rows)


def check(options: argparse.Namespace) -> Lines:
    """Check everything that a run depends on, before it takes an accelerator."""
    e = experiment(read_config(options.recipe))
    from jaxkd.run import cache_teacher, job, load, mixing, preflight

    multihost.join()
    import jax

    built = job.build(job.fit_devices(e))
    e, models = built.experiment, built.models
    mixing.check_rule(built.rule, len(e.data.domains))
    with jax.set_mesh(built.mesh), multihost.abort_on_error():
        rows = load.domains(e.data, models.tokenizer)
        loaded, stores = preflight.prepare(e, models, rows)
        yield "check: the models' tokenizers and vocabularies agree"
        for line in cache_teacher.verify(e.teacher) if multihost.is_main() else ():
            yield f"check: {line}"
        for line in preflight.run(loaded, stores, e, built.mesh):
            yield f"check: {line}"
        yield from cache_teacher.costs(e, models, rows, stores)


def sweep(options: argparse.Namespace) -> Lines:
    """Train variants of a recipe times seeds, one after another. The same command skips finished runs and resumes."""
    from jaxkd.cli import sweep as sweeps

    workdir = Path(options.workdir)
    lines = [*options.run, *(sweeps.read_runs(Path(options.runs)) if options.runs else [])]
    runs = sweeps.plan(options.config, options.recipe[1:], workdir, options.variants, lines, options.seeds)
    if options.print:
        yield from sweeps.printed(runs, workdir)
    elif code := sweeps.run_all(runs, workdir, lambda line: print(line, flush=True)):
        raise SystemExit(code)


def rollback(options: argparse.Namespace) -> Lines:
    """Go back to a checkpoint: move later ones aside, so that `train` resumes from it."""
    from jaxkd.run import rollback as rollbacks

    yield from rollbacks.go(Path(options.workdir), options.step)


def evaluate(options: argparse.Namespace) -> Lines:
    """Evaluate a run's student, or any model: against a teacher on held-out rows or text of your own, or on tasks."""
    if bool(options.workdir) == bool(options.model):
        raise ValueError("give --workdir DIR, or --model PATH with --teacher PATH and --data SOURCE")
    if options.tasks:
        yield from _evaluate_tasks(options)
        return
    if options.json or options.output:
        raise ValueError("--json and --output are for --tasks")
    if options.model and not (options.teacher and options.data):
        raise ValueError("--model needs --teacher PATH and --data SOURCE, or --tasks FILE")
    if options.workdir and options.teacher:
        raise ValueError("--teacher is for --model: a run is evaluated against its own teacher")
    if options.model and options.step:
        raise ValueError("--step is for --workdir: a model has no checkpoints")
    from jaxkd.run import evaluate as evaluation
    from jaxkd.run import saved_student

    saved = saved_student.located_experiment(Path(options.workdir)) if options.workdir else None

    multihost.join(single_ok=True)
    if saved is None:
        values = evaluation.values_of_models(options.model, options.teacher)
        yield evaluation.of_models(override(values, options.recipe), options.data)
    else:
        values = override(evaluation.values_of_run(saved, options.data), options.recipe)
        log = not (options.data or options.recipe)
        yield evaluation.of_run(values, Path(options.workdir), options.step, options.data, log)


def _evaluate_tasks(options: argparse.Namespace) -> Lines:
    if options.teacher or options.data or options.recipe:
        raise ValueError("--tasks takes no --teacher, --data or --config: a task's file has its own settings")
    if options.model and options.step:
        raise ValueError("--step is for --workdir: a model has no checkpoints")
    from jaxkd.run import evaluate as evaluation

    _join_alone("evaluate --tasks")
    path = lambda name: Path(name) if name else None
    workdir, output = path(options.workdir), path(options.output)
    scores = evaluation.of_tasks(options.tasks, workdir, options.step, options.model, output)
    if options.json:
        yield from (json.dumps(score._asdict(), ensure_ascii=False) for score in scores)
    else:
        yield f"{scores[0].model}\n{evaluation.task_table(scores)}"


def _join_alone(verb: str) -> None:
    multihost.join(single_ok=True)
    if multihost.is_multihost():
        raise ValueError(f"`jaxkd {verb}` is one process's work: start it on one host with JAX_PLATFORMS=cpu")


def export(options: argparse.Namespace) -> Lines:
    """Write a run's student as a Hugging Face directory."""
    workdir = Path(options.workdir)
    from jaxkd.models import export as exporter
    from jaxkd.run import job, load, model_card, restore, saved_student

    _join_alone("export")
    import jax

    e = job.fit_devices(saved_student.located_experiment(workdir))
    keep_out = [workdir, *([Path(e.run.checkpoints)] if e.run.checkpoints and "://" not in e.run.checkpoints else [])]
    exporter.check_destination(options.output, options.overwrite, keep_out)
    mesh = job.build_mesh(e.run.mesh, jax.devices())
    with jax.set_mesh(mesh):
        models, _ = saved_student.open_run(e, workdir, mesh, with_teachers=False)
        step, student, _ = restore.student(e.run, workdir, models, load.frozen(e, models), options.step)
        host = jax.device_get(student)
    tokenizer = models.student.tokenizer or models.tokenizer
    directory = exporter.export(
        options.output,
        models.student.config,
        host,
        tokenizer_json=tokenizer.json,
        generation=tokenizer.generation,
        card=model_card.facts(e, workdir, step),
        dtype=options.dtype,
        overwrite=options.overwrite,
        keep_out=keep_out,
    )
    yield f"step {step} of {workdir} exported to {directory}"


def generate(options: argparse.Namespace) -> Lines:
    """Write text: a run's student, perhaps beside its teacher, or any model; on prompts, or as a conversation."""
    if bool(options.workdir) == bool(options.model):
        raise ValueError("give --workdir DIR, or --model PATH")
    if options.model and (options.step or options.beside_teacher):
        raise ValueError("--step and --beside-teacher are for a run's --workdir; --model is one model")
    if options.prompts and options.prompt:
        raise ValueError("give prompts on the command line or in a file with --prompts, not both")
    from jaxkd.run import generate as generation

    _join_alone("generate")
    source, given = Path(options.prompts or "standard input"), list(options.prompt)
    talk = options.chat and not given and not options.prompts
    if options.prompts and not source.is_file():
        raise FileNotFoundError(f"--prompts {source} does not exist")
    if not given and not talk:
        text = source.read_text(encoding="utf-8") if options.prompts else sys.stdin.read()
        given = generation.read_prompts(text.splitlines(), str(source))
        if not given:
            raise ValueError(f"no prompt in {source}: give one on the command line, in a file, or use --chat")
    if options.workdir:
        writers = generation.writers_of_run(Path(options.workdir), options.step, options.beside_teacher)
    else:
        writers = [generation.writer_of_model(options.model)]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    sampling = {name: getattr(options, name) for name in names}
    others = {name: getattr(options, name) for name in ("max_new_tokens", "n", "seed")} | {"stop": tuple(options.stop)}
    settings = lambda writer: generation.settings_of(writer, sampling, **others)
    if talk:
        generation.converse(writers[0], settings(writers[0]), options.system)
    else:
        shape = options.chat, options.system, options.json or options.logprobs, options.logprobs
        yield from generation.lines(writers, given, settings, *shape)


def report(options: argparse.Namespace) -> Lines:
    """Write report.html of a run, finished or not."""
    from jaxkd.report import run as reporter

    yield f"report: {reporter.write(Path(options.workdir))}"


def compare(options: argparse.Namespace) -> Lines:
    """Compare finished runs: mean and spread over seeds, per domain, and a page of curves."""
    from jaxkd.report import compare as comparison
    from jaxkd.report import compare_page

    directories = [Path(name) for name in options.directories]
    variants = comparison.gather(directories, options.baseline)
    page = compare_page.write(variants, Path(options.output) if options.output else directories[0] / "compare.html")
    if options.json:
        yield json.dumps(comparison.as_json(variants), indent=2)
    else:
        yield f"{comparison.text(variants)}\n\npage: {page}"


VERBS = {
    verb.__name__: verb
    for verb in (prepare, cache, check, plan, train, sweep, rollback, evaluate, generate, export, report, compare)
}


def main(line: Sequence[str]) -> None:
    """Run one verb, and print its lines on process 0."""
    rest, overrides = split(line)
    summaries = {name: (verb.__doc__ or "").splitlines()[0] for name, verb in VERBS.items()}
    options = arguments.parser(summaries).parse_args(rest)
    recipe = [f"--config={options.config}"] if getattr(options, "config", None) else []
    if overrides and not recipe and options.verb != "evaluate":
        raise ValueError(f"`jaxkd {options.verb}` takes no recipe: {overrides[0]} has no effect")
    if "://" in (workdir := str(getattr(options, "workdir", ""))):
        raise ValueError(f"--workdir {workdir} must be a directory (or a mounted bucket); run.checkpoints may be gs://")
    options.recipe, options.command = [*recipe, *overrides], shlex.join(["jaxkd", *line])
    # Closed, so that a verb's contexts end when printing fails.
    with contextlib.closing(VERBS[options.verb](options)) as lines:
        for text in lines:
            multihost.print_main(text)


def console(line: Sequence[str] | None = None) -> None:
    """Entry point: prints an error as one line and exits with its code."""
    try:
        main(sys.argv[1:] if line is None else line)
    except (Exception, KeyboardInterrupt) as error:
        raise SystemExit(multihost.fail(error)) from None


if __name__ == "__main__":
    console()
