"""Generation settings from a model's own files: special tokens, end tokens, sampling defaults and chat templates."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxkd.runtime import files

_TOKENS = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DROPPED = (*IDS, "transformers_version", "_from_model_config")  # of generation_config.json
# Entries of tokenizer_config.json that stay true for an export.
_COPIED = (
    *("padding_side", "truncation_side", "additional_special_tokens", "extra_special_tokens", "model_input_names"),
    *("add_bos_token", "add_eos_token"),
)
_GGUF_TOKENS = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}
_GGUF_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"} | {
    "penalty_repeat": "repetition_penalty"
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a model begins, ends, pads, samples and formats text."""

    bos: int | None = None
    eos: tuple[int, ...] = ()  # each of them ends a text; the first is written as `eos_token`
    pad: int | None = None
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # generation_config.json without these ids
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)  # "bos_token" -> its text, as templates see it
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)  # chat templates by name
    tokenizer_config: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # further entries of it


def from_directory(folder: Path, token_id: Callable[[str], int | None]) -> Generation:
    """The settings in a Hugging Face directory, with the precedence of transformers.

    Read from generation_config.json, config.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja
    and additional_chat_templates/NAME.jinja. `eos` also holds the tokenizer's `eos_token`, where
    generation_config.json does not list it. `token_id` gives the id of a token's text.
    """
    read = lambda name: files.read_json(folder / name) if (folder / name).is_file() else {}
    tokenizer_config, settings = read("tokenizer_config.json"), read("generation_config.json")
    tokens = _tokens(tokenizer_config)
    if "added_tokens_decoder" not in tokenizer_config:
        tokens |= _tokens(read("special_tokens_map.json"))
    ids = {name: _ids(settings.get(name)) or _ids(read("config.json").get(name)) for name in IDS}
    own = {name: token_id(tokens[name]) for name in _TOKENS if name in tokens}
    first = lambda name: next(iter(ids[f"{name}_id"]), own.get(name))
    end = own.get("eos_token")
    return Generation(
        first("bos_token"),
        tuple(dict.fromkeys([*ids["eos_token_id"], *([] if end is None else [end])])),
        first("pad_token"),
        {name: value for name, value in settings.items() if name not in _DROPPED},
        tokens,
        _templates(folder, tokenizer_config.get("chat_template")),
        {name: tokenizer_config[name] for name in _COPIED if name in tokenizer_config},
    )


def _tokens(content: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: content.get(name) for name in _TOKENS}
    texts = {name: text.get("content") if isinstance(text, Mapping) else text for name, text in texts.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _ids(value: Any) -> list[int]:
    """One id or a list of ids; some files write -1 for none."""
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]


def _templates(folder: Path, entry: Any) -> dict[str, str]:
    """Chat templates by name: those in .jinja files, or else tokenizer_config.json's `chat_template`."""
    jinja = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    jinja = {"default": folder / "chat_template.jinja"} | jinja
    if texts := {name: file.read_text(encoding="utf-8") for name, file in jinja.items() if file.is_file()}:
        return texts
    if isinstance(entry, list):
        try:
            return {item["name"]: item["template"] for item in entry}
        except (TypeError, KeyError):
            file = folder / "tokenizer_config.json"
            raise ValueError(f"{file}: chat_template is a list whose items lack a name or a template") from None
    return dict(entry) if isinstance(entry, Mapping) else {"default": entry} if isinstance(entry, str) else {}


def from_gguf(fields: Mapping[str, Any]) -> Generation:
    """The settings in a GGUF file's decoded metadata."""
    words = fields.get("tokenizer.ggml.tokens", ())
    one = lambda name: next(iter(_ids(fields.get(f"tokenizer.ggml.{name}_token_id"))), None)
    ids = {name: number for name in _GGUF_TOKENS if (number := one(name)) is not None and number < len(words)}
    sampling = {name: fields[f"general.sampling.{key}"] for key, name in _GGUF_SAMPLING.items()
                if f"general.sampling.{key}" in fields}  # fmt: skip
    named = "tokenizer.chat_template"
    templates = {key.removeprefix(named)[1:] or "default": text for key, text in fields.items()
                 if key == named or key.startswith(f"{named}.")}  # fmt: skip
    flags = {f"add_{side}_token": fields.get(f"tokenizer.ggml.add_{side}_token") for side in ("bos", "eos")}
    return Generation(
        ids.get("bos"),
        tuple(dict.fromkeys(i for i in map(one, ("eos", "eot", "eom")) if i is not None)),
        ids.get("padding"),
        ({"do_sample": True} if sampling.get("temperature") else {}) | sampling,
        {f"{_GGUF_TOKENS[name]}_token": words[number] for name, number in ids.items()},
        templates,
        {name: value for name, value in flags.items() if value is not None},
    )


def to_files(generation: Generation) -> dict[str, dict[str, Any]]:
    """Contents by file name, which `from_directory` and transformers read back."""
    g = generation
    ids = zip(IDS, (g.bos, g.eos[0] if len(g.eos) == 1 else list(g.eos) or None, g.pad))
    templates: Any = [{"name": name, "template": text} for name, text in g.templates.items()]
    if tuple(g.templates) == ("default",):
        templates = g.templates["default"]
    chat = {"chat_template": templates} if templates else {}
    return {
        "generation_config.json": {**g.sampling, **{name: number for name, number in ids if number is not None}},
        "tokenizer_config.json": {**g.tokenizer_config, **g.tokens, **chat},
    }
