"""`jaxkd generate`: from a run, an export or any model; prompts, conversations, and text as it is written."""

import dataclasses
import io
import json

import numpy as np
import pytest
import tokenizers
from harness import fails, succeeds

from jaxkd.run import generate
from jaxkd.sampling import text
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.text import Settings


@pytest.fixture(scope="module")
def export(undisturbed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "student"
    succeeds("export", "--workdir", str(undisturbed), "--output", str(directory))
    return directory


@pytest.fixture(scope="module")
def writer(export):
    return generate.writer_of_model(str(export))


def rows_of(*arguments):
    return [json.loads(line) for line in succeeds("generate", *arguments).splitlines()]


def test_a_run_writes_beside_its_teacher_and_as_its_export(undisturbed, export):
    options = ("the teacher tells", "a student", "--max-new-tokens", "8", "--json", "--n", "2")
    rows = rows_of("--workdir", str(undisturbed), "--beside-teacher", *options)
    student, teacher = ["student, step 12"] * 2, ["teacher"] * 2
    assert [row["model"] for row in rows] == [*student, *teacher, *student, *teacher]
    assert {row["tokens"] for row in rows} <= set(range(1, 9))
    again = rows_of("--model", str(export), *options)
    assert [row["text"] for row in again] == [row["text"] for row in rows if row["model"] != "teacher"]


def test_prompts_of_a_file_and_of_standard_input(export, tmp_path, monkeypatch):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    options = ("--model", str(export), "--max-new-tokens", "4", "--logprobs")
    rows = rows_of("--prompts", str(path), *options)
    assert [row["prompt"] for row in rows] == ["one", "two"]
    assert all(len(row["ids"]) == len(row["logprobs"]) == row["tokens"] for row in rows)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert [row["text"] for row in rows_of(*options)] == [row["text"] for row in rows]


def test_a_prompt_begins_as_in_transformers(writer):
    """By `add_bos_token` or, where that is not stated, by the post-processor (Llama 3)."""
    own = writer.tokenizer
    inner = tokenizers.Tokenizer.from_str(own.json)
    mark = inner.id_to_token(own.end)
    template = f"{mark} $A {mark}"
    inner.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=[(mark, own.end)])
    [(ids, _)] = own.encode(["hi"])
    plain, end = own.tokenizer, own.end
    for inside, stated, start in ((plain, None, []), (inner, None, [end]), (inner, False, []), (plain, True, [end])):
        config = {} if stated is None else {"add_bos_token": stated}
        generation = dataclasses.replace(own.generation, bos=end, tokenizer_config=config)
        changed = dataclasses.replace(own, tokenizer=inside, generation=generation)
        assert generate.encode(writer._replace(tokenizer=changed), "hi", False, "").tolist() == [*start, *ids]


def test_stop_texts_and_streams(writer):
    prompt = np.asarray([5, 6, 7], np.int32)
    settings = Settings(Sampling(1.5), 40, seed=3)
    [[whole]] = text.write(writer, [prompt], settings)
    assert whole.reason in ("end", "length")
    assert "".join(text.stream(writer, prompt, settings)) == whole.text
    stop = whole.text[5:7]
    [[cut]] = text.write(writer, [prompt], settings._replace(stop=(stop, "not in it")))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.reason == "stop"
    assert stop in writer.tokenizer.decode(cut.ids)  # the tokens of the stop text are the last ones
    assert stop not in writer.tokenizer.decode(cut.ids[:-1])
    assert len(cut.logprobs) == len(cut.ids)
    assert "".join(text.stream(writer, prompt, settings._replace(stop=(stop,)))) == cut.text


def test_what_cannot_be_written_is_named(export, tmp_path):
    model = ("generate", "--model", str(export))
    assert "--workdir" in fails("generate", "x")
    assert "--beside-teacher" in fails(*model, "x", "--beside-teacher")
    assert "chat template" in fails(*model, "x", "--chat")
    assert "empty" in fails(*model, "")
    assert "top_p" in fails(*model, "x", "--top-p", "1.5")
    assert "max_new_tokens" in fails(*model, "x", "--max-new-tokens", "0")
    assert "stop" in fails(*model, "x", "--stop", "")
    assert "context" in fails(*model, "x" * 5000)
    path = tmp_path / "prompts.jsonl"
    assert str(path) in fails(*model, "--prompts", str(path))
    path.write_text('{"prompt": "one"}\n{"other": 1}\n')
    assert "line 2" in fails(*model, "--prompts", str(path))
