"""Conversations: the forms of records, which tokens the assistant writes, and their way into rows."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from harness import write_tokenizer

from jaxkd.data import build, conversations
from jaxkd.data.conversations import conversation
from jaxkd.data.rows import Rows
from jaxkd.data.sources import open_source
from jaxkd.data.tokenize import from_directory

HEADER = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}" + HEADER
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content }}<end>\n{% endif %}{% endfor %}" + HEADER
)
FORGETS = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '' }}")
MESSAGES = [
    {"role": "user", "content": "hi \ue000"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in MESSAGES]


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory):
    """Byte-level tokenizers with `<end>` as end token and a chat template."""

    def make(template: str):
        return from_directory(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template))

    return make


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES},
        {"conversations": SHAREGPT},
        {"conversations": MESSAGES},
        {"prompt": MESSAGES[:3], "response": MESSAGES[3:]},
    ],
)
def test_forms_of_a_conversation(record):
    assert conversation(record) == conversation({"messages": MESSAGES})
    system = conversation(record | {"system": "Be brief."})
    assert [m["role"] for m in system.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert conversations.parse(system.json) == system


def test_what_is_no_conversation():
    assert conversation({"text": "x"}) is conversation("x") is None
    pair = conversation({"prompt": "2+2?", "response": "4"})
    assert [(m["role"], m["content"]) for m in pair.messages] == [("user", "2+2?"), ("assistant", "4")]
    alone, alien = {"role": "user", "content": "x"}, {"from": "alien", "value": "x"}
    for turns in ([alone], [alien], [alone, "x"], [{"role": "assistant"}]):
        with pytest.raises(ValueError, match="turn"):
            conversation({"messages": turns})


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_assistants_tokens_have_weight(tokenizers_of, template):
    tokenizer = tokenizers_of(template)
    [tokens] = conversations.encode(tokenizer, [conversation({"messages": MESSAGES})], "it")
    text = "<user>hi \ue000<end>\n<assistant>hello<end>\n<user>and?<end>\n<assistant>bye<end>\n"
    assert tokenizer.tokenizer.decode(tokens.ids.tolist(), skip_special_tokens=False) == text
    written = tokens.ids[tokens.weights > 0]
    assert tokenizer.tokenizer.decode(written.tolist(), skip_special_tokens=False) == "hello<end>bye<end>"
    assert tokens.sizes.sum() == len(text.encode())


def test_templates_that_cannot_mark_the_assistant(tokenizers_of):
    talk = conversation({"messages": MESSAGES})
    with pytest.raises(ValueError, match="generation"):
        conversations.marked(tokenizers_of(FORGETS), talk, "it")
    assert conversations.marked(tokenizers_of(FORGETS), conversation({"messages": MESSAGES[:2]}), "it")
    with pytest.raises(ValueError, match="it has no chat template"):
        conversations.marked(tokenizers_of(""), talk, "it")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_rows_of_conversations(tokenizers_of, tmp_path, kind):
    """In no row is a token of the user, and no row is without weight."""
    records = [{"prompt": f"question {i} " + "x" * (7 * i % 90), "response": f"answer {i}"} for i in range(30)]
    if kind == "jsonl":
        path = tmp_path / "chat.jsonl"
        lines = [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
            for r in records
        ]
        path.write_text(
            "".join(json.dumps(line) + "\n" for line in [*lines, {"messages": [{"role": "user", "content": "?"}]}])
        )
    elif kind == "parquet":
        path = tmp_path / "chat.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path = tmp_path / "chat.csv"
        path.write_text("prompt,response\n" + "".join(f"{r['prompt']},{r['response']}\n" for r in records))
    tokenizer = tokenizers_of(PLAIN)
    prepared = build.prepare("chat", open_source(str(path)), tokenizer, 64, 0, 0, tmp_path / "rows", progress=False)
    assert prepared.bad == (kind == "jsonl")
    rows = [
        Rows(prepared.path, split).read(range(n))
        for split, n in (("train", prepared.train_rows), ("valid", prepared.valid_rows))
    ]
    tokens, weights, segments = (np.concatenate([r[name] for r in rows]) for name in ("tokens", "weights", "segments"))
    assert (weights.sum(1) > 0).all()
    assert segments.max() > 1
    targets = np.roll(tokens, -1, 1)[weights > 0]
    assert len(targets) == sum(len(record["response"]) + 1 for record in records)
    assert set(tokenizer.tokenizer.decode(targets.tolist(), skip_special_tokens=True)) <= set("answer 0123456789")
    other = tokenizers_of(PLAIN.replace("<end>\n", "<end> \n"))
    again = build.prepare("chat", open_source(str(path)), other, 64, 0, 0, tmp_path / "rows", progress=False)
    assert again.fingerprint != prepared.fingerprint


def test_a_teachers_own_prompt(tokenizers_of, tmp_path):
    """Rows of one conversation each, with what the teacher reads before the assistant's first turn."""
    tokenizer = tokenizers_of(PLAIN)
    alone = [{"role": "user", "content": f"question {i} " + "x" * i} for i in range(12)]
    told = [{"messages": [turn, *MESSAGES[1:]], "teacher_context": f"it is {i}"} for i, turn in enumerate(alone)]
    told[3]["messages"].insert(0, {"role": "system", "content": "be brief"})
    del told[5]["teacher_context"]
    file = tmp_path / "told.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in told))
    options = {"valid_share": 0.2, "progress": False}
    source = open_source(str(file), "text")
    prepared = build.prepare("told", source, tokenizer, 120, 0, 0, tmp_path / "rows", context=80, **options)
    rows = [
        Rows(prepared.path, split).read(range(n))
        for split, n in (("train", prepared.train_rows), ("valid", prepared.valid_rows))
    ]
    assert prepared.train_rows + prepared.valid_rows == 12
    seen = {}
    for part in rows:
        assert part["segments"].max() == 1
        for tokens, weights, context, length in zip(
            part["tokens"], part["weights"], part["aux"]["context"], part["aux"]["context_length"]
        ):
            own = tokenizer.decode(tokens[: int(np.flatnonzero(weights)[0]) + 1].tolist())
            seen[int(own.split("question ")[1].split()[0])] = own, tokenizer.decode(context[:length].tolist())
    decoded = lambda text: tokenizer.decode(tokenizer.encode_rendered([text])[0][0].tolist())
    for i, (own, teacher) in seen.items():
        question = f"<user>question {i} {'x' * i}<end>\n<assistant>"
        system = "be brief\n\n" if i == 3 else ""
        assert own == decoded(("<system>be brief<end>\n" if i == 3 else "") + question)
        assert teacher == (own if i == 5 else decoded(f"<system>{system}it is {i}<end>\n{question}"))
    with pytest.raises(ValueError, match=r"data\.context=20"):
        build.prepare("told", source, tokenizer, 120, 0, 0, tmp_path / "rows", context=20, **options)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(9)))
    plain = open_source(str(text), "text")
    with pytest.raises(ValueError, match=r"data\.context"):
        build.prepare("text", plain, tokenizer, 60, 0, 0, tmp_path / "rows", context=20, **options)
