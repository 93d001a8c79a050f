"""Exports: round trips through our own reader, destinations, and failures that leave nothing behind."""

import errno
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from harness import random_params

from jaxkd.models import families, formats, weights
from jaxkd.models.export import export
from jaxkd.models.generation import Generation
from jaxkd.models.transformer import Config

TINY = Config(vocab=100, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, max_length=64)
UNTIED = Config(100, 32, 2, 4, 2, 8, 64, max_length=64, tied=False, qkv_bias=True)
WORDS = {f"w{i}": i for i in range(98)}
TOKENIZER = json.dumps(
    {
        "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "w0"},
        "added_tokens": [{"content": "<s>", "id": 98}, {"content": "</s>", "id": 99}],
    }
)
GIVEN = {
    "tokenizer_json": TOKENIZER,
    "generation": Generation(98, (99, 3), 4, {"top_p": 0.8}, {"eos_token": "</s>"}, {"default": "{{ messages }}"}),
    "card": {
        "name": "a student",
        "license": "apache-2.0",
        "teacher": "smollm2-135m-instruct",
        "steps": 60,
        "command": "jaxkd train --config x.py",
        "versions": {"jax": "0.10.0"},
        "base_model": "org/teacher",
        "evaluation": [{"domain": "code", "kl": 0.123456}, {"domain": "a|b", "ce": 2.0}],
    },
}


def random(config, seed=0):
    """Random also in the vocabulary padding, which must not be written."""
    return jax.tree.map(np.array, random_params(config, seed, 1.0))


@pytest.mark.parametrize("config", [TINY, UNTIED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_read_back(tmp_path, config, dtype):
    params = random(config)
    directory = export(tmp_path / "out" / "student", config, params, **GIVEN, dtype=dtype)
    assert [path.name for path in directory.parent.iterdir()] == ["student"]
    checkpoint = weights.open_checkpoint(directory)
    assert checkpoint.config == config
    names = {tensor.path[-1] for tensor, _ in checkpoint.tensors}
    assert ("unembed" in names) == (not config.tied)
    loaded = checkpoint.load()
    for tensor in families.table(config):
        find = lambda tree: (tree["layers"] if tensor.stacked else tree)[tensor.path[-1]]  # noqa: B023
        wanted = find(params).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32).astype(np.float32)
        if tensor.vocab_axis is not None:
            padding = [slice(None)] * wanted.ndim
            padding[tensor.vocab_axis] = slice(config.vocab, None)
            wanted[tuple(padding)] = 0
        np.testing.assert_array_equal(find(loaded), wanted)


def test_small_files_and_card(tmp_path):
    directory = export(tmp_path / "student", TINY, random(TINY), **GIVEN)
    read = lambda name: json.loads((directory / name).read_text())
    config, tokenizer = read("config.json"), read("tokenizer_config.json")
    ids = {"bos_token_id": 98, "eos_token_id": [99, 3], "pad_token_id": 4}
    assert config["vocab_size"] == 100
    assert config.items() >= ids.items()
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float32")
    assert read("generation_config.json") == {"top_p": 0.8, **ids}
    assert (tokenizer["eos_token"], tokenizer["pad_token"], tokenizer.get("bos_token")) == ("</s>", "w4", None)
    assert (tokenizer["model_max_length"], tokenizer["chat_template"]) == (64, "{{ messages }}")
    assert (directory / "tokenizer.json").read_text() == TOKENIZER
    assert read("jaxkd.json")["card"] == GIVEN["card"]
    # The card.
    card = (export(tmp_path / "a", TINY, random(TINY), **GIVEN) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'license: "apache-2.0"\n---\n\n# a student\n' in card
    for line in (
        "- teacher: smollm2-135m-instruct",
        "- steps: 60",
        "## command\n\n```\njaxkd train --config x.py\n```",
        "## versions\n\n- jax: 0.10.0",
        "| domain | kl | ce |\n| --- | --- | --- |\n| code | 0.1235 | - |\n| a\\|b | - | 2 |",
        "pipeline_tag: text-generation\n",
        'base_model: "org/teacher"\n',
    ):
        assert line in card
    bare = (export(tmp_path / "b", TINY, random(TINY), **GIVEN | {"card": {}}) / "README.md").read_text()
    assert "license" not in bare
    assert "teacher" not in bare
    (tmp_path / "plain").write_text("")
    assert {file.stat().st_mode for file in directory.iterdir()} == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize(
    ("settings", "ids", "marks"),
    [
        (Generation(), {}, {}),
        # As a tokenizer without configs beside it: the words follow from the ids.
        (Generation(98, (99,)), {"eos_token_id": 99, "pad_token_id": 99}, {"bos_token": "<s>", "pad_token": "</s>"}),
        # The tokenizer has no bos_token although the model's config has an id for it, as Qwen's.
        (Generation(98, (99,), 99, tokens={"eos_token": "</s>"}), {"bos_token_id": 98}, {"bos_token": None}),
    ],
)
def test_missing_special_tokens(tmp_path, settings, ids, marks):
    directory = export(tmp_path / "a", TINY, random(TINY), **GIVEN | {"generation": settings})
    written = [json.loads((directory / f"{name}_config.json").read_text()) for name in ("generation", "tokenizer")]
    assert written[0].items() >= ids.items()
    assert {name: written[1].get(name) for name in marks} == marks
    assert bool(written[0]) == bool(ids)


def test_a_qwen2_model_with_another_tokenizer_names_its_class(tmp_path):
    """Without it transformers 5 would split text as Qwen does; tests/parity compares the tokens."""
    directory = export(tmp_path / "a", UNTIED, random(UNTIED), **GIVEN)
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    module, name = tokenizer["auto_map"]["AutoTokenizer"][1].split(".")
    assert f"class {name}" in (directory / f"{module}.py").read_text()
    plain = export(tmp_path / "b", TINY, random(TINY), **GIVEN)
    assert "auto_map" not in (plain / "tokenizer_config.json").read_text()


def test_replaces_an_earlier_export_only(tmp_path):
    target = tmp_path / "student"
    target.mkdir()
    export(target, TINY, random(TINY), **GIVEN)  # an empty directory is accepted
    export(target, UNTIED, random(UNTIED), **GIVEN)
    assert weights.open_checkpoint(target).config == UNTIED
    (target / "notes.txt").write_text("mine")
    (target / "other").mkdir()
    (target / "other" / "model.safetensors").write_text("another model")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        export(target, TINY, random(TINY), **GIVEN)
    assert weights.open_checkpoint(target).config == UNTIED
    export(target, TINY, random(TINY), **GIVEN, overwrite=True)
    assert weights.open_checkpoint(target).config == TINY
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "other" / "model.safetensors").read_text() == "another model"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    with pytest.raises(FileExistsError, match=r"config\.json"):
        export(target / "config.json", TINY, random(TINY), **GIVEN)
    # Shards of an earlier export are removed.
    target = export(tmp_path / "sharded", TINY, random(TINY), **GIVEN)
    shard = target / "model-00001-of-00002.safetensors"
    (target / "model.safetensors").rename(shard)
    record = json.loads((target / "jaxkd.json").read_text())
    record["files"] = [shard.name if name == "model.safetensors" else name for name in record["files"]] + ["../kept"]
    (target / "jaxkd.json").write_text(json.dumps(record))
    (tmp_path / "kept").write_text("outside")
    export(target, UNTIED, random(UNTIED), **GIVEN)
    assert not shard.exists()
    assert (tmp_path / "kept").read_text() == "outside"


@pytest.mark.parametrize("overwrite", [False, True])
def test_destinations_that_are_refused_stay_as_they_are(tmp_path, overwrite):
    """The run itself and what holds it, checkpoints of any run, and files of another model."""
    run, store, other = tmp_path / "runs" / "a", tmp_path / "store" / "a", tmp_path / "llama"
    step = run / "checkpoints" / "10"
    for directory in (step, store, other):
        directory.mkdir(parents=True)
    (step / "commit_success.txt").write_text("")
    (other / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(run)
    before = sorted(tmp_path.rglob("*"))
    for target in ("runs/a", "runs", ".", "runs/a/out", "link", "store/a", "store"):
        with pytest.raises(ValueError, match=r"cannot export"):
            export(tmp_path / target, TINY, random(TINY), **GIVEN, overwrite=overwrite, keep_out=[run, store])
    for target in ("runs", "runs/a", "runs/a/checkpoints", "runs/a/checkpoints/10"):
        with pytest.raises(FileExistsError, match="checkpoints"):
            export(tmp_path / target, TINY, random(TINY), **GIVEN, overwrite=True)
    with pytest.raises(FileExistsError, match=r"config\.json"):
        export(other, TINY, random(TINY), **GIVEN, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before
    assert (other / "config.json").read_text() == "{}"


def test_directories_that_cannot_be_renamed(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", tmp_path / "link"):
        export(target, TINY, random(TINY), **GIVEN)
        assert weights.open_checkpoint(tmp_path / "here").config == TINY
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk(tmp_path, monkeypatch, earlier):
    target = tmp_path / "models" / "student"
    if earlier:
        export(target, TINY, random(TINY), **GIVEN)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def save(directory, tensors, *_):
        (directory / "0.part").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats, "save_safetensors", save)
    with pytest.raises(OSError, match="No space left") as caught:
        export(target, TINY, random(TINY, 1), **GIVEN)
    assert caught.value.filename == str(target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert earlier or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"generation": Generation(tokens={"bos_token": "<bos>"})}, "<bos>"),
        ({"generation": Generation(eos=(100,))}, "100"),
        ({"tokenizer_json": json.dumps({"model": {"vocab": {"a": 100}}})}, "100"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "a", TINY, random(TINY), **GIVEN | change)
    assert not list(tmp_path.iterdir())


def test_parameters_that_do_not_fit_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="layers/k_bias', 'layers/q_bias', 'layers/v_bias', 'unembed"):
        export(tmp_path / "a", TINY, random(UNTIED), **GIVEN)
    params = random(TINY)
    params["embed"] = params["embed"][:100]  # not padded
    with pytest.raises(ValueError, match=r"embed .*100.*128"):
        export(tmp_path / "a", TINY, params, **GIVEN)
    with pytest.raises(ValueError, match="gs://"):
        export("gs://bucket/a", TINY, params, **GIVEN)
    export(tmp_path / "student", TINY, random(TINY), **GIVEN)
    broken = random(TINY, 1)
    broken["norm"][0] = np.nan
    with pytest.raises(ValueError, match=r"norm .*NaN"):
        export(tmp_path / "student", TINY, broken, **GIVEN)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    kept = weights.open_checkpoint(tmp_path / "student").load()
    np.testing.assert_array_equal(kept["norm"], random(TINY)["norm"])
