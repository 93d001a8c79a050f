"""Generation settings: the precedence of a directory's files, GGUF metadata, and the round trip of an export."""

import json

import pytest

from jaxkd.models import generation
from jaxkd.models.generation import Generation

TOKENS = {"<s>": 1, "</s>": 2, "<|im_end|>": 3, "<pad>": 4}


@pytest.fixture
def read(tmp_path):
    """(files: contents by name) -> their `Generation`."""

    def read(**files):
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / (name if name.endswith("jinja") else f"{name}.json")).write_text(text)
        return generation.from_directory(tmp_path, TOKENS.get)

    return read


def test_generation_config_comes_first_and_the_tokenizers_end_is_added(read):
    settings = read(
        config={"bos_token_id": 1, "eos_token_id": 9, "pad_token_id": -1, "model_type": "llama"},
        generation_config={"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.7, "transformers_version": "5"},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>", "bos_token": None},
    )
    assert (settings.bos, settings.eos, settings.pad) == (1, (2, 7, 3), 4)
    assert settings.sampling == {"do_sample": True, "temperature": 0.7}
    assert settings.tokens == {"eos_token": "<|im_end|>", "pad_token": "<pad>"}


def test_special_tokens_map_counts_without_added_tokens_decoder(read):
    config = {"eos_token": "</s>"}
    legacy = {"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"}}
    settings = read(tokenizer_config=config, **legacy)
    assert (settings.tokens, settings.bos, settings.eos) == ({"eos_token": "<|im_end|>", "bos_token": "<s>"}, 1, (3,))
    assert read(tokenizer_config=config | {"added_tokens_decoder": {}}, **legacy).tokens == config


def test_chat_templates(read, tmp_path):
    assert read().templates == {}
    assert read(tokenizer_config={"chat_template": "a"}).templates == {"default": "a"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert read(tokenizer_config={"chat_template": named}).templates == {"default": "a", "tool_use": "b"}
    assert read(**{"chat_template.jinja": "c"}).templates == {"default": "c"}  # files replace the config's
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("d")
    assert read().templates == {"default": "c", "rag": "d"}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"generation_config": "{"}, r"generation_config\.json"),
        ({"tokenizer_config": "[]"}, r"tokenizer_config\.json"),
        ({"tokenizer_config": {"chat_template": [{"name": "x"}]}}, "chat_template"),
    ],
)
def test_damaged_files_are_named(read, files, named):
    with pytest.raises(ValueError, match=named):
        read(**files)


def test_from_gguf():
    fields = {
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<|im_end|>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
        "tokenizer.chat_templates": ["tool_use"],
        "general.sampling.temp": 0.5,
        "general.sampling.penalty_repeat": 1.1,
    }
    settings = generation.from_gguf(fields)
    tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "</s>"}
    sampling = {"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.1}
    templates = {"default": "a", "tool_use": "b"}
    assert settings == Generation(1, (3, 2), 2, sampling, tokens, templates, {"add_bos_token": False})


@pytest.mark.parametrize(
    "settings",
    [
        Generation(),
        Generation(1, (3,), 4, {"top_k": 20}, {"eos_token": "<|im_end|>"}, {"default": "a"}, {"padding_side": "left"}),
        Generation(None, (3, 2), 4, {}, {"bos_token": "<s>"}, {"tool_use": "b"}),
    ],
)
def test_files_are_read_back(read, settings):
    files = generation.to_files(settings)
    again = read(**{name.removesuffix(".json"): content for name, content in files.items()})
    if settings.bos is None:  # the id of bos_token
        settings = Generation(**{**vars(settings), "bos": again.bos})
    assert again == settings
