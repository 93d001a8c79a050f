"""Shapes of published models by their Hugging Face names, so that a run can be planned where their weights are not.

Sources: each model's `config.json` on Hugging Face; `tests/test_plan.py` holds the shapes against the published numbers
of parameters.
"""

from pathlib import PurePath
from typing import Any

from jaxkd.models.transformer import Config, RopeScaling


def _llama(embed: int, layers: int, heads: int, head_dim: int, mlp: int, tied: bool) -> Config:
    scaling = RopeScaling(32.0 if tied else 8.0, 1.0, 4.0, 8192)
    sizes: dict[str, Any] = {
        "vocab": 128_256,
        "kv_heads": 8,
        "max_length": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": scaling,
    }
    return Config(embed=embed, layers=layers, heads=heads, head_dim=head_dim, mlp=mlp, tied=tied, **sizes)


def _qwen3(embed: int, layers: int, heads: int, mlp: int, tied: bool) -> Config:
    sizes: dict[str, Any] = {"vocab": 151_936, "kv_heads": 8, "head_dim": 128, "max_length": 40_960, "rope_theta": 1e6}
    return Config(embed=embed, layers=layers, heads=heads, mlp=mlp, tied=tied, qk_norm=True, norm_eps=1e-6, **sizes)


def _qwen1_5(vocab: int, embed: int, layers: int, heads: int, mlp: int) -> Config:
    sizes: dict[str, Any] = {
        "kv_heads": heads,
        "head_dim": 128,
        "max_length": 32_768,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
    }
    return Config(vocab, embed, layers, heads, mlp=mlp, tied=False, qkv_bias=True, **sizes)


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
    """The shape of a model by its name, or by a directory that is called like it; None for an unknown one.

    Instruction-tuned versions have the shape of their base.
    """
    name = PurePath(path).name.lower().removesuffix("-instruct").removesuffix("-chat")
    return {PurePath(known).name.lower(): config for known, config in MODELS.items()}.get(name)
