"""Text from a run's student, beside its teacher, or from any model: `jaxkd generate`."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd.data import conversations
from jaxkd.evals import subject
from jaxkd.evals.subject import Prompt, Subject
from jaxkd.models.transformer import CausalLM
from jaxkd.run import job, load, restore, saved_student
from jaxkd.run.open_models import Model
from jaxkd.sampling import text
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.sampler import decoder, unrolled
from jaxkd.sampling.text import Completion, Settings, Writer

_LONG = 512  # tokens from which faster decoding is worth the longer compilation, on a CPU
_FIELDS = ("messages", "conversations", "prompt", "text")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of generation_config.json


def writers_of_run(workdir: Path, step: str | None, beside_teacher: bool) -> list[Writer]:
    """A run's student at a checkpoint, and its teachers."""
    return [one.writer for one in subjects_of_run(workdir, step, beside_teacher)[1]]


def subjects_of_run(workdir: Path, step: str | None, beside_teacher: bool = False) -> tuple[int, list[Subject]]:
    """The step of a run's checkpoint; its student there, and the run's teachers."""
    e = job.fit_devices(saved_student.located_experiment(workdir))
    if beside_teacher and e.teacher.is_self:
        raise ValueError("--beside-teacher: the teacher of this run is the student itself; leave it out")
    if beside_teacher:  # whole models, not their heads beside a cache
        members = {name: dataclasses.replace(member, cache="") for name, member in e.teacher.members.items()}
        signal = "head" if e.teacher.cache else e.teacher.signal
        e = dataclasses.replace(e, teacher=dataclasses.replace(e.teacher, cache="", members=members, signal=signal))
    mesh = job.build_mesh(e.run.mesh, jax.devices())
    with jax.set_mesh(mesh):
        models, missing = saved_student.open_run(e, workdir, mesh, with_teachers=beside_teacher)
        if missing and beside_teacher:
            raise FileNotFoundError(f"--beside-teacher: {missing}")
        number, student, _ = restore.student(e.run, workdir, models, load.frozen(e, models), step)
        sides = [(f"student, step {number}", models.student, student)]
        if beside_teacher:
            params = load.teachers(models)[0]
            sides += [(name, model, params[name]) for name, model in models.teachers.items() if name in params]
    own = lambda model: model.tokenizer or models.tokenizer
    return number, [_subject(name, model, params, own(model)) for name, model, params in sides]


def _subject(name: str, model: Model, params: Any, tokenizer: Any) -> Subject:
    config, vocab = model.config, min(tokenizer.vocab, model.config.vocab)
    steps = decoder(config, model.dtype, model.rules)
    forward = CausalLM(config, model.dtype, rules=model.rules)
    return Subject(Writer(name, steps, params, tokenizer, config.max_length, vocab), forward)


def writer_of_model(path: str) -> Writer:
    """Any model on this machine."""
    return subject.of_model(path).writer


def settings_of(writer: Writer, given: dict[str, Any], **others: Any) -> Settings:
    """What the command line gives, over the model's own sampling defaults; without any of both greedy."""
    own = writer.tokenizer.generation.sampling
    defaults = {name: own[name] for name in _SAMPLING if own.get(name) is not None} if own.get("do_sample") else {}
    values = {"temperature": 1.0 if defaults else 0.0} | defaults
    values |= {name: value for name, value in given.items() if value is not None}
    return Settings(Sampling(**values), **others)


def read_prompts(lines: Sequence[str], source: str) -> list[Prompt]:
    """Prompts from a file's lines: JSON objects with messages, a prompt or a text, or else a text a line."""
    if not lines or not lines[0].lstrip().startswith("{"):
        return [line for line in lines if line.strip()]
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: not valid JSON ({error})") from None
        value = next((record[name] for name in _FIELDS if name in record), None) if isinstance(record, dict) else None
        if isinstance(value, list):
            prompts.append(conversations.turns(value))
        elif isinstance(value, str):
            prompts.append(value)
        else:
            raise ValueError(f"{source}, line {number}: no {', '.join(_FIELDS[:-1])} or {_FIELDS[-1]}")
    return prompts


def encode(writer: Writer, prompt: Prompt, chat: bool, system: str) -> np.ndarray:
    """Token ids of a prompt: a conversation, or with `chat` a text, by the model's chat template."""
    if isinstance(prompt, str) and not chat:
        [(ids, _)] = writer.tokenizer.encode([prompt])
        return np.concatenate([np.asarray(subject.start_ids(writer.tokenizer), np.int32), ids])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    rendered = conversations.prompt(writer.tokenizer, messages, writer.name)
    return writer.tokenizer.encode_rendered([rendered])[0][0]


def lines(
    writers: Sequence[Writer],
    prompts: Sequence[Prompt],
    settings: Callable[[Writer], Settings],
    chat: bool,
    system: str,
    as_json: bool,
    logprobs: bool,
) -> Iterator[str]:
    """Every prompt's completions by each writer, as text or as JSON objects."""
    written = []
    for writer in writers:
        chosen = settings(writer)
        if len(prompts) * chosen.n == 1 and chosen.max_new_tokens >= _LONG and jax.default_backend() == "cpu":
            writer = writer._replace(decoder=unrolled(writer.decoder))
        ids = [encode(writer, prompt, chat, system) for prompt in prompts]
        written.append(text.write(writer, ids, chosen))
    for i, prompt in enumerate(prompts):
        if not as_json and len(prompts) > 1:
            yield f"> {_shown(prompt)}"
        for writer, completions in zip(writers, written):
            for completion in completions[i]:
                if as_json:
                    yield json.dumps(_record(writer, prompt, completion, logprobs), ensure_ascii=False)
                else:
                    yield f"[{writer.name}] {completion.text}" if len(writers) > 1 else completion.text


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def _record(writer: Writer, prompt: Prompt, completion: Completion, logprobs: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"model": writer.name, "prompt" if isinstance(prompt, str) else "messages": prompt}
    record |= {"text": completion.text, "tokens": len(completion.ids), "finish_reason": completion.reason}
    if logprobs:
        record |= {"ids": completion.ids.tolist(), "logprobs": [round(float(x), 6) for x in completion.logprobs]}
    return record


def converse(writer: Writer, settings: Settings, system: str) -> None:
    """A conversation in the terminal, streamed as it is written; an empty line or the input's end leaves it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while True:
        print("you: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = ""
        for part in text.stream(writer, encode(writer, messages, True, ""), settings):
            answer += part
            print(part, end="", flush=True)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})
