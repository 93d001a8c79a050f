"""Tasks from JSON Lines files, and a model's figures on them (docs/tasks.md has the format)."""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxkd.data import conversations
from jaxkd.evals import judge, metrics
from jaxkd.evals.subject import Prompt, Subject
from jaxkd.evals.verify import Verifier
from jaxkd.report.records import TaskScore
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.text import Completion, Settings

_NUMBER = (int, float)
_SAMPLING: dict[str, Any] = dict.fromkeys(Sampling._fields, _NUMBER) | {"top_k": int}
_WRITING = {"max_new_tokens": int, "n": int, "seed": int, "stop": list, **_SAMPLING}
_COMMON = {"task": str, "kind": str, "system": str}
_KEYS: dict[str, dict[str, Any]] = {
    "exact": {**_WRITING, "k": list, "extract": str},
    "math": {**_WRITING, "k": list, "extract": str},
    "rouge": {**_WRITING, "extract": str},
    "judge": {**_WRITING, "judge": str},
    "choice": {},
}
"""Keys of a header by kind, beside `_COMMON`, and their types."""
_MODULES = {"math": "math_verify", "rouge": "rouge_score"}


class Record(NamedTuple):
    """An example."""

    line: int
    prompt: Prompt
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    label: int = 0  # index of the right choice


class Task(NamedTuple):
    """What a model is asked, and how its answers are measured."""

    name: str
    kind: str
    source: str  # the file
    records: tuple[Record, ...]
    settings: Settings
    ks: tuple[int, ...]  # of pass@k
    extract: re.Pattern[str] | None  # finds the answer in a completion
    system: str
    judge: str  # path of a model
    fingerprint: str  # sha256 of all this


class Result(NamedTuple):
    """A task's figures, and a row per example of what the model wrote or scored."""

    scores: list[TaskScore]
    examples: list[dict[str, Any]]


def read(path: Path) -> list[Task]:
    """The tasks of a file: each a header line with `task` and `kind`, then its examples.

    Raises ValueError: a line that is not as docs/tasks.md says; the message has its number and key.
    """
    tasks: list[tuple[int, dict[str, Any], list[Record], list[str]]] = []
    for line, content in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not content.strip():
            continue
        where = f"{path}, line {line}"
        try:
            values = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{where}: not a JSON object")
        if "task" in values:
            tasks.append((line, values, [], [content]))
        elif not tasks:
            raise ValueError(f'{where}: no header before it: begin with {{"task": NAME, "kind": KIND}}')
        else:
            _, header, records, contents = tasks[-1]
            records.append(_record(line, where, header.get("kind"), values))
            contents.append(content)
    if not tasks:
        raise ValueError(f"{path} has no task")
    return [_task(path, *parts) for parts in tasks]


def _task(path: Path, line: int, header: dict[str, Any], records: list[Record], contents: list[str]) -> Task:
    where = f"{path}, line {line}"
    kind = header.get("kind")
    if kind not in _KEYS:
        raise ValueError(f"{where}: kind is {kind!r}, and the kinds are {', '.join(_KEYS)}")
    keys = _COMMON | _KEYS[kind]
    for key, value in header.items():
        if key not in keys:
            raise ValueError(f"{where}: '{key}' is no key of kind {kind}; its keys are {', '.join(keys)}")
        if not isinstance(value, keys[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} has a value of another type: {value!r}")
    if not re.fullmatch(r"\w[\w.-]*", header["task"]):
        raise ValueError(f"{where}: task {header['task']!r} must be of letters, digits, '_', '.' and '-'")
    if not records:
        raise ValueError(f"{where}: task {header['task']} has no examples")
    if kind == "judge" and not header.get("judge"):
        raise ValueError(f"{where}: kind judge needs judge, the path of the model that compares")
    stop, ks = header.get("stop", []), header.get("k", [1])
    if not all(isinstance(value, str) and value for value in stop):
        raise ValueError(f"{where}: stop is a list of texts that are not empty, got {stop}")
    sampling = Sampling(**({"temperature": 0.0} | {name: header[name] for name in _SAMPLING if name in header}))
    others = {name: header[name] for name in ("max_new_tokens", "n", "seed") if name in header}
    settings = Settings(sampling, stop=tuple(stop), **others)
    try:
        sampling.check()
        extract = re.compile(header["extract"], re.DOTALL) if "extract" in header else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except re.error as error:
        raise ValueError(f"{where}: extract is no regular expression: {error}") from None
    if settings.max_new_tokens < 1 or settings.n < 1:
        raise ValueError(f"{where}: max_new_tokens and n must be at least 1")
    if settings.n > 1 and not sampling.temperature:
        raise ValueError(f"{where}: n completions at temperature 0 are equal: set temperature above 0")
    if not all(type(k) is int and 1 <= k <= settings.n for k in ks):
        raise ValueError(f"{where}: k is a list of integers from 1 to n, which is {settings.n}, got {ks}")
    fingerprint = hashlib.sha256("\n".join(contents).encode()).hexdigest()
    return Task(
        header["task"], kind, str(path), tuple(records), settings, tuple(ks), extract, header.get("system", ""),
        header.get("judge", ""), fingerprint,
    )  # fmt: skip


def _record(line: int, where: str, kind: str | None, values: Mapping[str, Any]) -> Record:
    if ("prompt" in values) == ("messages" in values):
        raise ValueError(f"{where}: give either prompt or messages")
    prompt = values.get("prompt")
    if "messages" in values:
        try:
            prompt = conversations.turns(values["messages"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: messages: {error}") from None
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"{where}: {'messages' if 'messages' in values else 'prompt'} is empty or of another type")
    if kind == "choice":
        choices, label = _texts(values.get("choices")), values.get("label")
        if not choices:
            raise ValueError(f"{where}: choices is a list of texts that are not empty")
        if type(label) is not int or not 0 <= label < len(choices):
            raise ValueError(f"{where}: label is the index of the right choice, from 0 to {len(choices) - 1}")
        return Record(line, prompt, choices=choices, label=label)
    answers = _texts(values.get("answers", [values.get("answer")]))
    if not answers:
        raise ValueError(f"{where}: give answer, a text, or answers, a list of texts; none is empty")
    return Record(line, prompt, answers)


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts that are not blank; () for anything else."""
    good = isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)
    return tuple(value) if good else ()


def check(tasks: Sequence[Task]) -> None:
    """Check what needs no model, before one is opened.

    Raises:
        ModuleNotFoundError: a library that a task needs is not installed.
        ValueError: an answer that math-verify cannot read; names the line.
    """
    with Verifier() as verifier:
        for task in tasks:
            for module in (_MODULES.get(task.kind), "sacrebleu" if task.settings.n > 1 else None):
                if module:
                    importlib.import_module(module)
            for record in task.records if task.kind == "math" else ():
                try:
                    verifier.verify(record.answers, "")
                except ValueError as error:
                    raise ValueError(f"{task.source}, line {record.line}: {error}") from None


def fingerprint(task: Task, subject: Subject) -> str:
    """What a task's figures depend on: its text, and the model's weights and tokenizer."""
    parts = (task.fingerprint, subject.fingerprint())
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def run(task: Task, subject: Subject, step: int | None, open_model: Callable[[str], Subject]) -> Result:
    """A model's figures on a task.

    Args:
        step: of the model's checkpoint, for the rows.
        open_model: opens the judge by its path.

    Raises ValueError: a prompt that fills the model's context, with its line; or a conversation without a template.
    """
    if task.kind == "choice":
        figures, examples = _choices(task, subject)
    else:
        completions = _complete(task, subject)
        figures, examples = _measure(task, completions, open_model)
    scores, identity = [], fingerprint(task, subject)
    for name, values in figures.items():
        if (found := metrics.estimate(values)) is not None:
            scores.append(TaskScore(step, subject.writer.name, task.name, task.kind, name, *found, identity))
    return Result(scores, examples)


def _prompts(task: Task, subject: Subject) -> Iterator[tuple[Record, str, bool]]:
    """Each record, its prompt as text, and whether that is a rendered conversation."""
    for record in task.records:
        yield record, subject.render(record.prompt, task.system), not isinstance(record.prompt, str)


def _choices(task: Task, subject: Subject) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    pairs = [
        subject.pair(prompt, choice, rendered)
        for record, prompt, rendered in _prompts(task, subject)
        for choice in record.choices
    ]
    scores = iter(subject.score(pairs))
    figures: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    examples = []
    for record in task.records:
        own = [next(scores) for _ in record.choices]
        totals = np.asarray([score.total for score in own])
        sizes = np.asarray([len(choice.strip().encode()) for choice in record.choices])
        figures["acc"].append(float(totals.argmax() == record.label))
        figures["acc_norm"].append(float((totals / sizes).argmax() == record.label))
        rows = [
            {"text": choice, "logprob": total, "tokens": len(score.logprobs), "bytes": size, "greedy": score.greedy}
            for choice, total, score, size in zip(record.choices, totals.tolist(), own, sizes.tolist())
        ]
        examples.append({"line": record.line, "label": record.label, "choices": rows})
    return figures, examples


def _complete(task: Task, subject: Subject) -> list[list[Completion]]:
    """The completions of every record."""
    ids = []
    for record, prompt, rendered in _prompts(task, subject):
        ids.append(subject.encode(prompt, rendered))
        if len(ids[-1]) >= subject.writer.context:
            raise ValueError(
                f"{task.source}, line {record.line}: the prompt has {len(ids[-1])} tokens, and the context of "
                f"{subject.writer.name} is {subject.writer.context}: shorten it"
            )
    return subject.write(ids, task.settings)


def answer_of(completion: str, extract: re.Pattern[str] | None) -> str:
    """The last match of a pattern, its first group where it has one; the whole completion without a pattern."""
    if extract is None:
        return completion
    matches = list(extract.finditer(completion))
    return (matches[-1].group(1 if extract.groups else 0) or "") if matches else ""


def _measure(
    task: Task, completions: list[list[Completion]], open_model: Callable[[str], Subject]
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Figures by name, a value per example, and what was written."""
    stated = [[answer_of(one.text, task.extract) for one in row] for row in completions]
    values = _values(task, stated, open_model)
    mean = lambda row: sum(row) / len(row)
    figures: dict[str, list[float]] = {}
    if task.kind in ("exact", "math"):
        for k in task.ks:
            name = task.kind if k == task.settings.n == 1 else f"pass@{k}"
            figures[name] = [metrics.pass_at_k(len(row), int(sum(row)), k) for row in values]
    else:
        figures[{"rouge": "rougeL", "judge": "win_rate"}[task.kind]] = [mean(row) for row in values]
    texts = [[one.text for one in row] for row in completions]
    for n in (1, 2):
        figures[f"distinct-{n}"] = [metrics.distinct(map(str.split, row), n) for row in texts]
    if task.settings.n > 1:
        figures["self-BLEU"] = [metrics.self_bleu(row) for row in texts]
    figures["tokens"] = [mean([float(len(one.ids)) for one in row]) for row in completions]
    figures["ended"] = [mean([float(one.reason != "length") for one in row]) for row in completions]
    examples = []
    for record, *parts in zip(task.records, completions, stated, values):
        rows = [
            {"text": one.text, "answer": answer, "value": value, "tokens": len(one.ids), "finish_reason": one.reason}
            for one, answer, value in zip(*parts)
        ]
        examples.append({"line": record.line, "completions": rows})
    return figures, examples


def _values(task: Task, stated: list[list[str]], open_model: Callable[[str], Subject]) -> list[list[float]]:
    """The value of each completion by the task's kind, from 0 to 1."""
    rows = list(zip(task.records, stated))
    if task.kind == "judge":
        matches = [judge.Match(record.prompt, answer, record.answers[0]) for record, row in rows for answer in row]
        won = iter(judge.wins(open_model(task.judge), matches))
        return [[next(won) for _ in row] for row in stated]
    with Verifier() as verifier:

        def value(record: Record, answer: str) -> float:
            if task.kind == "rouge":
                return metrics.rouge_l(answer, record.answers)
            if task.kind == "exact":
                return float(metrics.normalised(answer) in map(metrics.normalised, record.answers))
            return float(verifier.verify(record.answers, answer))

        return [[value(record, answer) for answer in row] for record, row in rows]
