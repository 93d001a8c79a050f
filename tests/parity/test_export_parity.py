"""An export of the real teacher in transformers: model, tokenizer and chat template."""

import jax
import numpy as np
import pytest

from jaxkd.data import tokenize
from jaxkd.models import transformer
from jaxkd.models.export import export
from jaxkd.models.transformer import Config

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

TEXTS = [
    "The capital of France is Paris.",
    "def f(x):\n\treturn x ** 2  # 1234567 + 89\r\n",
    "naïve café — 東京 🎉 Ω≈ç√ и так далее",
    "  leading, trailing   and\n\n\nblank  ",
    "I'll don't WE'RE you've 3.14159",
    "",
]


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory):
    tokenizer = teacher.tokenizer
    words = {side: tokenizer.tokenizer.id_to_token(getattr(tokenizer, side)) for side in ("start", "end")}
    return export(
        tmp_path_factory.mktemp("export") / "student",
        teacher.config,
        teacher.params,
        tokenizer_json=tokenizer.json,
        chat_template=tokenizer.chat_template,
        special=words,
        card={"teacher": "smollm2-135m-instruct"},
    )


def test_model(exported, teacher, reference, their_logits):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(model).__name__ == "LlamaForCausalLM"
    theirs = their_logits(reference, teacher.tokens[:128])
    np.testing.assert_array_equal(their_logits(model, teacher.tokens[:128]), theirs)


def test_tokenizer(exported, teacher):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = teacher.tokenizer
    for text, (ids, _) in zip(TEXTS, ours.encode(TEXTS)):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
        assert theirs(text)["input_ids"] == ids.tolist()  # adds no special tokens
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.start, ours.end, ours.end)
    assert theirs.model_max_length == teacher.config.max_length
    assert len(theirs) == ours.vocab


def test_tokenizer_beside_another_architecture(teacher, tmp_path):
    """The class that the card names; AutoTokenizer would pre-tokenize as Qwen does."""
    config = Config(teacher.config.vocab, 8, 1, 1, 1, 8, 8, qkv_bias=True)
    given = {"tokenizer_json": teacher.tokenizer.json, "chat_template": None, "special": {}, "card": {}}
    directory = export(tmp_path / "student", config, transformer.init(config, jax.random.key(0)), **given)
    assert "PreTrainedTokenizerFast.from_pretrained" in (directory / "README.md").read_text()
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    for text, (ids, _) in zip(TEXTS, teacher.tokenizer.encode(TEXTS)):
        assert theirs(text)["input_ids"] == ids.tolist()


def test_chat_template(exported):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    chat = [{"role": "user", "content": "Hello"}]
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    ids = theirs(text)["input_ids"]
    assert ids.count(theirs.convert_tokens_to_ids("<|im_start|>")) == 3  # control tokens, not their spelling


def test_our_own_reader(exported, teacher):
    again = tokenize.from_directory(exported)
    assert again.fingerprint == teacher.tokenizer.fingerprint
    assert (again.start, again.end, again.vocab) == (0, 0, teacher.tokenizer.vocab)
    assert again.chat_template == teacher.tokenizer.chat_template
