"""Shapes of published models by Hugging Face name, from their `config.json`, to plan with where the weights are not."""

from pathlib import PurePath
from typing import Any

from jaxkd.models.transformer import Config, RopeScaling


def _llama(embed: int, layers: int, heads: int, head_dim: int, mlp: int, tied: bool) -> Config:
    rope: dict[str, Any] = {"rope_theta": 5e5, "rope_scaling": RopeScaling(32.0 if tied else 8.0, 1.0, 4.0, 8192)}
    return Config(128_256, embed, layers, heads, 8, head_dim, mlp, tied=tied, max_length=131_072, **rope)


def _qwen3(embed: int, layers: int, heads: int, mlp: int, tied: bool) -> Config:
    more: dict[str, Any] = {"qk_norm": True, "norm_eps": 1e-6, "max_length": 40_960, "rope_theta": 1e6}
    return Config(151_936, embed, layers, heads, 8, 128, mlp, tied=tied, **more)


def _qwen1_5(vocab: int, embed: int, layers: int, heads: int, mlp: int) -> Config:
    more: dict[str, Any] = {"qkv_bias": True, "norm_eps": 1e-6, "max_length": 32_768, "rope_theta": 1e6}
    return Config(vocab, embed, layers, heads, heads, 128, mlp, tied=False, **more)


MODELS = {
    "meta-llama/Llama-3.1-8B": _llama(4096, 32, 32, 128, 14_336, False),
    "meta-llama/Llama-3.1-70B": _llama(8192, 80, 64, 128, 28_672, False),
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 32, 64, 8192, True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 24, 128, 8192, True),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, True),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12_288, False),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 17_408, False),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 64, 25_600, False),
    "Qwen/Qwen1.5-1.8B": _qwen1_5(151_936, 2048, 24, 16, 5504),
    "Qwen/Qwen1.5-14B": _qwen1_5(152_064, 5120, 40, 40, 13_696),
    "HuggingFaceTB/SmolLM2-135M": Config(49_152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5, max_length=8192),
}


def shape(path: str) -> Config | None:
    """The shape of a model by its name, or by a directory of that name; None for an unknown one.

    Instruction-tuned models have the shape of their base.
    """
    name = PurePath(path).name.lower().removesuffix("-instruct").removesuffix("-chat")
    return {PurePath(full).name.lower(): config for full, config in MODELS.items()}.get(name)
