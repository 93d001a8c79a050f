"""An export of the real teacher in transformers: model, tokenizer and chat template."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxkd.data import tokenize
from jaxkd.models import transformer
from jaxkd.models.export import export
from jaxkd.models.transformer import Config

torch = pytest.importorskip("torch")
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
    return export(
        tmp_path_factory.mktemp("export") / "student",
        teacher.config,
        teacher.params,
        tokenizer_json=tokenizer.json,
        generation=tokenizer.generation,
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
    settings = ours.generation
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        settings.bos,
        *settings.eos,
        settings.pad,
    )
    assert theirs.model_max_length == teacher.config.max_length
    assert len(theirs) == ours.vocab


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["smollm2", "bytes", "qwen"])
def test_auto_tokenizer(teacher, tmp_path, kind, name):
    """Transformers 5 replaces a qwen2 model's pre-tokenizer by Qwen's, unless the export says otherwise."""
    options = {"mistral": {"embed": 9, "heads": 2}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(
        kind, {}
    )
    fields = teacher.checkpoint.tokenizer_fields | {"tokenizer.ggml.pre": "qwen2"}
    tokenizer = {"smollm2": teacher.tokenizer, "bytes": tokenize.byte_tokenizer(), "qwen": tokenize.from_gguf(fields)}[
        name
    ]
    config = Config(
        **{"embed": 8, "heads": 1, **options}, vocab=tokenizer.vocab, layers=1, kv_heads=1, head_dim=8, mlp=8
    )
    params = jax.tree.map(np.asarray, transformer.init(config, jax.random.key(0)))
    given = {"tokenizer_json": tokenizer.json, "generation": tokenizer.generation, "card": {}}
    directory = export(tmp_path / "student", config, params, **given)
    assert json.loads((directory / "config.json").read_text())["model_type"] == kind
    assert (directory / "plain_tokenizer.py").exists() == (kind == "qwen2" and name != "qwen")
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for theirs in (transformers.AutoTokenizer.from_pretrained(directory),
                   transformers.PreTrainedTokenizerFast.from_pretrained(directory)):  # fmt: skip
        assert len(theirs) == tokenizer.vocab
        for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n"]:
            assert theirs(text, add_special_tokens=False)["input_ids"] == raw.encode(text, add_special_tokens=False).ids


def test_generation_ends_at_the_models_own_token(exported):
    """And at the end token alone: a model that always says one word stops there or goes on to the limit."""
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])

    def written(word):
        only = tokenizer.convert_tokens_to_ids(word)

        def force(ids, scores):
            return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([only]), 0.0)

        options = {"max_new_tokens": 5, "do_sample": False, "logits_processor": [force]}
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options).shape[1] - prompt.shape[1]

    assert (written("<|im_end|>"), written("<|im_start|>")) == (1, 5)


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
    assert again.generation == teacher.tokenizer.generation
