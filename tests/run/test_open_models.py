"""Opening the models of an experiment: rows' length goes along, and what is ignored is said."""

import json

import pytest
from harness import random_params, recipe

from jaxkd.models.export import export
from jaxkd.models.generation import Generation
from jaxkd.models.transformer import Config
from jaxkd.run import open_models

WINDOWED = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}


@pytest.fixture
def directory(tmp_path):
    config = Config(257, 32, 2, 4, 2, 8, 64, max_length=128)
    tokenizer = json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
    given = {"tokenizer_json": tokenizer, "generation": Generation(), "card": {}}
    export(tmp_path / "m", config, random_params(config, 0), **given)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | WINDOWED))
    return tmp_path / "m"


def tiny(directory, *more):
    return recipe("tiny.py", f"--config.teacher.path={directory}", *more)


def test_a_window_as_long_as_the_rows_is_one_line_and_a_shorter_one_is_refused(directory, capsys):
    checkpoint, config = open_models.teacher_sources(tiny(directory), {})["teacher"]
    assert (config.max_length, len(checkpoint.notes)) == (64, 1)
    assert capsys.readouterr().err.splitlines() == [f"jaxkd: teacher {directory}: {checkpoint.notes[0]}"]
    with pytest.raises(ValueError, match=r"sliding_window 64 .*data\.length"):
        open_models.teacher_sources(tiny(directory, "--config.data.length=65"), {})
