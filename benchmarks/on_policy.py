"""On-policy and off-policy distillation of the same small student, on problems with answers and on dialogue.

    python benchmarks/on_policy.py --directory DIR --task sums --json

benchmarks/README.md says what is trained and how to read the rows. Finished runs in DIR are not made again.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from _on_policy_recipe import METHODS  # noqa: E402
from losses import _show  # noqa: E402

SMOLLM2 = "smollm2-135m-instruct"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, of so many seeds
OWN_PROMPTS = 100


class Task(NamedTuple):
    """What is learned, by whom, and for how long."""

    teacher: str  # layers of SmolLM2 that labels train as the teacher, or all; empty: SmolLM2 as it is
    student: str
    score: str
    length: int
    batch: int
    teacher_steps: int
    start_steps: int
    steps: int
    rate: float
    new_tokens: int  # of an answer


LAYERS = ",".join(map(str, [*range(14), *range(24, 30)]))
TASKS = {
    "sums": Task("all", LAYERS, "greedy exact", 24, 16, 300, 200, 60, 3e-4, 8),
    "dialogue": Task("", "0,1,2,11,28,29", "greedy rougeL", 96, 8, 0, 100, 40, 3e-4, 32),
}
# Two numbers of one or two digits. The couple of hundred problems of one digit come early among the different ones, and
# the first `EARLY` are left out, so that the splits are of one kind.
PROBLEM: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
EARLY = 500
COUNTS = {"student": 1000, "teacher": 8000, "test": 300, "valid": 200}
# Turns as they are, so that a row is the problem and not SmolLM2's system prompt.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% else %}\n{% endif %}{% endfor %}"
)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="for data, models and runs")
    parser.add_argument("--task", choices=list(TASKS), default="sums")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, each from a start of its own")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    return parser.parse_args()


def _say(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _problems() -> Iterator[tuple[str, str]]:
    """Questions and answers of reasoning-gym's chain_sum, each question once."""
    import reasoning_gym

    entries = reasoning_gym.create_dataset("chain_sum", seed=0, size=40_000, **PROBLEM)
    unique = {entry["question"].strip(): str(entry["answer"]) for entry in entries}
    yield from list(unique.items())[EARLY:]


def _dialogues() -> Iterator[tuple[str, str]]:
    """Questions and the first answer to each."""
    from jaxkd.data import builtin

    unique: dict[str, str] = {}
    for document in builtin.BUILTIN["dialogue"].documents():
        question, answer, *_ = [*document.text.split("\n"), ""]
        if answer:
            unique.setdefault(question, answer)
    pairs = list(unique.items())
    random.Random(0).shuffle(pairs)
    yield from pairs


def _conversation(question: str, answer: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "teacher_context": f"The answer is {answer}."}


def make_data(name: str, directory: Path) -> None:
    """JSON Lines of each split, no question in two of them, and a file of tasks (docs/tasks.md)."""
    directory.mkdir(parents=True, exist_ok=True)
    sums = name == "sums"
    counts = COUNTS if sums else {"test": 200, "valid": 100, "student": 600}
    pairs = _problems() if sums else _dialogues()
    splits = {split: [pair for _, pair in zip(range(count), pairs)] for split, count in counts.items()}
    for split, chosen in splits.items():
        random.Random(0).shuffle(chosen)
        _write(directory / f"{split}.jsonl", [_conversation(*pair) for pair in chosen])
    asked = [{"messages": _conversation(q, a)["messages"][:1], "answer": a} for q, a in splits["test"]]
    common = {"kind": "exact" if sums else "rouge", "max_new_tokens": TASKS[name].new_tokens}
    drawn = {"task": "drawn", **common, "temperature": 1.0, "n": 8 if sums else 4} | ({"k": [1, 4, 8]} if sums else {})
    _write(directory / "tasks.jsonl", [{"task": "greedy", **common}, *asked, drawn, *asked[: len(asked) // 4]])


def _jaxkd(*words: str, log: Path) -> None:
    """The command line in a process of its own, whose programs the next one reads."""
    cache = str(log.parent / "programs")
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": cache}
    with log.open("a") as stream:
        done = subprocess.run([sys.executable, "-m", "jaxkd", *words], env=environment, stdout=stream, stderr=stream)
    if done.returncode:
        raise SystemExit(f"jaxkd {words[0]} ended with {done.returncode}: {log}")


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Bench:
    """One task's models and runs in a directory."""

    def __init__(self, name: str, directory: Path):
        self.name, self.task, self.directory = name, TASKS[name], directory.absolute() / name
        if not (self.directory / "tasks.jsonl").exists():
            make_data(name, self.directory)
        self._judge: Any = None

    def _train(self, method: str, name: str, split: str, steps: int, *words: str) -> Path:
        """Trains a run unless it is there, and measures its student's tasks."""
        task, workdir, log = self.task, self.directory / name, self.directory / "log.txt"
        files = {
            key: str(self.directory / f"{file}.jsonl") for key, file in (("source", split), ("validation", "valid"))
        }
        start = time.monotonic()
        if not (workdir / "seconds").exists():
            _jaxkd(
                "train", "--no-check", "--workdir", str(workdir),
                "--config", f"{HERE / '_on_policy_recipe.py'}:{method}",
                f"--config.data.domains.{self.name}={files}", f"--config.data.batch={task.batch}",
                f"--config.data.length={task.length}", f"--config.run.steps={steps}",
                f"--config.run.eval_every={steps}", f"--config.run.checkpoint_every={steps}",
                f"--config.optim.lr.peak={task.rate}", *words, log=log,
            )  # fmt: skip
            seconds = time.monotonic() - start
            _jaxkd("evaluate", "--workdir", str(workdir), "--tasks", str(self.directory / "tasks.jsonl"), log=log)
            (workdir / "seconds").write_text(f"{seconds:.0f}\n")
            _say(f"{name}: {seconds:.0f} s, {time.monotonic() - start:.0f} s with its evaluation")
        return workdir

    def _exported(self, workdir: Path) -> str:
        target = workdir.with_name(workdir.name + "-model")
        if not target.exists():
            _jaxkd("export", "--workdir", str(workdir), "--output", str(target), log=self.directory / "log.txt")
        return str(target)

    def base(self) -> str:
        """SmolLM2, of problems with a shorter template."""
        target = self.directory / "smollm2"
        if not self.task.teacher:
            return SMOLLM2
        if not target.exists():
            from jaxkd.data import load_model
            from jaxkd.models import export

            model = load_model.load_model(SMOLLM2)
            tokenizer, config = model.tokenizer, model.forward.config
            own = dataclasses.replace(tokenizer.generation, templates={"default": TEMPLATE})
            export.export(target, config, model.params, tokenizer_json=tokenizer.json, generation=own, card={})
        return str(target)

    def teacher(self) -> str:
        if not self.task.teacher:
            return SMOLLM2
        words = [f"--config.teacher.path={self.base()}"]
        words.append("--config.student.layers=" + ("None" if self.task.teacher == "all" else self.task.teacher))
        return self._exported(self._train("teacher", "teacher", "teacher", self.task.teacher_steps, *words))

    def start(self, seed: int) -> Path:
        """A small student that labels have taught a little."""
        words = (f"--config.teacher.path={self.base()}", f"--config.student.layers={self.task.student}")
        words = (*words, f"--config.run.seed={seed}")
        return self._train("start", f"start-{seed}", "student", self.task.start_steps, *words)

    def method(self, method: str, seed: int) -> Path:
        """A run from the seed's start."""
        words = [f"--config.student.path={self._exported(self.start(seed))}", f"--config.run.seed={seed}"]
        if method != "opsd":  # its own teacher
            words.append(f"--config.teacher.path={self.teacher()}")
        return self._train(method, f"{method}-{seed}", "student", self.task.steps, *words)

    def _on_own_text(self, workdir: Path) -> dict[str, float]:
        """KL(q || p) of the same teacher for all, by the student's draws at temperature 1, and the entropy of them."""
        from jaxkd.evals import subject
        from jaxkd.run.generate import subjects_of_run
        from jaxkd.sampling.processors import Sampling
        from jaxkd.sampling.text import Settings

        self._judge = self._judge or subject.of_model(self.teacher())
        [student] = subjects_of_run(workdir, None)[1]
        examples = _rows(self.directory / "test.jsonl")[:OWN_PROMPTS]
        ids = [student.encode(student.render(row["messages"][:1]), rendered=True) for row in examples]
        written = student.write(ids, Settings(Sampling(1.0), self.task.new_tokens, n=2))
        pairs = [(before, one.ids) for before, several in zip(ids, written) for one in several]
        own, teacher = ([one.total for one in side.score(pairs)] for side in (student, self._judge))
        tokens = sum(len(after) for _, after in pairs)
        return {"own_kl": (sum(own) - sum(teacher)) / tokens, "own_entropy": -sum(own) / tokens}

    def figures(self, workdir: Path) -> dict[str, float]:
        """Of a run's student at its end."""
        found: dict[str, float] = {}
        for row in _rows(workdir / "tasks.jsonl"):
            found[f"{row['task']} {row['metric']}"] = row["value"]
        evals = [row for row in _rows(workdir / "evals.jsonl") if row["domain"] == "mean"]
        found |= {
            "nats": evals[-1]["student_nats"],
            "ece_before": evals[0]["student_ece"],
            "ece": evals[-1]["student_ece"],
        }
        if not (workdir / "own.json").exists():
            (workdir / "own.json").write_text(json.dumps(self._on_own_text(workdir)))
        found |= json.loads((workdir / "own.json").read_text())
        steps = _rows(workdir / "metrics.jsonl")
        rows = [row.get("rollout_tokens", 0.0) * row.get("rollout_share", 0.0) for row in steps]
        found["own_tokens"] = statistics.mean(rows) * self.task.batch * steps[-1]["step"]
        found["step_s"] = statistics.median(row["step_s"] for row in steps)
        found["seconds"] = float((workdir / "seconds").read_text())
        return found

    def table(self, methods: tuple[str, ...], seeds: int) -> Iterator[dict]:
        """A row per method: means over seeds and half of a 95% interval of Student's t over them."""
        starts = [self.figures(self.start(seed)) for seed in range(seeds)]
        if self.task.teacher:
            self.teacher()
            yield self._row("teacher", [self.figures(self.directory / "teacher")], [])
        yield self._row("start", starts, [])
        done: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
        for seed in range(seeds):  # an interrupted experiment has whole seeds
            for method in methods:
                workdir = self.method(method, seed)
                done[method].append(self.figures(workdir))
                shutil.rmtree(workdir / "checkpoints", ignore_errors=True)  # half a gigabyte each
        plain = done.get("sft", [])
        for method in methods:
            yield self._row(method, done[method], starts, plain)

    def _row(self, name: str, runs: list[dict], starts: list[dict], plain: list[dict] = ()) -> dict:
        row: dict[str, Any] = {"method": name, "seeds": len(runs)}
        row |= {key: _mean([run[key] for run in runs]) for key in runs[0]}
        for label, others in (("gain", starts), ("over sft", plain)):
            if len(others) == len(runs):
                score = self.task.score
                row[label] = _mean([run[score] - other[score] for run, other in zip(runs, others)])
        return row


def _mean(values: list[float]) -> str:
    """With half of a 95% interval."""
    text = f"{statistics.mean(values):.4g}"
    if len(values) not in T_95:
        return text
    return f"{text} ± {T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)):.2g}"


def main() -> None:
    options = _parsed()
    _show(Bench(options.task, options.directory).table(tuple(options.methods), options.seeds), options.json)


if __name__ == "__main__":
    main()
