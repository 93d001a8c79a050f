"""Tokenizers from a model's files, on the `tokenizers` library, so that ids equal those of `transformers`.

Text is encoded as text: a string that spells a control token does not become one.
"""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from jaxkd.models import generation, weights
from jaxkd.models.generation import Generation
from jaxkd.runtime import files

_END_OF_TEXT = "<|endoftext|>"
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # GGUF token types
_FILLED = re.compile(r"\[PAD\d+\]")  # what llama.cpp's converter calls a row of the embedding that no token has
_OTHERWISE = "give a Hugging Face directory of the same model, with its tokenizer.json"

_BYTE_WORD = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece models write a byte
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    return _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES


# GGUF pre-tokenizer name -> pattern, whether the model composes characters first, whether whole words skip the merges.
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
_SPLITS = {
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_words(r"\p{N}"), True, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_words(r"\p{N}{1,3}"), False, True)),
    "smaug-bpe": (_words(r"\p{N}{1,3}"), False, False),
    "tekken": (_TEKKEN + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES, False, True),
}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its special ids, definition and fingerprint."""

    tokenizer: tokenizers.Tokenizer = field(repr=False)
    vocab: int  # ids are below this; added tokens count
    start: int | None  # id before each document
    end: int | None  # id after each document
    fingerprint: str  # sha256 of the definition
    generation: Generation = field(repr=False)  # from the model's own files
    json: str = field(repr=False)  # the definition, as the `tokenizers` library writes it

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a text that is written: the one after a document, and the model's after a turn."""
        return tuple(sorted({*self.generation.eos, *([] if self.end is None else [self.end])}))

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids int32 [n] of each text and the bytes of text int64 [n] each token stands for; no start, no end.

        A token stands for the bytes up to its end that no earlier token stands for; the sum is `len(text.encode())`. A
        byte-level token that holds part of a character counts its own bytes, so that a row that ends there counts its
        targets' bytes exactly. A character that a normaliser replaced and that several tokens share counts for the
        first of them.
        """
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        pairs = zip(texts, encodings)
        return [(np.asarray(encoding.ids, np.int32), _token_bytes(text, encoding)) for text, encoding in pairs]

    def documents(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode`, with the start and end token around each document; those stand for 0 bytes."""
        before = np.asarray([] if self.start is None else [self.start], np.int32)
        after = np.asarray([] if self.end is None else [self.end], np.int32)
        pad = (len(before), len(after))
        return [(np.concatenate([before, ids, after]), np.pad(sizes, pad)) for ids, sizes in self.encode(texts)]

    def encode_rendered(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """As `encode`, of rendered chats, in which control tokens are tokens; and each token's characters [n 2]."""
        inner = _with_control_tokens(self.json)
        return [
            (
                np.asarray(encoding.ids, np.int32),
                _token_bytes(text, encoding),
                np.asarray(encoding.offsets, np.int64).reshape(-1, 2),
            )
            for text, encoding in zip(texts, inner.encode_batch(texts, add_special_tokens=False))
        ]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of token ids [n], control tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def chat_template(self) -> str | None:
        return self.generation.templates.get("default")

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, which `from_directory` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "tokenizer.json", self.json)
        for name, content in generation.to_files(self.generation).items():
            files.write_json(folder / name, content)


@lru_cache(maxsize=8)
def _with_control_tokens(definition: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token_bytes(text: str, encoding: tokenizers.Encoding) -> np.ndarray:
    """Bytes per token, from character offsets: see `Tokenizer.encode`."""
    if not encoding.offsets:
        return np.zeros(0, np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([[0], np.cumsum(width)])
    starts, ends = np.asarray(encoding.offsets, np.int64).T
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(points)  # characters that a normaliser dropped at the end count for the last token
    sizes = np.diff(before[ends], prepend=0)
    joined = np.concatenate([[False], starts[1:] < ends[:-1]])  # shares a character with the previous token
    if not joined.any():
        return sizes
    group, own, words = np.cumsum(~joined) - 1, sizes.copy(), encoding.tokens
    shared = np.flatnonzero(joined | np.append(joined[1:], False))
    # A byte-level word has one character per byte.
    own[shared] = [1 if _BYTE_WORD.fullmatch(words[i]) else len(words[i]) for i in shared]
    exact = np.bincount(group, own) == np.bincount(group, sizes)
    return np.where(exact[group], own, sizes)


def _finish(tokenizer: tokenizers.Tokenizer, start: int | None, end: int | None, settings: Generation) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    definition = tokenizer.to_str()
    canonical = json.dumps(json.loads(definition), sort_keys=True, ensure_ascii=True)
    # Set after the definition was taken: the library's flag to encode control tokens in text as text.
    tokenizer.encode_special_tokens = True
    whole_text = tokenizer.token_to_id(_END_OF_TEXT)
    if whole_text is not None:
        # Chat models name their turn markers as bos and eos; in pre-training this token separated documents.
        start = end = whole_text
    if not settings.eos and end is not None:
        settings = replace(settings, bos=start, eos=(end,))
    vocab = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
    return Tokenizer(tokenizer, vocab, start, end, fingerprint, settings, definition)


def _byte_level(kind: str) -> tuple[Any, Any, bool]:
    """Normaliser, pre-tokenizer and `ignore_merges` of a GGUF pre-tokenizer."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "gpt-2":
        return None, gpt2, False
    if kind == "smollm":
        return None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]), False
    if kind not in _SPLITS:
        readable = ", ".join(sorted(["gpt-2", "smollm", *_SPLITS]))
        raise ValueError(f"tokenizer.ggml.pre {kind!r} is not read, only {readable}: {_OTHERWISE}")
    pattern, composed, ignore_merges = _SPLITS[kind]
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])
    return normalizers.NFC() if composed else None, split, ignore_merges


def from_gguf(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer of a GGUF file's metadata; ValueError where it is incomplete or of another kind."""
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(f"tokenizer.ggml.model {model!r} is not read, only 'gpt2' (byte-level BPE): {_OTHERWISE}")
    for key in ("tokens", "merges", "token_type"):
        if f"tokenizer.ggml.{key}" not in fields:
            raise ValueError(f"the GGUF file has no field 'tokenizer.ggml.{key}': {_OTHERWISE}")
    words = list(fields["tokenizer.ggml.tokens"])
    kinds = list(fields["tokenizer.ggml.token_type"])
    normalizer, splitter, ignore_merges = _byte_level(fields.get("tokenizer.ggml.pre", "gpt-2"))
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    real = (kind != _UNUSED or not _FILLED.fullmatch(word) for word, kind in zip(words, kinds))
    vocab = {word: number for number, (word, is_real) in enumerate(zip(words, real)) if is_real}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    for word, kind in zip(words, kinds):
        if kind in (_CONTROL, _USER_DEFINED):
            added = tokenizers.AddedToken(word, special=kind == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])
    start, end = (fields.get(f"tokenizer.ggml.{side}_token_id") for side in ("bos", "eos"))
    return _finish(tokenizer, start, end, generation.from_gguf(fields))


def without(tokenizer: Tokenizer, added: Collection[str]) -> Tokenizer:
    """The tokenizer without some of its added tokens, which are then split as any text is."""
    definition = json.loads(tokenizer.json)
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] not in added]
    inner = tokenizers.Tokenizer.from_str(json.dumps(definition))
    return _finish(inner, tokenizer.start, tokenizer.end, tokenizer.generation)


def of_size(vocab: int) -> Tokenizer:
    """A placeholder with a number of ids and nothing else, for planning; it cannot encode."""
    empty = tokenizers.Tokenizer(models.BPE())
    return Tokenizer(empty, vocab, None, None, hashlib.sha256(b"").hexdigest(), Generation(), empty.to_str())


def _marker(tokenizer: tokenizers.Tokenizer, contents: list[dict[str, Any]], side: str) -> int | None:
    """Id of the first `{side}_token` or `{side}_token_id` in the files; `side` is "bos" or "eos"."""
    for content in contents:
        word = content.get(f"{side}_token")
        word = word.get("content") if isinstance(word, dict) else word
        if isinstance(word, str) and tokenizer.token_to_id(word) is not None:
            return tokenizer.token_to_id(word)
        number = content.get(f"{side}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            return number
    return None


def from_directory(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory: `tokenizer.json` and the config files beside it."""
    folder = Path(path).expanduser()
    if not (definition := folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{definition} does not exist: save a fast tokenizer with its save_pretrained")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(definition))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{definition} cannot be read as a tokenizer: {error}") from None
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
    contents = [files.read_json(folder / name) for name in names if (folder / name).is_file()]
    settings = generation.from_directory(folder, tokenizer.token_to_id)
    return _finish(tokenizer, _marker(tokenizer, contents, "bos"), _marker(tokenizer, contents, "eos"), settings)


def of_checkpoint(checkpoint: weights.Checkpoint) -> Tokenizer:
    """The tokenizer in a model's own files; raises as `from_directory` and `from_gguf`."""
    if checkpoint.tokenizer_dir is not None:
        return from_directory(checkpoint.tokenizer_dir)
    return from_gguf(checkpoint.tokenizer_fields or {})


def byte_tokenizer() -> Tokenizer:
    """One token per byte, id = byte, and `<|endoftext|>` as id 256; it encodes any text and needs no file."""
    # Byte-level tokenizers write a byte as a visible character: itself if printable, else the next free code point from
    # 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(_END_OF_TEXT, special=True, normalized=False)])
    marks = dict.fromkeys(("bos_token", "eos_token", "pad_token"), _END_OF_TEXT)
    return _finish(tokenizer, None, None, Generation(256, (256,), 256, tokens=marks))
