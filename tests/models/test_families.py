"""Config translation: what is read, refused by name, and exported."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models import families, transformer
from jaxkd.models.transformer import Config, RopeScaling

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
NEW = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
NEW |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 1024}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
SHORT = {"original_max_position_embeddings": 1024, "factor": 1.0}
GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.vocab_size": 49152,
}
SMOLLM2 = Config(49152, 576, 30, 9, 3, 64, 1536, rope_theta=100000.0, norm_eps=1e-5, max_length=8192)


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def test_reads_each_family():
    assert families.from_hf(LLAMA, "x") == SMOLLM2
    assert families.from_hf(MISTRAL, "x") == SMOLLM2
    assert families.from_hf(QWEN2, "x").qkv_bias
    qwen3 = families.from_hf(QWEN3 | {"tie_word_embeddings": False}, "x")
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.tied) == (True, 128, False)
    old = families.from_hf(without(LLAMA, "num_key_value_heads", "rope_theta"), "x")
    assert (old.kv_heads, old.rope_theta) == (9, 10000.0)


def test_reads_both_rope_layouts():
    """`rope_scaling` replaces `rope_parameters` as in transformers, whichever of the two was added by hand."""
    bare = without(LLAMA, "rope_theta")
    new = bare | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}
    assert families.from_hf(new, "x") == SMOLLM2
    wanted = RopeScaling(8.0, 1.0, 4.0, 1024)
    old_style = LLAMA | {"rope_scaling": {"rope_type": "llama3", **SCALING}}
    new_style = bare | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}}
    assert families.from_hf(old_style, "x").rope_scaling == wanted
    assert families.from_hf(new_style, "x").rope_scaling == wanted
    assert families.from_hf(new_style, "x").rope_theta == 5e5
    # Whichever of the two was added by hand.
    plain, llama3 = {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "llama3", "rope_theta": 2e5, **SCALING}
    both = families.from_hf(LLAMA | {"rope_parameters": plain, "rope_scaling": llama3}, "x")
    assert (both.rope_theta, both.rope_scaling) == (2e5, RopeScaling(8.0, 1.0, 4.0, 1024))
    both = families.from_hf(LLAMA | {"rope_parameters": llama3, "rope_scaling": plain}, "x")
    assert (both.rope_theta, both.rope_scaling) == (5e5, None)
    top = families.from_hf(LLAMA | {"rope_parameters": plain, "rope_scaling": without(llama3, "rope_theta")}, "x")
    assert top.rope_theta == 100000.0  # the top level's, not that of the block that is replaced
    top = families.from_hf(LLAMA | {"rope_scaling": llama3, "original_max_position_embeddings": 2048}, "x")
    assert top.rope_scaling.original_length == 2048


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": "qwen3_moe"}, "model_type"),
        ({}, "model_type"),
        (without(LLAMA, "vocab_size", "rms_norm_eps"), "vocab_size, rms_norm_eps"),
        (without(QWEN2, "num_key_value_heads"), "num_key_value_heads"),
        (without(QWEN3, "head_dim"), "head_dim"),
        (without(QWEN2, "rope_theta"), "rope_theta"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA | {"attention_bias": True}, "attention_bias"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias"),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        (LLAMA | {"hidden_size": 577}, "hidden_size 577"),
        (LLAMA | {"num_key_value_heads": 4}, "4 kv heads"),
        (LLAMA | {"head_dim": 63}, "head_dim 63"),
        (LLAMA | {"intermediate_size": "big"}, "mlp"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (NEW | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 0.5}}, "rope_type 'yarn'"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 1024}}, "factor 8"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_type 'linear'"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        (LLAMA | {"rope_scaling": LONGROPE | {"factor": 4.0}}, "rope_type 'longrope'"),
        (LLAMA | {"rope_scaling": LONGROPE | {"short_factor": None}}, "rope_type 'longrope'"),
        (LLAMA | {"rope_scaling": LONGROPE | {"short_factor": [1.5], "long_factor": [1.5]}}, "32 frequencies"),
        (LLAMA | {"rope_scaling": LONGROPE | {"short_factor": [0.0] * 32}}, "rotary factors"),
        (LLAMA | {"rope_scaling": LONGROPE | SHORT}, "long_factor"),
        (NEW | {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
        (NEW | {"rope_scaling": {"rope_type": "llama3", **SCALING}}, "rope_theta"),
        (QWEN3 | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        (LLAMA | {"logit_scale": 0.0625}, "logit_scale"),
        (LLAMA | {"logits_scaling": 8.0}, "logits_scaling"),
        (LLAMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (LLAMA | {"attn_logit_softcapping": 50}, "attn_logit_softcapping"),
        (LLAMA | {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar .*64"),
        (LLAMA | {"attention_multiplier": 0.0078125}, "attention_multiplier .*0.125"),
        (LLAMA | {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        (LLAMA | {"residual_multiplier": 0.22}, "residual_multiplier"),
        (LLAMA | {"use_qk_norm": True}, "use_qk_norm"),
        (without(MISTRAL, "sliding_window"), "sliding_window 4096"),
        (MISTRAL | {"sliding_window": 4096}, "sliding_window 4096"),
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, "sliding_window"),
        (QWEN3 | {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["a"]}, "sliding_window"),
    ],
)
def test_refuses_by_name(config, message):
    with pytest.raises(ValueError, match=f"some/config.json: .*{message}"):
        families.from_hf(config, "some/config.json")


@pytest.mark.parametrize(
    "config",
    [
        MISTRAL | {"sliding_window": 8192},
        QWEN2 | {"sliding_window": 64, "use_sliding_window": False},
        QWEN2 | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 30},
        QWEN3 | {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 30},
        LLAMA | {"attention_bias": False, "mlp_bias": False, "rope_scaling": None, "pretraining_tp": 1},
        LLAMA
        | {"logit_scale": 1.0, "final_logit_softcapping": None, "attn_logit_softcapping": 0, "use_qk_norm": False},
        LLAMA | {"query_pre_attn_scalar": 64, "attention_multiplier": 0.125, "partial_rotary_factor": 1.0},
        NEW | {"rope_scaling": {}},
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 1.0}},
        LLAMA | {"rope_scaling": {"type": "yarn", "factor": 1.0}},
        LLAMA | {"rope_scaling": {"type": None, "factor": 1.0}},
        LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        LLAMA | {"rope_scaling": LONGROPE},
    ],
)
def test_accepts_neutral_values(config):
    accepted = families.from_hf(config, "x")
    assert (accepted.rope_scaling, accepted.rope_factors, accepted.max_length) == (None, (), 8192)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (MISTRAL | {"sliding_window": 512}, 512),
        (QWEN2 | {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 2}, 512),
        (LLAMA | {"rope_scaling": LONGROPE | SHORT}, 1024),
        (GGUF | {"llama.attention.sliding_window": 512}, 512),
    ],
)
def test_limits_beyond_the_row_length_are_accepted(config, tokens):
    notes = []
    read = partial(families.from_gguf, tied=True) if "general.architecture" in config else families.from_hf
    accepted = read(config, "x", length=tokens, note=notes.append)
    assert (accepted.max_length, accepted.rope_factors, len(notes)) == (tokens, (), 1)
    for length in (tokens + 1, None):
        with pytest.raises(ValueError, match=f"x: .*{tokens} tokens"):
            read(config, "x", length=length)


@pytest.mark.parametrize(
    "config",
    [
        SMOLLM2,
        Config(vocab=300, embed=30, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, tied=False),
        Config(vocab=300, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, qkv_bias=True),
        Config(vocab=300, embed=32, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=64, qk_norm=True),
        Config(300, 32, 2, 4, 2, 8, 64, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 1024)),
        Config(300, 32, 2, 4, 2, 8, 64, rope_factors=(1.0, 1.0, 2.5, 8.0)),
    ],
)
def test_to_hf_is_read_back(config):
    assert families.from_hf(families.to_hf(config), "x") == config


def test_to_hf_chooses_a_family():
    small = Config(vocab=300, embed=30, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64)
    assert families.to_hf(SMOLLM2)["architectures"] == ["LlamaForCausalLM"]
    assert families.to_hf(small)["model_type"] == "mistral"  # llama requires that heads divide the width
    with pytest.raises(ValueError, match="qkv_bias and qk_norm"):
        families.to_hf(Config(8, 8, 1, 1, 1, 8, 8, qkv_bias=True, qk_norm=True))


def test_from_gguf():
    assert families.from_gguf(GGUF, "x", tied=True) == SMOLLM2
    counted = without(GGUF, "llama.vocab_size") | {"tokenizer.ggml.tokens": ["a", "b"]}
    assert families.from_gguf(counted, "x", tied=True).vocab == 2
    qwen = {key.replace("llama", "qwen2"): value for key, value in GGUF.items()}
    assert families.from_gguf(qwen | {"general.architecture": "qwen2"}, "x", tied=False).qkv_bias


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (GGUF | {"general.architecture": "gemma3"}, "general.architecture"),
        (without(GGUF, "llama.context_length"), "llama.context_length"),
        (GGUF | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "'yarn'"),
        (GGUF | {"llama.rope.scaling.type": "longrope"}, "'longrope'"),
        (GGUF | {"llama.rope.scaling.factor": 4.0}, "rope.scaling.factor"),
        (GGUF | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "rope.scaling.factor"),
        (GGUF | {"llama.rope.scale_linear": 2.0}, "rope.scale_linear"),
        (GGUF | {"llama.attention.scale": 0.25}, "llama.attention.scale .*0.125"),
        (GGUF | {"llama.logit_scale": 0.5}, "llama.logit_scale"),
        (GGUF | {"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping"),
        (GGUF | {"llama.attention.sliding_window": 512}, "sliding_window"),
        (GGUF | {"llama.expert_count": 8}, "expert_count"),
        (GGUF | {"llama.rope.dimension_count": 32}, "rope.dimension_count"),
        (GGUF | {"llama.attention.head_count_kv": [3, 1]}, "head_count_kv"),
        (without(GGUF, "llama.vocab_size"), "vocab"),
    ],
)
def test_from_gguf_refuses_by_name(fields, message):
    with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
        families.from_gguf(fields, "x.gguf", tied=True)


@pytest.mark.parametrize(
    "more",
    [
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scale_linear": 2.0},
        {"rope.scaling.type": "linear"},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0},
        {"attention.scale": float(np.float32(0.125)), "logit_scale": 1.0, "final_logit_softcapping": 0.0},
    ],
)
def test_from_gguf_accepts_neutral_values(more):
    fields = GGUF | {f"llama.{key}": value for key, value in more.items()}
    assert families.from_gguf(fields, "x", tied=True) == SMOLLM2


def llama31_factors(factor, theta=5e5, half=32):
    """As llama.cpp's converter computes them."""
    low_wave, high_wave = 8192 / 1, 8192 / 4
    for i in range(half):
        wave = 2 * np.pi * theta ** (i / half)
        smooth = (8192 / wave - 1) / (4 - 1)
        blend = 1 / ((1 - smooth) / factor + smooth)
        yield float(np.float32(1 if wave < high_wave else factor if wave > low_wave else blend))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_rope_factors(factor):
    fields = GGUF | {"llama.rope.freq_base": 5e5}
    llama3 = families.from_gguf(fields, "x", tied=True, rope_factors=llama31_factors(factor))
    assert (llama3.rope_scaling, llama3.rope_factors) == (RopeScaling(factor, 1.0, 4.0, 8192), ())
    other = tuple(float(x) for x in np.linspace(1, 8, 32))
    read = families.from_gguf(fields, "x", tied=True, rope_factors=other)
    assert (read.rope_scaling, read.rope_factors) == (None, other)
    assert families.from_gguf(fields, "x", tied=True, rope_factors=[1.0] * 32).rope_factors == ()
    with pytest.raises(ValueError, match=r"x: .*32 frequencies"):
        families.from_gguf(fields, "x", tied=True, rope_factors=other[1:])


def test_rope_factors_divide_frequencies():
    scaled = Config(300, 128, 1, 2, 2, 64, 8, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    listed = dataclasses.replace(scaled, rope_scaling=None, rope_factors=tuple(llama31_factors(8.0)))
    x, positions = np.random.default_rng(0).normal(size=(1, 5, 2, 64)), np.asarray([[0, 1, 100, 1000, 9000]])
    turned = [transformer.rotate(c, jnp.asarray(x, jnp.float32), jnp.asarray(positions)) for c in (scaled, listed)]
    np.testing.assert_allclose(turned[0], turned[1], atol=2e-3)  # angles of 9000 in float32
    plain = transformer.rotate(dataclasses.replace(scaled, rope_scaling=None), jnp.asarray(x), jnp.asarray(positions))
    assert np.abs(turned[1] - plain).max() > 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_table_is_the_decoders_tree(tied, options):
    config = Config(vocab=300, embed=30, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=64, tied=tied, **options)
    shapes, _ = transformer.abstract(config)
    flat = {(name,): leaf.shape for name, leaf in shapes.items() if name != "layers"}
    flat |= {("layers", name): leaf.shape for name, leaf in shapes["layers"].items()}
    assert {tensor.path: tensor.leaf(config) for tensor in families.table(config)} == flat


def test_layouts_of_stored_tensors():
    """llama.cpp stores row (head, half h, pair i) at (head, pair i, half h)."""
    rng = np.random.default_rng(0)
    config = Config(300, 32, 2, 4, 2, 8, 64, tied=False, qkv_bias=True, qk_norm=True)
    for tensor in families.table(config):
        array = rng.normal(size=tensor.stored)
        np.testing.assert_array_equal(families.to_stored(tensor, families.from_stored(tensor, array)), array)
    config = Config(300, 32, 2, 4, 2, 8, 64)
    by_path = {tensor.path[-1]: tensor for tensor in families.table(config)}
    stored = np.arange(32 * 32).reshape(32, 32)  # [out, in]
    q, o = (families.from_stored(by_path[name], stored) for name in "qo")
    assert q[5, 3, 2] == stored[3 * 8 + 2, 5]
    assert o[3, 2, 5] == stored[5, 3 * 8 + 2]
    k = {tensor.path[-1]: tensor for tensor in families.table(config)}["k"]
    wanted = np.arange(16 * 32).reshape(16, 32)
    stored = np.empty_like(wanted)
    for head in range(2):
        for half in range(2):
            for pair in range(4):
                stored[head * 8 + pair * 2 + half] = wanted[head * 8 + half * 4 + pair]
    np.testing.assert_array_equal(families.from_stored(k, stored, interleaved=True), families.from_stored(k, wanted))
    assert families.interleaved({"general.architecture": "llama"})
    assert not families.interleaved({"general.architecture": "qwen2"})
