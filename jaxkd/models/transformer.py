"""One decoder for every Llama-like family; families differ only in their `Config`.

Parameters carry logical axis names. The layers are stacked on a leading axis and scanned; the scan is split at taps.
"""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkd.core.sharding import RULES, Rules, constrain, split_length, table
from jaxkd.core.types import Batch, Head, Output, PyTree
from jaxkd.kernels.attention import Cache, cached_attention, segment_attention
from jaxkd.models.quantized import SCALE

REMAT = ("none", "layer")
TAPS = ("layer", "query", "key", "value")

CACHE_AXES = ("layers", "batch", "kv_heads", None, "head_dim")  # slots are not sharded: each step writes one


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the low rotary frequencies (`rope_scaling` in its config.json)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and options of a decoder. `vocab` is the true size; arrays are padded to a multiple of `vocab_multiple`."""

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_length: int = 2048
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    vocab_multiple: int = 128
    rope_factors: tuple[float, ...] = ()  # per-frequency divisors [head_dim / 2], instead of `rope_scaling`

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and columns of the head."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple


def _scaled(config: Config, frequency: jax.Array) -> jax.Array:
    """Rotary frequencies [head_dim / 2] after the config's scaling."""
    scaling = config.rope_scaling
    if config.rope_factors:
        return frequency / jnp.asarray(config.rope_factors, frequency.dtype)
    if scaling is None:
        return frequency
    # High frequencies are kept, low ones divided by the factor, those between interpolated by wavelength.
    turns = scaling.original_length * frequency / (2 * jnp.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rotate(config: Config, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of x [B L H d] at positions [B L], computed in float32.

    Source: RoFormer (arXiv 2104.09864), Eq. 34, with dimension i paired with i + d/2.
    """
    half = x.shape[-1] // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * _scaled(config, frequency)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (RMSNorm, arXiv 1910.07467, Eq. 4)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


_NORMAL = nn.initializers.normal(0.02)


def _declare(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Any = _NORMAL
) -> jax.Array:
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value


class Layer(nn.Module):
    """Pre-norm block: grouped-query attention, then a gated MLP."""

    config: Config
    dtype: Any = jnp.float32
    taps: tuple[str, ...] = ()  # subset of query, key, value

    def _matmul(
        self, equation: str, x: jax.Array, name: str, shape: tuple[int, ...], axes: tuple[str, ...]
    ) -> jax.Array:
        """Declares a matrix and multiplies by it, and by its scales if it is int8 (`models.quantized`)."""
        kernel = _declare(self, name, shape, axes)
        if not self.has_variable("params", name + SCALE):
            return jnp.einsum(equation, x, kernel.astype(self.dtype))
        # The all-gather happens on int8, before the cast.
        kernel = constrain(kernel, *[None if axis == "embed" else axis for axis in axes])
        scale: Any = self.get_variable("params", name + SCALE)
        return (jnp.einsum(equation, x, kernel.astype(self.dtype)) * scale).astype(self.dtype)

    def _project(self, name: str, x: jax.Array, heads: int, axis: str) -> jax.Array:
        c = self.config
        shape = (c.embed, heads, c.head_dim)
        y = self._matmul("bld,dhk->blhk", x, name, shape, ("embed", axis, "head_dim"))
        if c.qkv_bias:
            bias = _declare(self, f"{name}_bias", (heads, c.head_dim), (axis, "head_dim"), nn.initializers.zeros)
            y = y + bias.astype(self.dtype)
        return y

    def _norm(self, name: str, x: jax.Array, axis: str = "embed") -> jax.Array:
        scale = _declare(self, name, (x.shape[-1],), (axis,), nn.initializers.ones)
        return rms_norm(x, scale, self.config.norm_eps)

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | Cache, positions: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """[B L D] -> ([B L D], tapped arrays or None), as the body of a scan.

        `context` is the packed rows' segments [B L] (attention is causal within a segment), or a cache of the
        tokens before x.
        """
        c = self.config
        y = self._norm("attn_norm", x)
        query = self._project("q", y, c.heads, "heads")
        key = self._project("k", y, c.kv_heads, "kv_heads")
        value = self._project("v", y, c.kv_heads, "kv_heads")
        if c.qk_norm:
            query, key = self._norm("q_norm", query, "head_dim"), self._norm("k_norm", key, "head_dim")
        query, key = rotate(c, query, positions), rotate(c, key, positions)
        tapped = {"query": query, "key": key, "value": value}
        if isinstance(context, Cache):
            y = cached_attention(query, key, value, context)
        else:
            if split_length():  # context parallelism: queries stay sharded, keys and values are gathered
                query = constrain(query, "batch", "length", "heads", None)
                key, value = (constrain(a, "batch", None, "kv_heads", None) for a in (key, value))
            y = segment_attention(query, key, value, context)
        y = self._matmul("blhk,hkd->bld", y, "o", (c.heads, c.head_dim, c.embed), ("heads", "head_dim", "embed"))
        x = constrain(x + y, "batch", "length", None)

        y = self._norm("mlp_norm", x)
        gate, up = (self._matmul("bld,df->blf", y, name, (c.embed, c.mlp), ("embed", "mlp")) for name in ("gate", "up"))
        y = self._matmul("blf,fd->bld", nn.silu(gate) * up, "down", (c.mlp, c.embed), ("mlp", "embed"))
        x = constrain(x + y, "batch", "length", None)
        return x, {name: tapped[name] for name in self.taps} or None


class Transformer(nn.Module):
    """Embedding, stacked layers, final norm and an unmultiplied head."""

    config: Config
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens, context, positions, taps: tuple[str, ...] = ()) -> Output:
        """See `forward`; with a cache as `context`, `extend`."""
        c, shape = self.config, (self.config.padded_vocab, self.config.embed)
        embedding = _declare(self, "embed", shape, ("vocab", "embed"))
        x = constrain(embedding.astype(self.dtype)[tokens], "batch", "length", None)
        tapped: dict[str, jax.Array] = {}
        if self.is_initializing():
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=c.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(c, self.dtype, name="layers")(x, context, positions)
        elif isinstance(context, Cache):
            x, tapped = self._cached_layers(x, context, positions)
        else:
            x, tapped = self._layers(x, context, positions, taps)
        x = rms_norm(x, _declare(self, "norm", (c.embed,), ("embed",), nn.initializers.ones), c.norm_eps)
        unembed = embedding.T if c.tied else _declare(self, "unembed", shape[::-1], ("embed", "vocab"))
        return Output(Head(x, unembed), tapped)

    def _layers(self, x, segments, positions, taps) -> tuple[jax.Array, dict[str, jax.Array]]:
        stacked, depth = self.variables["params"]["layers"], self.config.layers
        inner_taps: dict[int, tuple[str, ...]] = {}  # layer -> which of query, key, value are tapped
        ends = {depth}
        for kind, number in (tap_layer(name, depth) for name in taps):
            ends.add(number)
            if kind != "layer":
                ends |= {number - 1} - {0}  # its own scan, so that no other layer stacks outputs
                inner_taps[number] = (*inner_taps.get(number, ()), kind)

        tapped: dict[str, jax.Array] = {}
        start = 0
        for stop in sorted(ends):
            kinds = inner_taps.get(stop, ())
            layer = Layer(self.config, self.dtype, kinds, parent=None)

            def body(x, params, layer=layer):
                return layer.apply({"params": params}, x, segments, positions)

            if self.remat == "layer":
                body = jax.checkpoint(body, prevent_cse=False)
            whole = (start, stop) == (0, depth)
            part = stacked if whole else jax.tree.map(lambda a, lo=start, hi=stop: a[lo:hi], stacked)
            x, stacked_taps = jax.lax.scan(body, x, part)
            tapped |= {f"{kind}_{stop}": stacked_taps[kind][0] for kind in kinds}
            if f"layer_{stop}" in taps:
                tapped[f"layer_{stop}"] = x
            start = stop
        return x, tapped

    def _cached_layers(self, x, cache: Cache, positions) -> tuple[jax.Array, dict[str, Any]]:
        layer = Layer(self.config, self.dtype, ("key", "value"), parent=None)

        # The cache is read only: the new keys and values are stacked, and `extend` writes them in one update.
        def body(x, part):
            params, keys, values = part
            return layer.apply({"params": params}, x, Cache(keys, values, cache.length), positions)

        layers = self.variables["params"]["layers"]
        if not isinstance(layers, tuple):
            return jax.lax.scan(body, x, (layers, cache.keys, cache.values))
        tapped = []
        for params, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            x, written = body(x, (params, keys[0], values[0]))
            tapped.append(written)
        return x, jax.tree.map(lambda *a: tuple(each[None] for each in a), *tapped)


def tap_layer(name: str, layers: int) -> tuple[str, int]:
    """(kind in `TAPS`, layer counted from 1) of a tap's name such as "layer_3"; ValueError where there is none."""
    kind, _, number = name.partition("_")
    if kind not in TAPS or not number.isdigit() or not 1 <= int(number) <= layers:
        raise ValueError(f"no tap '{name}': this model has {', '.join(f'{k}_1 to {k}_{layers}' for k in TAPS)}")
    return kind, int(number)


def forward(
    config: Config, params: PyTree, batch: Batch, *, taps: tuple[str, ...] = (), dtype=jnp.float32, remat: str = "none"
) -> Output:
    """Runs the decoder on packed rows; of `batch` only tokens, segments and positions [B L] are read.

    Args:
        params: nested dict of arrays, layers stacked on the leading axis; matrices may be int8 (`models.quantized`).
        taps: static names: `layer_N` [B L D] is the residual stream after N layers; `query_N` [B L H d], `key_N` and
            `value_N` [B L K d] are the attention inputs of the N-th layer, after norm and rotary embedding.
        dtype: of activations and matmul operands; parameters are cast at each use.
        remat: "none", or "layer" to save only each layer's input, and taps, for the backward pass.
    """
    args = ({"params": params}, batch.tokens, batch.segments, batch.positions)
    output: Any = Transformer(config, dtype, remat).apply(*args, taps=taps)
    return output


@dataclasses.dataclass(frozen=True, eq=False)
class CausalLM:
    """`forward` of one config, to be called as `model(params, batch, *, taps=()) -> Output`."""

    config: Config
    dtype: Any = jnp.float32  # of activations and matmul operands
    remat: str = "none"
    # Mesh axes of activations per logical axis.
    rules: Rules = dataclasses.field(default_factory=lambda: RULES, repr=False)

    def __call__(self, params: PyTree, batch: Batch, *, taps: tuple[str, ...] = ()) -> Output:
        """See `forward`."""
        with table(self.rules):
            return forward(self.config, params, batch, taps=taps, dtype=self.dtype, remat=self.remat)


def unstacked(params: PyTree) -> PyTree:
    """Parameters for `prefill` and `extend` with a tuple of layers, run without a scan and with a cache of such tuples.

    On a CPU a scan copies each layer's matrices before it multiplies by them: twice the time of a decoded token.
    """
    stack = params["layers"]
    depth = len(jax.tree.leaves(stack)[0])
    return {**params, "layers": tuple(jax.tree.map(lambda a, i=i: a[i], stack) for i in range(depth))}


def prefill(config: Config, params: PyTree, tokens: jax.Array, *, dtype=jnp.float32) -> tuple[jax.Array, Cache]:
    """Runs the decoder on rows [B P] that are one document each, from position 0.

    Returns:
        (hidden [B P D] after the final norm, a cache of P slots that holds all P tokens).
    """
    apart, shape = isinstance(params["layers"], tuple), (len(tokens), config.kv_heads, 0, config.head_dim)
    empty: Any = jnp.zeros((1 if apart else config.layers, *shape), dtype)
    empty = (empty,) * config.layers if apart else empty
    output = _extended(config, params, tokens, Cache(empty, empty, jnp.zeros(tokens.shape[0], jnp.int32)), dtype)
    slots = lambda new: constrain(new.swapaxes(2, 3), *CACHE_AXES)
    keys, values = (jax.tree.map(slots, output.taps[name]) for name in ("key", "value"))
    return output.head.hidden, Cache(keys, values, jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32))


def extend(config: Config, params: PyTree, tokens: jax.Array, cache: Cache, *, dtype=jnp.float32) -> tuple[Head, Cache]:
    """Runs the decoder on the next token of each row, with keys and values of the earlier ones from a cache.

    The result is that of `forward` on the whole rows, at the last position.

    Args:
        tokens: [B 1]; each row is one document.
        cache: of the earlier tokens, in `dtype`, with at least one free slot in each row.

    Returns:
        (head with hidden [B 1 D], the cache with the new tokens added).
    """
    head, taps, _ = _extended(config, params, tokens, cache, dtype)
    rows = jnp.arange(tokens.shape[0])
    # Nothing is written before every layer has read, or XLA copies each layer's cache at each token (jax 0.12 on CPUs).
    hidden, taps = jax.lax.optimization_barrier((head.hidden, taps))

    def written(slots: jax.Array, new: jax.Array) -> jax.Array:
        # Advanced indices around a slice come first: [B layers K d].
        slots = slots.at[:, rows, :, cache.length].set(new[:, :, 0].swapaxes(0, 1), mode="drop")
        return constrain(slots, *CACHE_AXES)

    keys = jax.tree.map(written, cache.keys, taps["key"])
    values = jax.tree.map(written, cache.values, taps["value"])
    return head._replace(hidden=hidden), Cache(keys, values, cache.length + 1)


def _extended(config: Config, params: PyTree, tokens: jax.Array, cache: Cache, dtype: Any) -> Output:
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
    output: Any = Transformer(config, dtype).apply({"params": params}, tokens, cache, positions)
    return output


@partial(jax.jit, static_argnums=0)
def init(config: Config, key: jax.Array) -> PyTree:
    """Random parameters, normal(0.02) for matrices and ones for norms."""
    return nn.meta.unbox(_boxed(config, key))


@lru_cache(maxsize=64)
def abstract(config: Config) -> tuple[PyTree, PyTree]:
    """(tree of ShapeDtypeStruct, tree of tuples of logical axis names) of the parameters; computes nothing."""
    boxed = jax.eval_shape(partial(_boxed, config), jax.random.key(0))
    shapes = nn.meta.unbox(boxed)
    axes = jax.tree.map(lambda s: tuple(s), nn.get_partition_spec(boxed), is_leaf=lambda s: isinstance(s, tuple))
    return shapes, axes


def _boxed(config: Config, key: jax.Array) -> PyTree:
    dummy = jnp.zeros((1, 2), jnp.int32)
    return Transformer(config).init(key, dummy, dummy, dummy)["params"]


def parameter_count(config: Config) -> int:
    """Number of parameters without vocabulary padding; a tied head is counted once."""
    padding = (config.padded_vocab - config.vocab) * config.embed * (2 - config.tied)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)[0])) - padding
