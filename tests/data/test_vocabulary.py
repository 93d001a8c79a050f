"""Tokenizers that belong together although their special tokens differ, and those that do not."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from jaxkd.data import tokenize
from jaxkd.data.vocabulary import common_text, coverage

END, RESERVED, START = "<|endoftext|>", "<|reserved|>", "<|im_start|>"


@pytest.fixture
def make(tmp_path):
    """A byte-level tokenizer of 258 text ids, the words of its added tokens and what may differ as arguments."""

    def make(specials=(END, RESERVED, START), plain=(), eos=256 + 2, digits=False, merge="t h"):
        alphabet = {word: i for i, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        left, right = merge.split()
        inner = Tokenizer(models.BPE({**alphabet, "12": 256, left + right: 257}, [("1", "2"), (left, right)]))
        parts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
        parts += [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        inner.pre_tokenizer = pre_tokenizers.Sequence(parts)
        inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
        inner.add_tokens([AddedToken(word, special=False, normalized=False) for word in plain])
        inner.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        return tokenize.from_directory(tmp_path)

    return make


RENAMED = (END, "<|right_pad|>", START)
APPENDED = (END, RESERVED, START, "[PAD]")


@pytest.mark.parametrize(
    ("data", "model", "rows", "size", "named"),
    [
        ({}, {}, 261, 261, []),
        ({}, {}, 320, 261, ["59 padding rows"]),
        ({}, {}, 26_100, 261, ["25,839 padding rows"]),  # any number of them
        # The renamed id is left out, and those after it: 258, the end token, is the last that is needed.
        ({}, {"specials": RENAMED}, 320, 259, ["'<|right_pad|>', '<|im_start|>' and 59 padding rows"]),
        # The last token ends turns: the renamed one before it stays.
        ({"eos": 260}, {"specials": RENAMED}, 261, 261, ["id 259 is '<|right_pad|>' and not '<|reserved|>'"]),
        ({}, {"specials": APPENDED}, 320, 261, ["'[PAD]' and 58 padding rows"]),
        ({"specials": APPENDED}, {}, 261, 261, []),
        ({"specials": APPENDED}, {"specials": APPENDED}, 261, 261, []),  # added without a row
        ({}, {"plain": ["<think>"]}, 262, 261, ["'<think>'"]),
    ],
)
def test_ids_in_the_loss(make, data, model, rows, size, named):
    data, model = make(**data), make(**model)
    covered = coverage(data, {"student": model}, {"teacher": 261 + 3 * (data.vocab > 261), "student": rows})
    assert covered.size == size
    notes = [note for note in covered.notes if note.startswith("student")]
    assert len(notes) == len(named)
    for note, text in zip(notes, named, strict=True):
        assert text in note


def test_added_tokens_of_text_that_a_model_lacks_are_split(make):
    """Qwen3 has <think> as a token of text, Qwen2.5 splits it."""
    new, old = make(plain=["<think>"]), make()
    assert common_text(new, [new]) is new
    both = common_text(new, [new, old])
    text = ["a<think>b 12"]
    assert both.encode(text)[0][0].tolist() == old.encode(text)[0][0].tolist() != new.encode(text)[0][0].tolist()
    assert (both.start, both.end, both.fingerprint) == (old.start, old.end, old.fingerprint)
    assert coverage(both, {"teacher": new, "student": old}, {"teacher": 262, "student": 261}).size == 261


@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        ({"merge": "a n"}, 320, "'an'"),  # another word of text
        ({"digits": True}, 320, "split text"),  # the same words, put together otherwise
        ({}, 258, "258 rows"),  # no row for the end of a document
    ],
)
def test_text_with_other_ids_is_refused(make, model, rows, message):
    with pytest.raises(ValueError, match=f"student.*{message}"):
        coverage(make(), {"student": make(**model)}, {"student": rows})


def test_without_a_tokenizer_and_without_files(make):
    data = make()
    assert coverage(data, {}, {"student": 261 + 1024}).size == 261
    with pytest.raises(ValueError, match=r"student.*tokenizer\.json"):
        coverage(data, {}, {"student": 261 + 1025})
    covered = coverage(tokenize.of_size(500), {"student": tokenize.byte_tokenizer()}, {"teacher": 500, "student": 512})
    assert covered.size == 500
