"""Text in, text out: completions of prompts by a model with its tokenizer, in batches or as they are written."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import PyTree
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.sampler import Decoder, Queue, Sampler, State

_STEP = 16  # prompts and completions are padded to multiples, so that similar ones share a program
_STEPS = 16  # tokens between two looks at the text


class Settings(NamedTuple):
    """How texts are continued."""

    sampling: Sampling = Sampling()
    max_new_tokens: int = 256
    n: int = 1  # completions of each prompt
    stop: tuple[str, ...] = ()  # texts that end a completion, and are not part of it
    seed: int = 0
    slots: int = 8  # completions that are written at a time


class Completion(NamedTuple):
    """One text that was written."""

    text: str
    ids: np.ndarray  # int32 [n], the end token included
    logprobs: np.ndarray  # [n], under the model
    reason: str  # "end": an end token; "stop": a text of `Settings.stop`; "length": the limit


class Writer(NamedTuple):
    """A model that writes."""

    name: str
    decoder: Decoder
    params: PyTree
    tokenizer: Any  # data.tokenize.Tokenizer
    context: int  # most tokens of a text
    vocab: int  # ids at and above it are never written


def write(writer: Writer, prompts: Sequence[np.ndarray], settings: Settings) -> list[list[Completion]]:
    """The completions of each prompt, token ids [P]; a text depends on the seed, its prompt's place and its own alone.

    Raises:
        ValueError: an empty prompt, one that fills the model's context, an empty stop text, or a setting out of range.
    """
    return list(_advance(writer, prompts, settings, look=bool(settings.stop)))[-1]


def stream(writer: Writer, prompt: np.ndarray, settings: Settings) -> Iterator[str]:
    """The parts of one prompt's text as they are written; they end where the completion does."""
    shown = ""
    for [[completion]] in _advance(writer, [prompt], settings._replace(n=1), look=True):
        text = completion.text
        # Part of a character, and what may yet become a stop text, wait.
        held = max(len(text) - len(text.rstrip("\ufffd")), *(_overlap(text, stop) for stop in settings.stop), 0)
        safe = text if completion.reason else text[: len(text) - held]
        yield safe[len(shown) :]
        shown = safe


def _has(writer: Writer, ids: np.ndarray, stops: Sequence[str]) -> bool:
    text = writer.tokenizer.decode(ids)
    return any(stop in text for stop in stops)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop text begins with."""
    return next((k for k in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:k])), 0)


@partial(jax.jit, static_argnums=0)
def _begin(sampler: Sampler, params, prompts, lengths, keys, limits) -> tuple[PyTree, Queue, State]:
    params = sampler.decoder.prepare(params)
    queue = sampler.queue(params, prompts, lengths, keys, limits)
    return params, queue, sampler.start(queue)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=3)
def _go_on(sampler: Sampler, params, queue, state, steps: int | None) -> tuple[State, jax.Array]:
    state = sampler.advance(params, queue, state, steps)
    return state, sampler.unfinished(queue, state)


def _advance(
    writer: Writer, prompts: Sequence[np.ndarray], settings: Settings, look: bool
) -> Iterator[list[list[Completion]]]:
    """What is written so far, every few tokens where `look`, and in the end."""
    settings.sampling.check()
    if not all(settings.stop):
        raise ValueError("a stop text is empty")
    if settings.max_new_tokens < 1 or settings.n < 1:
        raise ValueError(f"max_new_tokens and n must be at least 1, got {settings.max_new_tokens} and {settings.n}")
    sizes = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if sizes.min(initial=1) < 1:
        raise ValueError(f"prompt {int(sizes.argmin()) + 1} is empty: give it at least one token")
    if sizes.max(initial=0) >= writer.context:
        raise ValueError(
            f"prompt {int(sizes.argmax()) + 1} has {sizes.max()} tokens, which fill the context of {writer.name}, "
            f"{writer.context} tokens: shorten it"
        )
    padded = np.zeros((len(prompts), -(-int(sizes.max()) // _STEP) * _STEP), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    limits = np.minimum(settings.max_new_tokens, writer.context - sizes).astype(np.int32)
    sampler = Sampler(
        writer.decoder, writer.vocab, -(-int(limits.max()) // _STEP) * _STEP, settings.sampling,
        writer.tokenizer.ends, settings.n, settings.slots,
    )  # fmt: skip
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(settings.seed)))(np.arange(len(prompts)))
    params, queue, state = _begin(sampler, writer.params, padded, sizes, keys, limits)
    stopped: dict[int, tuple[str, int]] = {}  # text, and how many tokens it took
    goes_on: Any = True
    while goes_on:
        state, goes_on = _go_on(sampler, params, queue, state, _STEPS if look else None)
        output = jax.device_get(state.output)
        texts = [writer.tokenizer.decode(ids[:n]) for ids, n in zip(output.tokens, output.lengths)]
        for i, text in enumerate(texts):
            places = [text.find(stop) for stop in settings.stop if stop in text]
            if places and i not in stopped:
                ids, count = output.tokens[i], int(output.lengths[i])
                # Those of the last look at most: the text before had no stop.
                shorter = (n for n in range(max(count - _STEPS, 0), count) if _has(writer, ids[:n], settings.stop))
                stopped[i] = text[: min(places)], next(shorter, count)
        if stopped:
            ended = output.ended.copy()
            ended[list(stopped)] = True
            state = state._replace(output=state.output._replace(ended=jnp.asarray(ended)))
            goes_on = sampler.unfinished(queue, state)
        flat = [
            Completion(
                stopped[i][0] if i in stopped else text,
                output.tokens[i][: stopped[i][1] if i in stopped else output.lengths[i]],
                output.logprobs[i][: stopped[i][1] if i in stopped else output.lengths[i]],
                "stop" if i in stopped else "end" if output.ended[i] else "" if goes_on else "length",
            )
            for i, text in enumerate(texts)
        ]
        yield [flat[i : i + settings.n] for i in range(0, len(flat), settings.n)]
