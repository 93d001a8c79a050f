"""Which of two answers a model prefers."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxkd.evals.subject import Prompt, Subject

_QUESTION = """\
Two answers to the same request follow. Decide which one is better.

Request:
{request}

Answer A:
{a}

Answer B:
{b}

Reply with one letter, A or B."""


class Match(NamedTuple):
    """Two answers to compare."""

    request: Prompt
    answer: str
    other: str


def wins(judge: Subject, matches: Sequence[Match]) -> list[float]:
    """The share of each match that `answer` wins: 1, 0, or 1/2 where both orders of the answers disagree or are equal.

    In each order the answer wins whose letter the judge finds more probable as its reply, and both win half where the
    letters are equally probable; the mean over both orders cancels a preference for a letter.

    Raises ValueError: both answers do not fit into the judge's context.
    """
    as_chat = judge.writer.tokenizer.chat_template is not None
    pairs = []
    for match in matches:
        for a, b in ((match.answer, match.other), (match.other, match.answer)):
            question = _QUESTION.format(request=_text(match.request), a=a, b=b)
            if as_chat:
                context, letters = judge.render([{"role": "user", "content": question}]), ("A", "B")
            else:
                context, letters = f"{question}\n\nReply:", (" A", " B")
            pairs += [judge.pair(context, letter, as_chat) for letter in letters]
    if (longest := max(len(context) + len(letter) for context, letter in pairs)) > judge.writer.context:
        raise ValueError(
            f"judge {judge.writer.name}: a request with both answers has {longest} tokens, and its context is "
            f"{judge.writer.context}: lower max_new_tokens, or take another judge"
        )
    scores = [score.total for score in judge.score(pairs)]
    share = lambda own, other: 0.5 if own == other else float(own > other)
    quads = [scores[i : i + 4] for i in range(0, len(scores), 4)]
    return [(share(a, b) + share(b_swapped, a_swapped)) / 2 for a, b, a_swapped, b_swapped in quads]


def _text(request: Prompt) -> str:
    if isinstance(request, str):
        return request
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in request)
