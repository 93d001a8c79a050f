"""A trained student as a directory that `transformers` loads.

Written beside its destination and renamed at the end, so that there is a whole model or none. The card states
what the caller knows about the run and nothing else.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxkd.models import families, formats
from jaxkd.models.transformer import Config
from jaxkd.types import PyTree

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_RECORD = "jaxkd.json"


def export(
    directory: str | Path,
    config: Config,
    params: PyTree,
    *,
    tokenizer_json: str,
    chat_template: str | None,
    special: Mapping[str, str | None],
    card: Mapping[str, Any],
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Writes a Hugging Face model directory.

    Args:
        directory: where to. An earlier export there is replaced.
        config: the decoder's; only the true vocabulary is written.
        params: the decoder's parameters, arrays that this process holds in full.
        tokenizer_json: the tokenizer's definition.
        chat_template: Jinja text, or `None`.
        special: "start" and "end", the tokens around a document, as words; `None` for none.
        card: facts for the model card by name. A dict becomes a list, a list of dicts a table; "name" is
            the title, "license" goes to the header and "command" into a code block.
        dtype: "float32" or "bfloat16", what weights are stored in.
        overwrite: replace `directory` whatever is in it.

    Returns:
        The directory.

    Raises:
        FileExistsError: `directory` holds something else than an earlier export.
        ValueError: parameters, tokenizer and config do not fit each other, or a parameter is not finite.
    """
    target = Path(directory).expanduser()
    if "://" in str(directory):
        raise ValueError(f"{directory}: export writes to a local directory; copy it from there")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")
    _check_target(target, overwrite)
    ids = _special_ids(config, tokenizer_json, special)
    written = families.to_hf(config, dtype=dtype) | ids

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        formats.save_safetensors(partial, _tensors(config, params, DTYPES[dtype]))
        _write_json(partial / "config.json", written)
        _write_json(partial / "generation_config.json", ids)
        _write_json(partial / "tokenizer_config.json", _tokenizer_config(config, chat_template, special))
        (partial / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        (partial / "README.md").write_text(_card(target.name, card), encoding="utf-8")
        files = sorted(file.name for file in partial.iterdir())
        _write_json(partial / _RECORD, {"files": files, "card": dict(card)})
        _replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: give a directory to export to")
    if overwrite or not target.exists():
        return
    try:
        ours = {_RECORD, *json.loads((target / _RECORD).read_bytes())["files"]}
    except (FileNotFoundError, ValueError, KeyError):
        ours = set()
    foreign = sorted(file.name for file in target.iterdir() if file.name not in ours)
    if foreign:
        raise FileExistsError(
            f"{target} holds files that no export wrote ({', '.join(foreign[:3])}): give another directory,"
            " or overwrite=True to replace all of it"
        )


def _replace(partial: Path, target: Path) -> None:
    """Puts `partial` in `target`'s place; what was there goes only once the new one stands."""
    old = partial.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _tensors(config: Config, params: PyTree, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays as a Hugging Face file has them, one at a time."""
    table = families.table(config)
    inner = params.get("layers", {})
    present = {("layers", name) for name in inner} | {(name,) for name in params if name != "layers"}
    differing = sorted("/".join(path) for path in present ^ {tensor.path for tensor in table})
    if differing:
        raise ValueError(f"these parameters are only on one side, the tree's or the config's: {differing}")
    for tensor in table:
        name = "/".join(tensor.path)
        leaf = np.asarray((inner if tensor.stacked else params)[tensor.path[-1]])
        if leaf.shape != tensor.leaf(config):
            raise ValueError(f"parameter {name} is {leaf.shape}, and the config asks for {tensor.leaf(config)}")
        if not np.isfinite(leaf).all():
            raise ValueError(f"parameter {name} holds NaN or infinity: this model is not worth exporting")
        inside = tuple(slice(size) for size in tensor.shape)
        for layer, array in enumerate(leaf if tensor.stacked else leaf[None]):
            yield tensor.hf.format(layer=layer), families.to_stored(tensor, array[inside]).astype(dtype)


def _special_ids(config: Config, tokenizer_json: str, special: Mapping[str, str | None]) -> dict[str, int]:
    """bos, eos and pad ids, after a check that every id has a row in the embedding."""
    try:
        definition = json.loads(tokenizer_json)
    except ValueError as error:
        raise ValueError(f"tokenizer_json is not valid JSON: {error}") from None
    vocab = definition.get("model", {}).get("vocab", {})
    words = dict(vocab) if isinstance(vocab, dict) else {word: i for i, (word, _) in enumerate(vocab)}
    words |= {token["content"]: token["id"] for token in definition.get("added_tokens") or []}
    if words and max(words.values()) >= config.vocab:
        raise ValueError(f"the tokenizer has ids up to {max(words.values())}, the model {config.vocab} rows")
    ids: dict[str, int] = {}
    for side, keys in (("start", ["bos_token_id"]), ("end", ["eos_token_id", "pad_token_id"])):
        word = special.get(side)
        if word is None:
            continue
        if word not in words:
            raise ValueError(f"special token {side}={word!r} is not in the tokenizer")
        ids |= dict.fromkeys(keys, words[word])
    return ids


def _tokenizer_config(config: Config, chat_template: str | None, special: Mapping[str, str | None]) -> dict[str, Any]:
    start, end = special.get("start"), special.get("end")
    # The end token pads: a new one would need a row that no one trained.
    tokens = {"bos_token": start, "eos_token": end, "pad_token": end, "chat_template": chat_template}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_length,
        "clean_up_tokenization_spaces": False,
    } | {key: value for key, value in tokens.items() if value is not None}


def _card(name: str, card: Mapping[str, Any]) -> str:
    """The README: a YAML header, how to load it, and the facts in the order given."""
    header = ["---", "library_name: transformers", "tags:", "- knowledge-distillation"]
    if "license" in card:
        header.append(f"license: {json.dumps(card['license'])}")  # a JSON string is a YAML string
    lines = [*header, "---", "", f"# {card.get('name', name)}", "", "A distilled language model."]
    # Not AutoTokenizer: transformers 5 gives a Qwen model a Qwen tokenizer, whatever tokenizer.json says.
    lines += ["", "```python", "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")']
    lines += ['tokenizer = PreTrainedTokenizerFast.from_pretrained("path/to/this/directory")', "```", ""]
    facts = {key: value for key, value in card.items() if key not in ("name", "license")}
    plain = {key: value for key, value in facts.items() if not isinstance(value, Mapping | list)}
    lines += [f"- {key}: {value}" for key, value in plain.items() if key != "command"]
    if "command" in plain:
        lines += ["", "## command", "", "```", str(plain["command"]), "```"]
    for key in (key for key in facts if key not in plain):
        lines += ["", f"## {key}", "", *_section(facts[key])]
    return "\n".join(lines) + "\n"


def _section(value: Mapping[str, Any] | list) -> list[str]:
    if isinstance(value, Mapping):
        return [f"- {key}: {item}" for key, item in value.items()]
    if not all(isinstance(row, Mapping) for row in value):
        return [f"- {item}" for item in value]
    columns = list(dict.fromkeys(key for row in value for key in row))
    rows = [[str(row.get(column, "")).replace("|", "\\|") for column in columns] for row in value]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    file.write_text(text + "\n", encoding="utf-8")
