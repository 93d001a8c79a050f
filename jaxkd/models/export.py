"""Writing a trained student as a directory that `transformers` loads.

Files are written to a staging directory inside the destination, then moved. Only files of an earlier export, listed in
its jaxkd.json, are replaced.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxkd.core.types import PyTree
from jaxkd.models import families, formats
from jaxkd.models.transformer import Config

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_RECORD = "jaxkd.json"
_FILES = (
    _RECORD,
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_STAGING = ".jaxkd-export-"
_GATE = "config.json"  # removed first and written last: an incomplete directory does not load


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
    keep_out: Sequence[Path] = (),
) -> Path:
    """Writes a Hugging Face model directory.

    Args:
        directory: destination. An earlier export there is replaced, file by file.
        config: the decoder's; only the true vocabulary is written.
        params: fully addressable arrays.
        tokenizer_json: text of tokenizer.json.
        chat_template: Jinja text, or `None`.
        special: "start" and "end", the tokens around a document, as words; `None` for none.
        card: facts for the model card by name. A dict becomes a list, a list of dicts a table; "name" is
            the title, "license" goes to the header and "command" into a code block.
        dtype: "float32" or "bfloat16", of the stored weights.
        overwrite: write even if `directory` holds other files; those are kept.
        keep_out: directories of the run (workdir, checkpoints) that `directory` must not be, contain or lie inside.

    Raises:
        FileExistsError: `directory` holds checkpoints, or files of others and `overwrite` is not set, or a file of
            others with the name of one to be written.
        ValueError: parameters, tokenizer and config do not match, a parameter is not finite, or `directory` is,
            contains or lies inside one of `keep_out`.
    """
    target = Path(directory).expanduser()
    if "://" in str(directory):
        raise ValueError(f"{directory}: export writes to a local directory; copy it from there")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")
    check_destination(target, overwrite, keep_out)
    ids = _special_ids(config, tokenizer_json, special)
    written = families.to_hf(config, dtype=dtype) | ids

    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    for left_over in target.glob(f"{_STAGING}*"):  # from an export that was killed
        shutil.rmtree(left_over)
    staging = target / f"{_STAGING}{os.getpid()}"
    staging.mkdir()
    try:
        formats.save_safetensors(staging, _tensors(config, params, DTYPES[dtype]))
        _write_json(staging / "config.json", written)
        _write_json(staging / "generation_config.json", ids)
        _write_json(staging / "tokenizer_config.json", _tokenizer_config(config, chat_template, special))
        (staging / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        (staging / "README.md").write_text(_card(target.resolve().name, card), encoding="utf-8")
        files = sorted(file.name for file in staging.iterdir())
        _write_json(staging / _RECORD, {"files": files, "card": dict(card)})
        _publish(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                target.rmdir()
        raise
    return target


def check_destination(target: Path, overwrite: bool = False, keep_out: Sequence[Path] = ()) -> None:
    """Raises FileExistsError or ValueError, as `export`, if an export to `target` could lose data."""
    resolved = target.resolve()
    for path in (path.resolve() for path in keep_out):
        if resolved == path or resolved in path.parents or path in resolved.parents:
            how = "is" if resolved == path else "contains" if resolved in path.parents else "lies inside"
            raise ValueError(f"cannot export to {target}: it {how} {path}, which belongs to the run. Name another")
    if not target.exists():
        return
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
    if taken := [name for name in foreign if name in _FILES or name.endswith(".safetensors")]:
        raise FileExistsError(
            f"{target} holds {', '.join(taken[:3])}, which no export wrote: move it away or give another directory"
        )


# Matches a checkpoint, a directory of checkpoints, a workdir and a directory of workdirs.
_CHECKPOINTS = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "*/_CHECKPOINT_METADATA",
    "*/commit_success.txt",
    "checkpoints",
    "*/checkpoints",
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
    if taken := [name for name in new if name not in old and (target / name).exists()]:
        raise FileExistsError(
            f"{target} holds {', '.join(taken[:3])}, which no export wrote: move it away or give another directory"
        )
    if old:
        both = {"files": sorted({*new, *old} - {_RECORD})}
        _write_json(staging / "list", both)
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
    """bos, eos and pad ids; raises if an id of the tokenizer has no row in the embedding."""
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
    # The end token is also the padding token: a new one would need an untrained embedding row.
    tokens = {"bos_token": start, "eos_token": end, "pad_token": end, "chat_template": chat_template}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_length,
        "clean_up_tokenization_spaces": False,
    } | {key: value for key, value in tokens.items() if value is not None}


def _card(name: str, card: Mapping[str, Any]) -> str:
    """README.md: a YAML header, how to load the model, and the facts in the given order."""
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
