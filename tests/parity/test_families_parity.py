"""Every family, saved by transformers and read by us, and back: equal logits."""

import json

import jax
import numpy as np
import pytest

from jaxkd.models import weights
from jaxkd.models.export import export
from jaxkd.models.generation import Generation

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FACTORS = [1.0, 1.5, 2.0, 4.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": FACTORS, "long_factor": FACTORS, "factor": 1.0}
UNCHANGED = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": FACTORS, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 1.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
MODELS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "vocab_size": 256}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "longrope": ("Llama", {"rope_parameters": LONGROPE}),
    "longrope, short rows": ("Llama", {"rope_parameters": UNCHANGED}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "linear 1": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4}}),
    "yarn 1": ("Llama", {"rope_parameters": YARN}),
    "mistral, short rows": ("Mistral", {"sliding_window": 100}),
    "qwen2, short rows": ("Qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}),
    "mistral": ("Mistral", {"sliding_window": None, "hidden_size": 44, "head_dim": 8}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 100))
TOKENIZER = json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
GIVEN = {"tokenizer_json": TOKENIZER, "generation": Generation(), "card": {}}


def random_model(name):
    """A model whose biases and norms are random too."""
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_read_and_exported(tmp_path, name, our_logits, their_logits):
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    theirs = their_logits(model, TOKENS)
    assert theirs.std() > 0.1

    checkpoint = weights.open_checkpoint(tmp_path / "theirs", length=TOKENS.shape[1])
    params = checkpoint.load()
    ours = our_logits(checkpoint.config, params, TOKENS)
    print(f"{name}: largest difference {np.abs(ours - theirs).max():.2e} of {np.abs(theirs).max():.2e}")
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)

    export(tmp_path / "ours", checkpoint.config, jax.device_put(params), **GIVEN)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.float32
    np.testing.assert_array_equal(their_logits(loaded, TOKENS), theirs)


def test_sharded_bfloat16(tmp_path, our_logits, their_logits):
    model = random_model("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    checkpoint = weights.open_checkpoint(tmp_path / "theirs")
    params = checkpoint.load()
    # Not `model.float()`, which would keep the rotary frequencies that `.to(bfloat16)` rounded.
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    theirs = their_logits(wide, TOKENS)
    ours = our_logits(checkpoint.config, params, TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)

    export(tmp_path / "ours", checkpoint.config, params, **GIVEN, dtype="bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    np.testing.assert_array_equal(their_logits(loaded, TOKENS), theirs)


ADDED = {
    "llama3": ({"rope_scaling": LLAMA3}, True),
    "llama3 without a base": ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}, False),
    "llama3, base at the top": ({"rope_scaling": LLAMA3 | {"factor": 8.0}, "rope_theta": 500.0}, True),
    "another base": ({"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}}, True),
    "original length at the top": ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, True),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}, False),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, False),
}


@pytest.mark.parametrize("name", ADDED)
def test_rope_scaling_added_by_hand(tmp_path, name, our_logits, their_logits):
    """To a config of transformers 5, which has `rope_parameters`: read as transformers does, or refused."""
    added, read = ADDED[name]
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["rope_parameters"]
    file.write_text(json.dumps(config | added))
    theirs = their_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), TOKENS)
    assert np.abs(theirs - their_logits(model, TOKENS)).max() > 0.01 * np.abs(theirs).max()  # it matters
    if not read:
        with pytest.raises(ValueError, match="rope"):
            weights.open_checkpoint(tmp_path)
        return
    checkpoint = weights.open_checkpoint(tmp_path)
    ours = our_logits(checkpoint.config, checkpoint.load(), TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)
