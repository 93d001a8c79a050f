"""Model families as data: `config.json` or GGUF metadata to a `Config`, and a table of tensor names.

An option that changes the computation and that the decoder does not have raises an error with its name.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxkd.models.transformer import Config, RopeScaling

_FAMILIES: dict[
    str, tuple[str, dict[str, Any]]
] = {  # model_type -> architecture, and what its config.json has beside the common entries
    "llama": ("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"sliding_window": None, "use_sliding_window": False}),
    "qwen3": ("Qwen3ForCausalLM", {"attention_bias": False, "sliding_window": None, "use_sliding_window": False}),
}
_GGUF_FAMILIES = ("llama", "qwen2", "qwen3")
_HF_KEYS = {  # `Config`'s fields -> keys of config.json
    **{"vocab": "vocab_size", "embed": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"},
    **{"mlp": "intermediate_size", "max_length": "max_position_embeddings", "norm_eps": "rms_norm_eps"},
}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_LLAMA3_PUBLISHED = (1.0, 4.0, 8192)  # the keys after `factor`, the same in Llama 3.1, 3.2 and 3.3

Note = Callable[[str], object]
"""Receives one sentence per option that was accepted and ignored."""

# Keys that change the computation and are not supported, with their neutral value; null and False are always neutral.
# "head_dim" stands for the size of a head, "1/sqrt" for 1/sqrt(head_dim).
_UNREAD_HF = {
    **{"logit_scale": 1, "logits_scaling": 1, "embedding_multiplier": 1, "residual_multiplier": 1},
    **{"lm_head_multiplier": 1, "key_multiplier": 1, "scale_emb": 1, "clip_qkv": 0, "attention_chunk_size": 0},
    **{"final_logit_softcapping": 0, "attn_logit_softcapping": 0, "use_qk_norm": 0, "qk_layernorm": 0},
    **{"query_pre_attn_scalar": "head_dim", "attention_multiplier": "1/sqrt", "use_parallel_residual": 0},
    **{"attention_bias": 0, "mlp_bias": 0, "num_experts": 0, "num_local_experts": 0},
}
_UNREAD_GGUF = {
    **{"attention.scale": "1/sqrt", "logit_scale": 1, "final_logit_softcapping": 0, "attn_logit_softcapping": 0},
    **{"embedding_scale": 1, "residual_scale": 1, "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0},
    **{"attention.temperature_scale": 0, "use_parallel_residual": 0, "rope.scaling.attn_factor": 1, "expert_count": 0},
    **{"attention.value_length": "head_dim", "rope.dimension_count": "head_dim"},
}


class _Rope(NamedTuple):
    """`Config`'s fields of the same names."""

    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rope_factors: tuple[float, ...] = ()


class _Limit(NamedTuple):
    """A key that has no effect up to this many tokens, and is not supported beyond."""

    tokens: int
    key: str  # with its value, for messages


@dataclass(frozen=True)
class Tensor:
    """One parameter: its path in the tree, its names in files, and its shape in both.

    Files store matrices as [out, in]; parameters are [in, out] with the head axes split. GGUF files of the llama
    architecture interleave the two rotary halves of each head in the rows of q and k: `rotary_heads` is the number of
    heads to de-interleave, 0 for none.
    """

    path: tuple[str, ...]
    hf: str  # "{layer}" stands for the layer number
    gguf: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    rotary_heads: int = 0
    vocab_axis: int | None = None  # the axis of `shape` that is padded

    @property
    def stacked(self) -> bool:
        """Whether files have one tensor per layer, stacked on a leading axis in the tree."""
        return self.path[0] == "layers"

    def leaf(self, config: Config) -> tuple[int, ...]:
        """The tree's shape, with the layer axis and the padded vocabulary."""
        shape = list(self.shape)
        if self.vocab_axis is not None:
            shape[self.vocab_axis] = config.padded_vocab
        return (config.layers, *shape) if self.stacked else tuple(shape)


def table(config: Config) -> tuple[Tensor, ...]:
    """All parameters of `config`'s decoder; shapes are per layer, with the true vocabulary."""
    d, f, h, kv = config.embed, config.mlp, config.heads, config.kv_heads
    hd, v = config.head_dim, config.vocab

    def layer(name: str, hf: str, gguf: str, stored: tuple, shape: tuple, **more: Any) -> Tensor:
        hf, gguf = f"model.layers.{{layer}}.{hf}", f"blk.{{layer}}.{gguf}"
        return Tensor(("layers", name), hf, gguf, stored, shape, **more)

    def matrix(name: str, hf: str, gguf: str, out: tuple, into: tuple, heads: int = 0) -> Tensor:
        stored = (int(np.prod(out)), int(np.prod(into)))
        hf, gguf = f"{hf}.weight", f"{gguf}.weight"
        return layer(name, hf, gguf, stored, into + out, transposed=True, rotary_heads=heads)

    entries = [
        Tensor(("embed",), "model.embed_tokens.weight", "token_embd.weight", (v, d), (v, d), vocab_axis=0),
        layer("attn_norm", "input_layernorm.weight", "attn_norm.weight", (d,), (d,)),
        matrix("q", "self_attn.q_proj", "attn_q", (h, hd), (d,), heads=h),
        matrix("k", "self_attn.k_proj", "attn_k", (kv, hd), (d,), heads=kv),
        matrix("v", "self_attn.v_proj", "attn_v", (kv, hd), (d,)),
        matrix("o", "self_attn.o_proj", "attn_output", (d,), (h, hd)),
        layer("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight", (d,), (d,)),
        matrix("gate", "mlp.gate_proj", "ffn_gate", (f,), (d,)),
        matrix("up", "mlp.up_proj", "ffn_up", (f,), (d,)),
        matrix("down", "mlp.down_proj", "ffn_down", (d,), (f,)),
        Tensor(("norm",), "model.norm.weight", "output_norm.weight", (d,), (d,)),
    ]
    if config.qkv_bias:
        for name, heads in (("q", h), ("k", kv), ("v", kv)):
            hf, gguf = f"self_attn.{name}_proj.bias", f"attn_{name}.bias"
            entries.append(layer(f"{name}_bias", hf, gguf, (heads * hd,), (heads, hd)))
    if config.qk_norm:
        for name in ("q", "k"):
            hf, gguf = f"self_attn.{name}_norm.weight", f"attn_{name}_norm.weight"
            entries.append(layer(f"{name}_norm", hf, gguf, (hd,), (hd,)))
    if not config.tied:
        entries.append(Tensor(("unembed",), "lm_head.weight", "output.weight", (v, d), (d, v), True, vocab_axis=1))
    return tuple(entries)


def from_stored(tensor: Tensor, array: np.ndarray, *, interleaved: bool = False) -> np.ndarray:
    """A tensor `[*stored]` from a file as a parameter `[*shape]`; `interleaved` is GGUF llama's row order."""
    if interleaved and tensor.rotary_heads:
        half = array.shape[0] // tensor.rotary_heads // 2
        array = array.reshape(tensor.rotary_heads, half, 2, -1).swapaxes(1, 2)
    array = array.reshape(tensor.stored)
    return (array.T if tensor.transposed else array).reshape(tensor.shape)


def to_stored(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """A parameter `[*shape]` as a Hugging Face file stores it, `[*stored]`."""
    return array.reshape(tensor.stored[::-1]).T if tensor.transposed else array.reshape(tensor.stored)


def from_hf(
    config: Mapping[str, Any], source: str, *, length: int | None = None, note: Note = lambda text: None
) -> Config:
    """The decoder's config from a Hugging Face `config.json`, as transformers 4 or 5 writes it.

    `length` is that of the longest row that the model will see, None for its own maximum. Unsupported options without
    effect up to there are accepted, reduce `max_length` to where they would take effect, and are passed to `note`.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"{source}: model_type {family!r} is not known; known: {', '.join(_FAMILIES)}")
    _refuse_hf(config, source)

    needed = list(_HF_KEYS.values())
    needed += [] if family == "llama" else ["num_key_value_heads"]  # the first llamas predate the key
    needed += ["head_dim"] if family == "qwen3" else []  # elsewhere it follows from the width
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        raise ValueError(f"{source}: missing {', '.join(missing)}")

    width, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim") is None and width % heads:
        raise ValueError(f"{source}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    head_dim = config.get("head_dim") or width // heads
    _refuse_unread(config, _UNREAD_HF, head_dim, f"{source}: ")
    rope, rope_limit = _rope_hf(config, family, source)
    limits = [limit for limit in (_window_hf(config, family), rope_limit) if limit]
    numbers = {field: config[key] for field, key in _HF_KEYS.items()}
    return _checked(
        source,
        **numbers | {"max_length": _within(limits, numbers["max_length"], length, source, note)},
        **rope._asdict(),
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        tied=bool(config.get("tie_word_embeddings", False)),  # the four families' own default
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def to_hf(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 both read, with the true vocabulary; `dtype` is of the weights.

    The family is the one that has the config's options; ValueError where none has.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("no Hugging Face family has qkv_bias and qk_norm together: cannot export")
    # Mistral and Llama compute the same, but a llama config requires that the heads divide the width.
    plain = "mistral" if config.embed % config.heads else "llama"
    family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else plain
    architecture, own = _FAMILIES[family]
    scaling = config.rope_scaling
    written: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family,
        **{key: getattr(config, field) for field, key in _HF_KEYS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
        # The layout of transformers 4; transformers 5 converts it to its own `rope_parameters`.
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if scaling:
        numbers = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length)
        written["rope_scaling"] = {"rope_type": "llama3", **dict(zip(_LLAMA3_KEYS, numbers))}
    if factors := list(config.rope_factors):
        # longrope takes one factor per frequency; with two equal lists it does not depend on the length.
        same = {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": config.max_length}
        written["rope_scaling"] = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, **same}
    return written | own


def _refuse_hf(config: Mapping[str, Any], source: str) -> None:
    if config.get("quantization_config"):
        raise ValueError(f"{source}: quantization_config is set: save the model in bfloat16 or float32")
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"{source}: hidden_act is {act!r}: only silu is supported")
    names = config.get("architectures") or []
    if names and not any(name.endswith(("ForCausalLM", "Model")) for name in names):
        raise ValueError(f"{source}: architectures is {names}: only a ...ForCausalLM model is supported")


def _refuse_unread(config: Mapping[str, Any], unread: Mapping[str, Any], head_dim: Any, source: str) -> None:
    """Raises on a key of `unread` (key -> neutral value) that is not neutral; `source` is a prefix for messages."""
    for key, neutral in unread.items():
        value = config.get(key)
        if not value:
            continue
        if isinstance(neutral, str):
            neutral = head_dim if neutral == "head_dim" else 1 / math.sqrt(head_dim)
        if not isinstance(value, (int, float)) or not math.isclose(value, neutral, rel_tol=1e-6):
            remedy = f"if the weights were trained without it, set it to {neutral:.9g}"
            raise ValueError(f"{source}{key} {value!r} changes the computation: not supported; {remedy}")


def _within(limits: Iterable[_Limit], whole: int, length: int | None, source: str, note: Note) -> int:
    """Tokens up to which the decoder is exact: `whole`, or the smallest of `limits`; ValueError for longer rows."""
    tokens, key = min(limits, default=_Limit(whole, ""))
    if not isinstance(whole, int) or tokens >= whole:
        return whole
    if length is None or length > tokens:
        rows = f"rows have {length}" if length else f"the model has {whole}"
        limit = f"{key} has an effect beyond {tokens} tokens, which is not supported"
        raise ValueError(f"{source}: {limit}, and {rows}: set data.length to at most {tokens}")
    note(f"{key} changes nothing in rows of up to {tokens} tokens: ignored, and the model's context is {tokens}")
    return tokens


def _window_hf(config: Mapping[str, Any], family: str) -> _Limit | None:
    """The sliding window, with transformers' defaults for missing keys; None without one."""
    window = config.get("sliding_window", 4096 if family == "mistral" else None)
    if not window or family == "llama":
        return None
    if family.startswith("qwen"):
        everywhere_full = config.get("max_window_layers", 28) >= (config.get("num_hidden_layers") or 0)
        if kinds := config.get("layer_types"):
            everywhere_full = all(kind == "full_attention" for kind in kinds)
        if not config.get("use_sliding_window") or everywhere_full:
            return None
    return _Limit(window, f"sliding_window {window}")


def _rope_hf(config: Mapping[str, Any], family: str, source: str) -> tuple[_Rope, _Limit | None]:
    """Rotary frequencies from the layout of transformers 4 or 5, and their limit, with transformers' precedence.

    A non-empty `rope_scaling` replaces `rope_parameters`; the block's base comes before the top level's; the top
    level's original length comes before the block's.
    """
    replaced = config.get("rope_scaling") and config.get("rope_parameters")
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(f"{source}: {name} is given per kind of layer ({', '.join(nested)}), which is not supported")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None and family == "llama" and not rope:
        theta = 10000.0  # the first llamas predate the key
    if theta is None and replaced:
        raise ValueError(f"{source}: rope_scaling without rope_theta replaces rope_parameters: merge the two")
    if theta is None:
        raise ValueError(f"{source}: missing rope_theta")
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        raise ValueError(f"{source}: partial_rotary_factor is {part}: only 1 is supported")
    if config.get("original_max_position_embeddings") is not None:
        rope = {**rope, "original_max_position_embeddings": config["original_max_position_embeddings"]}
    return _stretched_hf(rope, float(theta), config["max_position_embeddings"], f"{source}: {name}")


def _stretched_hf(rope: Mapping[str, Any], theta: float, whole: Any, where: str) -> tuple[_Rope, _Limit | None]:
    """Frequencies after the scaling of a rope block; `whole` is the model's context."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    original, attention = rope.get("original_max_position_embeddings") or whole, rope.get("attention_factor")
    factor = rope.get("factor", 1 if kind is None else None)
    for key, value in (("factor", factor), ("attention_factor", attention), ("the original length", original)):
        if not isinstance(value, int | float | None):
            raise ValueError(f"{where}: {key} must be a number, got {value!r}")
    if factor is None and kind in ("yarn", "longrope"):
        factor = whole / original
    if attention is None and kind in ("yarn", "longrope"):
        attention = 1 if factor <= 1 else "above 1"
    plain = _Rope(theta)
    if kind in ("default", "dynamic"):  # dynamic: only beyond the model's length
        return plain, None
    if factor == 1 and (kind in (None, "linear") or (kind == "yarn" and attention == 1)):
        return plain, None
    if kind == "llama3":
        if missing := [key for key in _LLAMA3_KEYS if rope.get(key) is None]:
            raise ValueError(f"{where}: rope_type llama3 without {', '.join(missing)}")
        return plain._replace(rope_scaling=RopeScaling(*(rope[key] for key in _LLAMA3_KEYS))), None
    if kind == "longrope" and attention == 1 and rope.get("short_factor"):
        short, long = (tuple(map(float, rope.get(f"{side}_factor") or ())) for side in ("short", "long"))
        limit = None if short == long else _Limit(original, f"the long_factor of rope_type {kind!r}")
        return plain._replace(rope_factors=short if set(short) != {1.0} else ()), limit
    raise ValueError(
        f"{where}: rope_type {kind!r} with factor {factor} is not supported (default, llama3, dynamic, linear and yarn "
        "of factor 1, and longrope without an attention_factor are); if the weights were trained without it, remove it"
    )


def from_gguf(
    fields: Mapping[str, Any],
    source: str,
    *,
    tied: bool,
    rope_factors: Iterable[float] = (),
    length: int | None = None,
    note: Note = lambda text: None,
) -> Config:
    """The decoder's config from a GGUF file's metadata; as `from_hf`.

    `tied`: the file has no `output.weight`. `rope_factors`: per-frequency divisors, the tensor `rope_freqs.weight`.
    """
    family = fields.get("general.architecture")
    if family not in _GGUF_FAMILIES:
        raise ValueError(f"{source}: general.architecture {family!r} is not known; known: {', '.join(_GGUF_FAMILIES)}")
    needed = ("embedding_length", "block_count", "attention.head_count", "feed_forward_length")
    missing = [f"{family}.{key}" for key in (*needed, "context_length") if f"{family}.{key}" not in fields]
    if missing:
        raise ValueError(f"{source}: missing {', '.join(missing)}")

    def field(key: str, default: Any = None) -> Any:
        value = fields.get(f"{family}.{key}", default)
        if isinstance(value, Sized) and not isinstance(value, str):
            raise ValueError(f"{source}: {family}.{key} differs from layer to layer, which is not supported")
        return value

    width, heads, whole = field("embedding_length"), field("attention.head_count"), field("context_length")
    head_dim = field("attention.key_length", width // heads)
    _refuse_unread({key: field(key) for key in _UNREAD_GGUF}, _UNREAD_GGUF, head_dim, f"{source}: {family}.")
    # As in llama.cpp: a factor without a type is linear, and the type "none" disables the factor.
    scaling, window = field("rope.scaling.type"), field("attention.sliding_window")
    key = "rope.scale_linear" if field("rope.scaling.factor") is None else "rope.scaling.factor"
    neutral = scaling in (None, "linear", "yarn") and field(key) in (None, 0, 1)
    if scaling != "none" and not neutral:
        raise ValueError(
            f"{source}: {family}.rope.scaling.type {scaling!r} with {family}.{key} {field(key)} is not supported; if "
            "the weights were trained without scaling, set the type to 'none'"
        )
    limits = [_Limit(window, f"{family}.attention.sliding_window {window}")] if window else []
    vocab = field("vocab_size") or len(fields.get("tokenizer.ggml.tokens", ()))
    # Stored as float32: its shortest decimal form (1e-5, not 9.99999975e-06).
    eps = float(str(np.float32(field("attention.layer_norm_rms_epsilon", 1e-5))))
    theta = float(field("rope.freq_base", 10000.0))
    rope = _rope_of_factors(theta, head_dim, tuple(map(float, rope_factors)))
    return _checked(
        source,
        vocab=vocab,
        embed=width,
        layers=field("block_count"),
        heads=heads,
        kv_heads=field("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp=field("feed_forward_length"),
        **rope._asdict(),
        norm_eps=eps,
        max_length=_within(limits, whole, length, source, note),
        tied=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _rope_of_factors(theta: float, head_dim: int, factors: tuple[float, ...]) -> _Rope:
    """Per-frequency divisors, as Llama 3's `RopeScaling` where they are equal to it."""
    if set(factors) <= {1.0}:
        return _Rope(theta)
    llama3 = RopeScaling(max(factors), *_LLAMA3_PUBLISHED)
    plain = theta ** (-np.arange(head_dim // 2) / (head_dim // 2))
    turns = llama3.original_length * plain / (2 * np.pi)
    keep = np.clip((turns - llama3.low_freq_factor) / (llama3.high_freq_factor - llama3.low_freq_factor), 0, 1)
    expected = 1 / (keep + (1 - keep) / llama3.factor)
    if len(factors) == len(expected) and np.allclose(factors, expected, rtol=1e-4, atol=0):
        return _Rope(theta, llama3)
    return _Rope(theta, rope_factors=factors)


def interleaved(fields: Mapping[str, Any]) -> bool:
    """Whether a GGUF file interleaves the rotary halves in q's and k's rows, as those of llama do."""
    return fields.get("general.architecture") == "llama"


def _checked(source: str, **numbers: Any) -> Config:
    """`Config(**numbers)`, once its sizes are checked."""
    for key in ("vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_length"):
        value = numbers[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{source}: {key} must be a whole number of at least 1, got {value!r}")
    if numbers["heads"] % numbers["kv_heads"]:
        raise ValueError(f"{source}: {numbers['heads']} heads do not share {numbers['kv_heads']} kv heads evenly")
    if numbers["head_dim"] % 2:
        raise ValueError(f"{source}: head_dim {numbers['head_dim']} is odd, and rotary embedding needs pairs")
    factors = numbers.get("rope_factors") or ()
    if factors and (len(factors) != numbers["head_dim"] // 2 or not all(0 < factor < math.inf for factor in factors)):
        count = numbers["head_dim"] // 2
        raise ValueError(f"{source}: rotary factors must be positive, for {count} frequencies, got {list(factors)}")
    return Config(**numbers)
