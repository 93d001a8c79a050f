"""Writing a trained student as a directory that `transformers` loads.

Files are staged inside the destination, then moved; only files of an earlier export (jaxkd.json) are replaced.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from jaxkd.core.types import PyTree
from jaxkd.models import families, formats, generation
from jaxkd.models.generation import Generation
from jaxkd.models.transformer import Config
from jaxkd.runtime import files

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_RECORD = "jaxkd.json"
_FILES = (
    *(_RECORD, "README.md", "config.json", "generation_config.json", "model.safetensors.index.json"),
    *("plain_tokenizer.py", "tokenizer.json", "tokenizer_config.json"),
)
_STAGING = ".jaxkd-export-"
# Transformers 5 loads any tokenizer.json beside a qwen2 model as Qwen2Tokenizer, which replaces the normalizer and the
# pre-tokenizer by Qwen's. An entry for a class of the directory's own keeps it from doing so.
_PLAIN_TOKENIZER = '''"""The tokenizer that tokenizer.json defines."""

from transformers import PreTrainedTokenizerFast


class PlainTokenizer(PreTrainedTokenizerFast):
    pass
'''
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GATE = "config.json"  # removed first and written last: an incomplete directory does not load
# Matches a checkpoint, a directory of checkpoints, a workdir and a directory of workdirs.
_CHECKPOINTS = tuple(
    f"{parent}{name}" for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "checkpoints") for parent in ("", "*/")
)


def export(
    directory: str | Path,
    config: Config,
    params: PyTree,
    *,
    tokenizer_json: str,
    generation: Generation,
    card: Mapping[str, Any],
    dtype: str = "float32",
    overwrite: bool = False,
    keep_out: Sequence[Path] = (),
) -> Path:
    """Writes a Hugging Face model directory, with the true vocabulary; an earlier export there is replaced.

    Args:
        params: fully addressable arrays.
        tokenizer_json: text of tokenizer.json.
        generation: the student's; without a padding token the first end token is used.
        card: facts for the model card by name. A dict becomes a list, a list of dicts a table; "name" is
            the title, "license" and "base_model" go to the header and "command" into a code block.
        dtype: "float32" or "bfloat16", of the stored weights.
        overwrite: write even if `directory` holds other files; those are kept.
        keep_out: directories of the run (workdir, checkpoints) that `directory` must not be, contain or lie inside.

    Raises FileExistsError where `directory` holds checkpoints, or files of others that are not to be overwritten. After
    any failure `directory` is as it was before.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")
    target = check_destination(directory, overwrite, keep_out)
    texts = _small_files(config, tokenizer_json, generation, dtype)
    texts["README.md"] = _card(target.resolve().name, card)

    new_directories = [path for path in (target, *target.parents) if not path.exists()]
    staging = target / f"{_STAGING}{os.getpid()}"
    try:
        with files.errors_name(target, "exporting to it"):
            target.mkdir(parents=True, exist_ok=True)
            for left_over in target.glob(f"{_STAGING}*"):  # from an export that was killed
                shutil.rmtree(left_over)
            staging.mkdir()
            formats.save_safetensors(staging, _tensors(config, params, DTYPES[dtype]))
            for name, text in texts.items():
                (staging / name).write_text(text, encoding="utf-8")
            names = sorted(file.name for file in staging.iterdir())
            (staging / _RECORD).write_text(_json({"files": names, "card": dict(card)}), encoding="utf-8")
            _publish(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for path in new_directories:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    return target


def check_destination(directory: str | Path, overwrite: bool = False, keep_out: Sequence[Path] = ()) -> Path:
    """The destination's path. Raises FileExistsError or ValueError, as `export`, if an export to it could lose data."""
    if "://" in str(directory):  # a Path has lost one of the slashes
        raise ValueError(f"{directory}: export writes to a local directory; copy it from there")
    target = Path(directory).expanduser()
    resolved = target.resolve()
    for path in (path.resolve() for path in keep_out):
        if resolved == path or resolved in path.parents or path in resolved.parents:
            relation = "is" if resolved == path else "contains" if resolved in path.parents else "lies inside"
            raise ValueError(f"cannot export to {target}: it {relation} {path}, which belongs to the run. Name another")
    if not target.exists():
        return target
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file: give a directory to export to")
    if any(next(target.glob(pattern), None) for pattern in _CHECKPOINTS):
        raise FileExistsError(f"cannot export to {target}: it holds checkpoints. Name another directory")
    ours = _earlier(target)
    foreign = sorted(
        file.name for file in target.iterdir() if file.name not in ours and not file.name.startswith(_STAGING)
    )
    if foreign and not overwrite:
        raise FileExistsError(
            f"{target} holds files that no export wrote ({', '.join(foreign[:3])}): give another directory, or set"
            " overwrite (--overwrite), which leaves them in place and replaces the files of an earlier export"
        )
    _refuse_foreign(target, [name for name in foreign if name in _FILES or name.endswith(".safetensors")])
    return target


def _refuse_foreign(target: Path, names: Sequence[str]) -> None:
    if names:
        raise FileExistsError(
            f"{target} holds {', '.join(names[:3])}, which no export wrote: move it away or give another directory"
        )


def _earlier(target: Path) -> set[str]:
    """Names of the files in `target` that an earlier export lists in its jaxkd.json."""
    try:
        names = json.loads((target / _RECORD).read_bytes())["files"]
        return {_RECORD, *(name for name in names if (target / name).parent == target and (target / name).is_file())}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()


def _publish(staging: Path, target: Path) -> None:
    """Moves the staged files into `target`, replacing those of an earlier export.

    Interrupted, it leaves a directory without config.json, which does not load, but with the list of an export, so
    that the same call completes it.
    """
    new = sorted(file.name for file in staging.iterdir())
    old = _earlier(target)
    _refuse_foreign(target, [name for name in new if name not in old and (target / name).exists()])
    if old:
        (staging / "list").write_text(_json({"files": sorted({*new, *old} - {_RECORD})}), encoding="utf-8")
        os.replace(staging / "list", target / _RECORD)
        for name in (_GATE, *old - {*new, _GATE}):
            (target / name).unlink(missing_ok=True)
    mode = (staging / _GATE).stat().st_mode  # follows the umask; safetensors creates files with mode 0600
    for name in sorted(new, key=lambda name: (name == _RECORD, name == _GATE)):
        (staging / name).chmod(mode)
        os.replace(staging / name, target / name)
    staging.rmdir()


def _tensors(config: Config, params: PyTree, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of a Hugging Face file, one at a time."""
    table, leaves = families.table(config), flatten_dict(params)
    if differing := sorted("/".join(path) for path in leaves.keys() ^ {tensor.path for tensor in table}):
        raise ValueError(f"only the parameters or only the config has {differing}")
    for tensor in table:
        name, leaf = "/".join(tensor.path), np.asarray(leaves[tensor.path])
        if leaf.shape != tensor.leaf(config):
            raise ValueError(f"parameter {name} is {leaf.shape}, and the config asks for {tensor.leaf(config)}")
        if not np.isfinite(leaf).all():
            raise ValueError(f"parameter {name} holds NaN or infinity: not exported")
        inside = tuple(slice(size) for size in tensor.shape)
        for layer, array in enumerate(leaf if tensor.stacked else leaf[None]):
            yield tensor.hf.format(layer=layer), families.to_stored(tensor, array[inside]).astype(dtype)


def _small_files(config: Config, tokenizer_json: str, settings: Generation, dtype: str) -> dict[str, str]:
    """Contents of the configs and the tokenizer by file name; raises if an id has no row in the embedding."""
    definition = json.loads(tokenizer_json)
    vocab = definition.get("model", {}).get("vocab", {})
    words = dict(vocab) if isinstance(vocab, dict) else {word: i for i, (word, _) in enumerate(vocab)}
    words |= {token["content"]: token["id"] for token in definition.get("added_tokens") or []}
    if words and max(words.values()) >= config.vocab:
        raise ValueError(f"the tokenizer has ids up to {max(words.values())}, the model {config.vocab} rows")
    if missing := [text for text in settings.tokens.values() if text not in words]:
        raise ValueError(f"special token {missing[0]!r} is not in the tokenizer")
    if settings.pad is None and settings.eos:  # a new padding token would need an untrained row
        settings = dataclasses.replace(settings, pad=settings.eos[0])
    own = (settings.bos, *settings.eos, settings.pad)
    if wrong := [number for number in own if number is not None and number >= config.vocab]:
        raise ValueError(f"special token {wrong[0]} is beyond the model's {config.vocab} rows")

    by_id = {number: word for word, number in words.items()}
    marks = {"eos_token": settings.eos[0] if settings.eos else None, "pad_token": settings.pad}
    marks |= {} if settings.tokens else {"bos_token": settings.bos}
    named = {name: by_id[number] for name, number in marks.items() if number in by_id}
    settings = dataclasses.replace(settings, tokens={**named, **settings.tokens})
    contents = generation.to_files(settings)
    ids = {name: number for name, number in contents["generation_config.json"].items() if name in generation.IDS}
    contents["config.json"] = families.to_hf(config, dtype=dtype) | ids
    contents["tokenizer_config.json"] |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_length,
        "clean_up_tokenization_spaces": False,
    }
    plain = contents["config.json"]["model_type"] == "qwen2" and not _qwen2_tokenizer(definition, words)
    if plain:
        contents["tokenizer_config.json"]["auto_map"] = {"AutoTokenizer": [None, "plain_tokenizer.PlainTokenizer"]}
    texts = {name: _json(content) for name, content in contents.items()} | {"tokenizer.json": tokenizer_json}
    return texts | ({"plain_tokenizer.py": _PLAIN_TOKENIZER} if plain else {})


def _qwen2_tokenizer(definition: Mapping[str, Any], words: Mapping[str, int]) -> bool:
    """Whether transformers' Qwen2Tokenizer, built from its vocabulary and merges alone, is the same tokenizer."""
    model, pre = definition.get("model", {}), definition.get("pre_tokenizer") or {}
    options = ["ignore_merges", "byte_fallback", "fuse_unk", "dropout"]
    options += ["continuing_subword_prefix", "end_of_word_suffix"]
    parts = pre.get("pretokenizers") or [{}]
    return (
        (model.get("type"), (definition.get("normalizer") or {}).get("type")) == ("BPE", "NFC")
        and not any(model.get(name) for name in options)
        and [part.get("type") for part in parts] == ["Split", "ByteLevel"]
        and (parts[0].get("pattern"), parts[0].get("behavior")) == ({"Regex": _QWEN_WORDS}, "Isolated")
        and not any(parts[1].get(name) for name in ("add_prefix_space", "use_regex"))
        and "<|endoftext|>" in words  # its default unknown token, which it would add
    )


def _card(name: str, card: Mapping[str, Any]) -> str:
    """README.md: a YAML header, code that loads the model, and the facts in the given order."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- knowledge-distillation"]
    # A JSON string is a YAML string.
    lines += [f"{key}: {json.dumps(card[key])}" for key in ("base_model", "license") if key in card]
    lines += ["---", "", f"# {card.get('name', name)}", "", "A distilled language model.", ""]
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")', "```", ""]
    facts = {key: value for key, value in card.items() if key not in ("name", "license")}
    plain = {key: value for key, value in facts.items() if not isinstance(value, Mapping | list)}
    lines += [f"- {key}: {_text(value)}" for key, value in plain.items() if key != "command"]
    if "command" in plain:
        lines += ["", "## command", "", "```", str(plain["command"]), "```"]
    for key in (key for key in facts if key not in plain):
        lines += ["", f"## {key}", "", *_section(facts[key])]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _section(value: Mapping[str, Any] | list) -> list[str]:
    if isinstance(value, Mapping):
        return [f"- {key}: {_text(item)}" for key, item in value.items()]
    if not all(isinstance(row, Mapping) for row in value):
        return [f"- {_text(item)}" for item in value]
    columns = list(dict.fromkeys(key for row in value for key in row))
    rows = [[_text(row.get(column)).replace("|", "\\|") for column in columns] for row in value]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
