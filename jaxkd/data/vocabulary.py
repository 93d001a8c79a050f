"""Whether models read the same text as the same ids, and which ids the loss covers.

Special tokens, which text never becomes, may be renamed or appended, and embeddings may have padding rows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxkd.data import tokenize
from jaxkd.data.tokenize import Tokenizer

_UNCHECKED_ROWS = 1024  # padding rows of a model without a tokenizer, whose ids cannot be compared

SAMPLES = (
    "The operands are evaluated in 2024, from left to right; it's what you'd EXPECT, isn't it? I'LL say we've 12.",
    *(
        " leading",
        "trailing ",
        "  two  spaces\n\n\n   three\r\n\ttab\t \t\n",
        "\n",
        "    ",
        "a\u00a0b\u2003c\u200bd\ufeff",
    ),
    "1 12 123 1234 12345 1234567890 3.14159 -1e-9 0x1F 10,000 1/2 ² ½ Ⅷ ٣٤٥ १२३",
    "def f(x: int) -> str:\n        return f'{x!r:>8}' + \"\\n\"  # TODO(me)\n\n#include <stdio.h>\nfor (;i<n;++i){}",
    "camelCase snake_case SCREAMING_CASE kebab-case x.y::z->w a/b//c\\d <tag attr='v'>&amp;</tag> $x^2_i$ \\frac{a}{b}",
    "naïve café e\u0301 \u0131İ ß ẞ ﬁ ﷺ Å \u212b Grüße Ελλάδα Привет שלום مرحبا नमस्ते ภาษาไทย",
    "中文字符 日本語 ひらがな カタカナ 한국어 👍 👩‍👩‍👧 🇩🇪 𝔘𝔫𝔦 \U0001f9d1\U0001f3fd",
    "— – … “quotes” «guillemets» ‘x’ ¿? ¡! € £ ¥ © ® ™ § ¶ • → ⇒ ∀x∈ℝ ∑ √ ≈",
    "https://example.org/a?b=c&d=%20e#f user@example.org 192.168.0.1 2024-11-29T10:02:22Z $1,234.56 50% +49-30",
    "<|endoftext|> <|im_start|>user\nhi<|im_end|>\n <s>[INST] x [/INST]</s> <pad> <unk> <think> </think> <0x0A>",
    "!!! ... --- === *** ### ((( ]]] ,,, ;;; ''' ``` ~~~ @@@ |||",
    "aaaaaaaaaaaaaaaaaaaaaaaa AaAaAa \x00\x07\x1b[0m\x7f",
)
"""Contractions, digits, white space, code, scripts and symbols: tokenizers of different families split these apart."""


class Coverage(NamedTuple):
    """Ids below `size` are in the loss; `notes` has sentences on what is left out."""

    size: int
    notes: tuple[str, ...]


def common_text(data: Tokenizer, others: Sequence[Tokenizer]) -> Tokenizer:
    """`data` without added tokens of text that another tokenizer lacks: it splits them as the other does."""
    vocabularies = [_words(other) for other in others if other.fingerprint != data.fingerprint]
    added = data.tokenizer.get_added_tokens_decoder().items() if vocabularies else ()
    lacking = [t.content for i, t in added if not t.special and any(v.get(i) != t.content for v in vocabularies)]
    return tokenize.without(data, lacking) if lacking else data


def coverage(data: Tokenizer, own: Mapping[str, Tokenizer], rows: Mapping[str, int]) -> Coverage:
    """The ids that the loss covers.

    All of them where the tokenizers are the same. Where special tokens differ, the ids below the first that differs, if
    those hold all text ids, the document marks and the end tokens. Otherwise the ids up to the last that is the same;
    those in between that differ stay in the softmax, but are never an input or a target.

    `own` has the models' tokenizers by side, where they have one, and `rows` the rows of their embeddings. Raises
    ValueError where text has other ids in a model, or its embedding has no row for one of them.
    """
    words = _words(data)
    special = {i for i, token in data.tokenizer.get_added_tokens_decoder().items() if token.special}
    marks = {mark for mark in (data.start, data.end) if mark is not None}
    needed = 1 + max((words.keys() - special) | marks, default=data.vocab - 1)
    size = data.vocab
    for side, count in rows.items():
        if side not in own and count > data.vocab + _UNCHECKED_ROWS:
            counts = f"{count} rows for the tokenizer's {data.vocab} ids"
            raise ValueError(f"the {side}'s weights have {counts}: put its own tokenizer.json beside them")
        if count < needed:
            raise ValueError(f"the tokenizer has text ids up to {needed - 1}, and the {side}'s weights {count} rows")
        size = min(size, count)
        if side in own and words and own[side].fingerprint != data.fingerprint:
            _check_text(data, own[side], side)
            size = min(size, max(needed, _shared(data, own[side], needed)))
    notes = [note for side, count in rows.items() for note in _notes(side, data, own.get(side, data), count, size)]
    return Coverage(size, tuple(notes))


def _words(tokenizer: Tokenizer) -> dict[int, str]:
    return {i: word for word, i in tokenizer.tokenizer.get_vocab(with_added_tokens=True).items()}


def _check_text(data: Tokenizer, model: Tokenizer, side: str) -> None:
    """Raises if a word of text has another id, or a sample another split."""
    added = {t.content for each in (data, model) for t in each.tokenizer.get_added_tokens_decoder().values()}
    ours, theirs = (t.tokenizer.get_vocab(with_added_tokens=True) for t in (data, model))
    differ = sorted(word for word in (ours.keys() | theirs.keys()) - added if ours.get(word) != theirs.get(word))
    if differ:
        example = f"{differ[0]!r} ({ours.get(differ[0])} and {theirs.get(differ[0])})"
        raise ValueError(
            f"the tokenizers of the data and the {side} have other ids for {len(differ)} tokens, such as {example}"
        )
    model = common_text(model, [data])
    splits = [[ids.tolist() for ids, _ in each.encode(list(SAMPLES))] for each in (data, model)]
    for text, *pair in zip(SAMPLES, *splits, strict=True):
        if pair[0] != pair[1]:
            start = next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), 0)
            pieces = [[data.tokenizer.id_to_token(i) for i in ids[start : start + 4]] for ids in pair]
            example = f"{text[:30]!r} as {pieces[0]} and {pieces[1]}"
            raise ValueError(f"the tokenizers of the data and the {side} split text differently: {example}")


def _shared(data: Tokenizer, model: Tokenizer, needed: int) -> int:
    """Ids that both tokenizers name alike, as a prefix of the vocabulary: see `coverage`."""
    ours, theirs = _words(data), _words(model)
    same = {i for i in ours.keys() & theirs.keys() if ours[i] == theirs[i]}
    first = min((ours.keys() | theirs.keys()) - same, default=data.vocab)
    ends = [i for i in (*data.generation.eos, *model.generation.eos) if i in same]
    return first if first >= max([needed, *(1 + i for i in ends)]) else 1 + max(same)


def _notes(side: str, data: Tokenizer, model: Tokenizer, rows: int, size: int) -> list[str]:
    """What the loss leaves out on one side, and which ids below `size` have another name there."""
    equal = model.fingerprint == data.fingerprint and size >= data.vocab
    ours, theirs = ({}, {}) if equal else (_words(data), _words(model))
    extra = [theirs.get(i, ours.get(i, "")) for i in sorted(ours.keys() | theirs.keys()) if size <= i < rows]
    padding = rows - max(size, data.vocab, model.vocab)
    more = f" and {len(extra) - 3:,} more" if len(extra) > 3 else ""
    parts = [", ".join(map(repr, extra[:3])) + more] if extra else []
    parts += [f"{padding:,} padding rows"] if padding > 0 else []
    notes = [f"{side}: ids from {size} on are left out of the loss: {' and '.join(parts)}"] if parts else []
    renamed = [i for i in sorted(ours.keys() & theirs.keys()) if i < size and ours[i] != theirs[i]]
    return notes + [
        f"{side}: id {i} is {theirs[i]!r} and not {ours[i]!r} as in the data's tokenizer; text never becomes it"
        for i in renamed[:3]
    ]
