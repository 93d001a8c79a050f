"""The model card's facts, from the recipe and the run's own record."""

import json

import pytest
from harness import recipe

from jaxkd.report.records import ModelInfo, RunInfo, write_run
from jaxkd.run import model_card


def facts(workdir, *overrides):
    return model_card.facts(recipe("tiny.py", *overrides), workdir, 5)


def test_facts(tmp_path):
    trained_on = {"jax": "0.1"}
    write_run(tmp_path, RunInfo("jaxkd train", trained_on, student=ModelInfo("teacher", 12_345, 2, kept_layers=(0, 3))))
    rows = [{"step": step, "domain": "code", "kl": 0.5} for step in (0, 5)]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = facts(tmp_path, "--config.teacher.path=org/model", "--config.objective.kd.temperature=2.5")
    assert (card["base_model"], card["parameters"], card["steps"]) == ("org/model", "12,345", 5)
    assert card["kept layers"].startswith("0, 3 ")
    assert "temperature 2.5" in card["objective"]["kd"]
    for part in ("AdamW", "cosine", "weight decay", "clipped"):
        assert part in card["optimiser"]
    assert card["evaluation"] == rows[1:]
    assert card["versions"] == trained_on


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/me/models/llama", "llama"),  # nothing of this machine
        ("random", None),
    ],
)
def test_base_model(tmp_path, path, name):
    card = facts(tmp_path, f"--config.teacher.path={path}")
    assert card.get("base_model") == name
    assert "command" not in card  # unknown without run.json
