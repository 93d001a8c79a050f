"""A local model as functions, arrays and a tokenizer, for programs of one's own."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxkd.core.sharding import RULES, Rules, shardings
from jaxkd.core.types import PyTree
from jaxkd.data import tokenize
from jaxkd.data.tokenize import Tokenizer
from jaxkd.models import transformer, weights
from jaxkd.models.transformer import CausalLM


class LoadedModel(NamedTuple):
    """`forward(params, batch, *, taps=()) -> Output`, its parameters on their devices, and the model's tokenizer."""

    forward: CausalLM
    params: PyTree
    tokenizer: Tokenizer | None


def load_model(
    path: str | Path, *, mesh: Mesh | None = None, dtype: Any = jnp.float32, rules: Rules = RULES, remat: str = "none"
) -> LoadedModel:
    """Load a model from local files; nothing is downloaded. The tokenizer is None without tokenizer.json.

    Args:
        path: a name in `models.weights.KNOWN`, a GGUF file, or a Hugging Face directory with safetensors.
        mesh: to shard the parameters over; None for the default device. Use `forward` inside `jax.set_mesh(mesh)`.
        dtype: of parameters and activations.
        rules: mesh axes per logical axis, such as `{**RULES, "embed": ("fsdp",), "vocab": ("tensor",)}` for a mesh
            with axes of other names.
        remat: "none", or "layer" to recompute each layer in the backward pass.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
        ValueError: unsupported model, or files that are damaged or do not match each other.
    """
    checkpoint = weights.open_checkpoint(path)
    config = checkpoint.config
    if mesh is not None:  # the vocabulary's columns divide over the mesh
        ways = math.prod(mesh.shape.get(name, 1) for name in rules["vocab"])
        config = dataclasses.replace(config, vocab_multiple=math.lcm(config.vocab_multiple, ways))
    params = dataclasses.replace(checkpoint, config=config).load(dtype)
    if mesh is None:
        params = jax.device_put(params)
    else:
        shapes, axes = transformer.abstract(config)
        params = jax.device_put(params, shardings(axes, shapes, mesh, rules))
    tokenizer = tokenize.of_checkpoint(checkpoint) if checkpoint.has_tokenizer else None
    return LoadedModel(CausalLM(config, dtype, remat, rules), params, tokenizer)
