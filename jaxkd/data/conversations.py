"""Conversations as training text: records in the usual forms, and which of their tokens the model is to write."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxkd.data import chat
from jaxkd.data.pack import Tokens
from jaxkd.data.tokenize import Tokenizer

_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
_SHAREGPT |= {"system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant"}
_TURNS = ("messages", "conversations")
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))


class Conversation(NamedTuple):
    """Turns, and what a template reads beside them."""

    messages: tuple[chat.Message, ...]
    tools: tuple[Any, ...] = ()
    context: str = ""  # what only the teacher reads, as the system prompt or behind it

    @property
    def json(self) -> str:
        """Its content, the same for every order of keys; `parse` reads it."""
        own = [self.messages, self.tools, *([self.context] if self.context else [])]
        return json.dumps(own, sort_keys=True, ensure_ascii=False)

    @property
    def privileged(self) -> list[chat.Message]:
        """What the teacher reads before the assistant's first turn."""
        turns = _opening(self)
        own = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
        return [{"role": "system", "content": "\n\n".join(filter(None, [own, self.context]))}, *turns]


def parse(text: str) -> Conversation:
    """The conversation of `Conversation.json`."""
    messages, tools, *context = json.loads(text)
    return Conversation(tuple(messages), tuple(tools), *context)


def holds_chat(columns: Iterable[str]) -> bool:
    """Whether a table with these columns may hold conversations."""
    columns = set(columns)
    return not columns.isdisjoint(_TURNS) or any(columns.issuperset(pair) for pair in _PAIRS)


def conversation(record: Any, field: str = "messages") -> Conversation | None:
    """The conversation that a record holds, also in a `field` of another name; None where it holds none.

    Read are `messages` (role, content, tool_calls, ...), ShareGPT's `conversations` (from, value), and prompt with
    response, as text or as messages. `tools`, a `system` prompt beside the turns, and `teacher_context` are read too.

    Raises:
        ValueError: a turn without a role or content, an unknown role, or no turn of the assistant.
    """
    if not isinstance(record, dict):
        return None
    lists = (record[name] for name in (field, *_TURNS) if isinstance(record.get(name), list))
    named = next((turns for turns in lists if any(isinstance(turn, dict) for turn in turns)), None)
    if named is not None:
        messages = turns(named)
    else:
        pair = next((pair for pair in _PAIRS if all(record.get(name) for name in pair)), None)
        if pair is None:
            return None
        messages = [*_side(record[pair[0]], "user"), *_side(record[pair[1]], "assistant")]
    system = record.get("system")
    if isinstance(system, str) and system and messages[:1] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn of the assistant, so nothing to learn")
    tools, context = record.get("tools"), record.get("teacher_context")
    return Conversation(
        tuple(messages), tuple(tools) if isinstance(tools, list) else (), context if isinstance(context, str) else ""
    )


def turns(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages (role, content, ...) from turns of either form. Raises ValueError for a turn that is none."""
    return [_turn(turn) for turn in values]


def _turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError("a turn is no object with a role and content")
    if "role" in turn:
        if not isinstance(turn["role"], str) or not (turn.get("content") is not None or turn.get("tool_calls")):
            raise ValueError("a turn has no content")
        return dict(turn)
    if turn.get("from") not in _SHAREGPT:
        raise ValueError(f"a turn is from {turn.get('from')!r}, which is none of {', '.join(_SHAREGPT)}")
    if not isinstance(turn.get("value"), str):
        raise ValueError("a turn has no value")
    return {"role": _SHAREGPT[turn["from"]], "content": turn["value"]}


def _side(value: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return turns(value)
    raise ValueError("prompt and response must be texts or lists of messages")


def marked(tokenizer: Tokenizer, talk: Conversation, source: str) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the character spans that the assistant writes, end-of-turn tokens included.

    The spans are the template's `{% generation %}` parts where it has them. Otherwise each is what a turn of the
    assistant adds to the conversation before it with the header of the assistant's turn.

    Raises:
        ValueError: the model has no template or it fails; or it has no such parts, and the conversation up to a turn is
            rendered otherwise than as the beginning of the whole.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(f"{source} has no chat template: conversations need a model that has one")
    options: dict[str, Any] = {"tokens": tokenizer.generation.tokens, "source": source}
    if talk.tools:
        options["tools"] = list(talk.tools)
    text, spans = chat.render_marked(template, talk.messages, **options)
    if spans:
        return text, spans
    for i, message in enumerate(talk.messages):
        if message["role"] != "assistant":
            continue
        before = chat.render(template, talk.messages[:i], add_generation_prompt=True, **options)
        after = chat.render(template, talk.messages[: i + 1], **options)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the chat template of {source} renders turn {i + 1} otherwise once more turns follow (or its header), "
                "so the assistant's tokens cannot be told from the others': mark them with {% generation %} in "
                "the template, or split such conversations into single turns"
            )
        spans.append((len(before), len(before) + len(_closed(tokenizer, after[len(before) :]))))
    return text, spans


def _closed(tokenizer: Tokenizer, turn: str) -> str:
    """A turn without the white space that follows its end token: the model stops writing at that token."""
    ends = [tokenizer.tokenizer.id_to_token(number) for number in tokenizer.generation.eos]
    bare = turn.rstrip()
    return bare if any(end and bare.endswith(end) for end in ends) else turn


def encode(tokenizer: Tokenizer, talks: Sequence[Conversation], source: str, contexts: bool = False) -> list[Tokens]:
    """Tokens of conversations, weight 1 on those that the assistant writes. Control tokens in the text are tokens.

    With `contexts` they have the teacher's prompt too: the conversation before the assistant's first turn, with its
    `context`.
    """
    rendered = [marked(tokenizer, talk, source) for talk in talks]
    tokens = []
    for (_, spans), encoding in zip(rendered, tokenizer.encode_rendered([text for text, _ in rendered])):
        ids, sizes, offsets = encoding
        weights = np.zeros(len(ids), np.float32)
        for start, stop in spans:
            weights[(offsets[:, 1] > start) & (offsets[:, 0] < stop)] = 1
        tokens.append(Tokens(ids, sizes, weights))
    if not contexts:
        return tokens
    texts = [
        prompt(tokenizer, talk.privileged if talk.context else _opening(talk), source, talk.tools) for talk in talks
    ]
    prompts = (encoding[0] for encoding in tokenizer.encode_rendered(texts))
    return [one._replace(context=np.asarray(ids, np.int32)) for one, ids in zip(tokens, prompts)]


def _opening(talk: Conversation) -> list[chat.Message]:
    return list(itertools.takewhile(lambda message: message["role"] != "assistant", talk.messages))


def prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], source: str, tools: Sequence[Any] = ()) -> str:
    """The text that a model continues with its turn."""
    if tokenizer.chat_template is None:
        raise ValueError(f"{source} has no chat template: give a text without --chat, or a model that has one")
    options = {"tools": list(tools)} if tools else {}
    return chat.render(
        tokenizer.chat_template, messages, tokens=tokenizer.generation.tokens, source=source,
        add_generation_prompt=True, **options,
    )  # fmt: skip
