"""What is looked at before a run: real exports that fit, and each way in which they do not."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from harness import here, lines, random_params, tiny_arguments, write_domain

from jaxkd.core.types import Batch
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


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def arguments(place) -> list[str]:
    domains = {name: write_domain(place / f"{name}.jsonl", seed) for seed, name in enumerate(("law", "code"))}
    return tiny_arguments(domains, place / "rows", "--config.run.mesh.data=1")


@pytest.fixture(scope="module")
def exports(place, arguments) -> dict[str, Path]:
    """A student early and late in its training, as directories of their own."""
    done = here(
        "train", "--workdir", str(place / "run"), *arguments, "--config.run.steps=12",
        "--config.run.checkpoint_every=2", "--config.run.keep_checkpoints=9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for name, step in (("early", 2), ("late", 12)):
        found[name] = place / name
        done = here("export", "--workdir", str(place / "run"), "--output", str(place / name), "--step", str(step))
        assert done.returncode == 0, done.stderr
    return found


def models(teacher: Path, student: Path) -> list[str]:
    return [
        f"--config.teacher.path={teacher}",
        f"--config.student.path={student}",
        "--config.student.layers=()",
        "--config.data.tokenizer=teacher",
    ]


def test_models_that_fit_are_told_so(place, arguments, exports):
    done = here("check", *arguments, *models(exports["late"], exports["early"]))
    assert done.returncode == 0, done.stderr
    for expected in ("tokenizers", "two passes", "held-out rows: teacher", "teacher: loss changed", "MFLOP"):
        assert expected in done.stdout


@pytest.mark.slow
def test_a_student_ahead_of_its_teacher_is_stopped_before_the_first_step(place, arguments, exports):
    command = ["train", "--workdir", str(place / "swapped"), *arguments, *models(exports["early"], exports["late"])]
    done = here(*command, "--config.run.steps=2")
    assert done.returncode == 1
    assert "worse than the student's" in done.stderr
    assert not (place / "swapped" / "metrics.jsonl").exists() or not lines(place / "swapped" / "metrics.jsonl")
    done = here(*command, "--config.run.steps=2", "--no-check")
    assert done.returncode == 0, done.stderr


def damaged(source: Path, target: Path, change) -> Path:
    """A copy of a model's directory, of which one tensor is changed."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return target


def test_weights_that_only_look_like_a_model_are_found(place, arguments, exports):
    def loud(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * -40

    teacher = damaged(exports["late"], place / "loud", loud)
    done = here("check", *arguments, *models(teacher, exports["early"]))
    assert done.returncode == 1
    assert "no better than guessing" in done.stderr


@pytest.mark.parametrize("same", [True, False])
def test_chat_templates_are_compared_by_what_they_write(place, arguments, exports, same):
    sides = {}
    for side, text in (
        ("late", CHATML),
        ("early", CHATML.replace("<|{{ m.role }}|>", "<|{{ m['role'] }}|>" if same else "{{ m.role }}: ")),
    ):
        sides[side] = place / f"chat-{side}-{same}"
        shutil.copytree(exports[side], sides[side])
        file = sides[side] / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": text}))
    done = here("check", *arguments, *models(sides["late"], sides["early"]))
    if same:
        assert "render the same text" in done.stdout, done.stderr
    else:
        assert done.returncode == 1
        assert "from character 0 on: '<|user|>" in done.stderr
        assert "'user: What" in done.stderr


# ------------------------------------------------------------------------------- one forward pass

CONFIG = Config(vocab=50, embed=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp=16, vocab_multiple=64)
MODELS = Models(None, {}, SimpleNamespace(vocab=50), 50)


def batch() -> Batch:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 8)), jnp.int32)
    ones = jnp.ones((2, 8), jnp.int32)
    weights = jnp.ones((2, 8)).at[:, -1].set(0)
    place = jnp.broadcast_to(jnp.arange(8), (2, 8))
    return Batch(tokens, jnp.roll(tokens, -1, 1), weights, ones, place, jnp.arange(2), jnp.zeros(2, jnp.int32))


def looked_at(forward) -> str:
    return preflight._forward(
        "teacher", Model(CONFIG, forward, None, None, None), random_params(CONFIG, 0, 0.5), batch(), 50
    )


def test_a_sound_forward_pass_is_untouched_by_padding():
    assert float(looked_at(partial(transformer.forward, CONFIG)).split("by ")[1].split(" nats")[0]) < 1e-5


def test_padding_that_reaches_the_tokens_is_found():
    def leaks(params, batch, dtype=jnp.float32):
        output = transformer.forward(CONFIG, params, batch, dtype=dtype)
        return output._replace(head=output.head._replace(hidden=output.head.hidden * (1 + 0.1 * batch.tokens.shape[1])))

    with pytest.raises(ValueError, match="attends to padding"):
        looked_at(leaks)


def test_a_dtype_that_is_too_narrow_is_found():
    def coarse(params, batch, dtype=jnp.bfloat16):
        output = transformer.forward(CONFIG, params, batch)
        hidden = output.head.hidden
        return output._replace(head=output.head._replace(hidden=hidden if dtype == jnp.float32 else 3 * hidden))

    with pytest.raises(ValueError, match=r"teacher\.dtype=float32"):
        looked_at(coarse)


def test_two_passes_that_differ_are_found():
    calls = iter([1.0, 1.5])
    sums = lambda *_: preflight.compare.Sums(
        *[jnp.asarray(x) for x in (next(calls), *[1.0] * (len(preflight.compare.Sums._fields) - 1))]
    )
    teachers = Teachers(no_teacher(), no_teacher())
    loaded = preflight.Loaded(MODELS, None, {}, teachers, {}, {}, sums)
    with pytest.raises(ValueError, match="two passes"):
        list(preflight._losses(loaded, batch()))
