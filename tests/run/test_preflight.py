"""What is looked at before a run: real exports that fit, and each way in which they do not."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of, fails, here, lines_so_far, random_params, succeeds
from safetensors.numpy import load_file, save_file

from jaxkd.core.types import Batch
from jaxkd.data import tokenize
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.run import preflight
from jaxkd.run.open_models import Model, Models
from jaxkd.run.teacher import Teachers
from jaxkd.teachers.online import no_teacher

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def changed(source: Path, target: Path, norm: float) -> Path:
    """A copy of a model whose last norm's scale is multiplied."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * norm}, target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def exports(undisturbed, tmp_path_factory) -> dict[str, Path]:
    """A trained student and one that is less sure of what it knows, as directories of their own."""
    directory = tmp_path_factory.mktemp("exports")
    assert here("export", "--workdir", str(undisturbed), "--output", str(directory / "late")).returncode == 0
    return {"late": directory / "late", "early": changed(directory / "late", directory / "early", 0.3)}


def models(teacher: Path, student: Path) -> list[str]:
    return [
        f"--config.teacher.path={teacher}",
        f"--config.student.path={student}",
        "--config.student.layers=()",
        "--config.data.tokenizer=teacher",
    ]


def test_models_that_fit_are_told_so(arguments, exports, tmp_path):
    output = succeeds("check", *arguments, *models(exports["late"], exports["early"]))
    for expected in ("tokenizers", "two passes", "held-out rows: teacher", "teacher: loss changed", "MFLOP"):
        assert expected in output
    teacher = changed(exports["late"], tmp_path / "loud", -40)
    assert "no better than guessing" in fails("check", *arguments, *models(teacher, exports["early"]))


@pytest.mark.slow
def test_a_student_ahead_of_its_teacher_is_stopped_before_the_first_step(arguments, exports, tmp_path):
    swapped = models(exports["early"], exports["late"])
    command = ["train", "--workdir", str(tmp_path / "run"), *arguments, *swapped, "--config.run.steps=2"]
    assert "worse than the student's" in fails(*command)
    assert not lines_so_far(tmp_path / "run")
    succeeds(*command, "--no-check")


def test_chat_templates_are_compared_by_what_they_write():
    def check(**templates):
        side = lambda text: MODEL._replace(
            tokenizer=replace(own, generation=replace(own.generation, templates={"default": text}))
        )
        sides = {name: side(text) for name, text in templates.items()}
        return preflight._chat(Models(sides["student"], {"teacher": sides["teacher"]}, own, own.vocab))

    own = tokenize.byte_tokenizer()
    assert "render the same text" in check(teacher=CHATML, student=CHATML.replace("m.role", "m['role']"))
    with pytest.raises(ValueError, match=r"character 0 on: '<\|user\|>.*'user: What"):
        check(teacher=CHATML, student=CHATML.replace("<|{{ m.role }}|>", "{{ m.role }}: "))


CONFIG = Config(vocab=50, embed=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp=16, vocab_multiple=64)
MODEL = Model(CONFIG, *[None] * 4)


def batch() -> Batch:
    weights = np.ones((2, 8), np.float32)
    weights[:, -1] = 0
    tokens = np.random.default_rng(0).integers(0, 50, (2, 8))
    return batch_of(tokens, weights=weights, row=np.arange(2, dtype=np.int32))


def looked_at(forward) -> str:
    return preflight._forward("teacher", MODEL._replace(forward=forward), random_params(CONFIG, 0, 0.5), batch(), 50)


def test_padding_dtypes_and_two_passes():
    assert float(looked_at(partial(transformer.forward, CONFIG)).split("by ")[1].split(" nats")[0]) < 1e-5

    # Padding that reaches the tokens.
    def leaks(params, batch, dtype=jnp.float32):
        output = transformer.forward(CONFIG, params, batch, dtype=dtype)
        return output._replace(head=output.head._replace(hidden=output.head.hidden * (1 + 0.1 * batch.tokens.shape[1])))

    with pytest.raises(ValueError, match="attends to padding"):
        looked_at(leaks)

    # A dtype that is too narrow.
    def coarse(params, batch, dtype=jnp.bfloat16):
        output = transformer.forward(CONFIG, params, batch)
        hidden = output.head.hidden
        return output._replace(head=output.head._replace(hidden=hidden if dtype == jnp.float32 else 3 * hidden))

    with pytest.raises(ValueError, match=r"teacher\.dtype=float32"):
        looked_at(coarse)
    # Two passes that differ.
    calls = iter([1.0, 1.5])
    sums = lambda *_: preflight.compare.Sums(
        *[jnp.asarray(x) for x in (next(calls), *[1.0] * (len(preflight.compare.Sums._fields) - 1))]
    )
    teachers = Teachers(no_teacher(), no_teacher())
    loaded = preflight.Loaded(Models(MODEL, {}, None, 50), None, {}, teachers, {}, {}, sums)
    with pytest.raises(ValueError, match="two passes"):
        list(preflight._losses(loaded, batch()))
