"""Chat templates, rendered as `transformers.PreTrainedTokenizer.apply_chat_template` renders them."""

import contextvars
import datetime
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else a template reads, such as `tool_calls`."""

_REASONING = ("reasoning_content", "thinking", "reasoning")


_mark: contextvars.ContextVar[str | None] = contextvars.ContextVar("mark", default=None)  # put around generation blocks


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the model wrote; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller() if (mark := _mark.get()) is None else f"{mark}{caller()}{mark}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tokens: Mapping[str, str],
    source: str,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation by a Jinja template; entries of a message that are None are left out.

    A template sees `Generation.tokens` (a missing one as undefined) and `variables`, such as `tools` and `documents`.
    `add_generation_prompt` ends it with the header of the model's turn. Errors of the template are ValueErrors that
    name `source`, the model.
    """
    names = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **tokens, **variables}
    try:
        return _compiled(template).render(messages=[_normalized(message) for message in messages], **names)
    except Exception as error:  # of the template: any operation in it may fail
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template of {source} cannot be rendered{line}: {cause}") from None


def render_marked(template: str, messages: Sequence[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
    """As `render`, with the character spans of the template's `{% generation %}` blocks."""
    mark = "\ue000"  # a private-use character, as often as no message has it
    content = json.dumps([dict(message) for message in messages], ensure_ascii=False, default=str)
    while mark in content:
        mark += "\ue000"
    token = _mark.set(f"{mark}\ue001")
    try:
        parts = render(template, messages, **options).split(f"{mark}\ue001")
    finally:
        _mark.reset(token)
    ends = list(itertools.accumulate(map(len, parts)))
    return "".join(parts), [(ends[i - 1], ends[i]) for i in range(1, len(parts), 2)]


def _normalized(message: Message) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
