"""Runs with teachers of every kind, through the command line: cached, reduced, several, the student itself."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import Background, assert_same_run, fails, here, lines, process_environment, recipe, succeeds

from jaxkd.report.records import read_run
from jaxkd.run import job
from jaxkd.teachers.store import Store

CE = "--config.objective.kd.divergence=cross_entropy"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cached")


def good(verb: str, *arguments: str) -> str:
    # What is checked before a run has tests of its own, in test_preflight.py.
    return succeeds(verb, *(["--no-check"] if verb == "train" else []), *arguments)


def teacher(root: Path, name: str, **values) -> list[str]:
    options = {"cache": root / name, **values}
    return [f"--config.teacher.{key}={value}" for key, value in options.items()]


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in lines(workdir / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("name", "values", "tolerance"),
    [
        ("hidden32", {"signal": "hidden", "stored": "float32"}, 2e-6),
        pytest.param("hidden8", {"signal": "hidden", "stored": "int8"}, 2e-4, marks=pytest.mark.slow),
        pytest.param("every", {"signal": "top_k", "entries": 257, "stored": "float32"}, 2e-5, marks=pytest.mark.slow),
    ],
)
def test_a_cached_teacher_trains_as_the_live_one(root, arguments, undisturbed, name, values, tolerance):
    """Of the model only its head is loaded; `evaluate` and `check` read the cache too."""
    options, workdir = teacher(root, name, **values), root / f"run-{name}"
    assert "bytes per token" in good("cache", *arguments, *options)
    output = good("train", "--workdir", str(workdir), *arguments, *options)
    assert losses(workdir) == pytest.approx(losses(undisturbed), rel=tolerance)
    for a, b in zip(*(lines(d / "evals.jsonl") for d in (workdir, undisturbed)), strict=True):
        assert a["teacher_nats"] == pytest.approx(b["teacher_nats"], rel=1e-5)
        assert a["kl"] == pytest.approx(b["kl"], rel=max(50 * tolerance, 1e-4))
    if name == "hidden32":
        assert re.search(r"teacher: random, .* hidden from .*hidden32, ", output)
        head = 4 * 32 * 384  # embeddings, padded to a multiple of 128
        assert read_run(workdir).teachers["teacher"].bytes_per_device == head
        assert "student" in good("evaluate", "--workdir", str(workdir))
        assert "MFLOP a token" in good("check", *arguments, *options)


def test_an_int8_teacher_is_cached_and_judged(root, arguments):
    """Held-out hidden states are stored as exactly as it computes them, and the live one is what they came from."""
    options = [*teacher(root, "narrow", signal="hidden", stored="float32"), "--config.teacher.dtype=int8"]
    good("cache", *arguments, *options)
    layout = Store(root / "narrow").layout("valid")
    assert (layout.signal, layout.dtype) == ("hidden", "bfloat16")
    checked = good("check", *arguments, *options)
    away = re.search(r"check: cache: (\S+) nats per token from its teacher", checked)
    assert away
    assert abs(float(away[1])) < 1e-6
    assert "check: held-out rows: teacher" in checked


@pytest.mark.slow
def test_draws_and_text_train(root, arguments):
    """The teacher's text from a cache; below it is written before every step."""
    options, workdir = teacher(root, "drawn", signal="sampled", entries=12), root / "run-drawn"
    assert "KL from the teacher" in good("cache", *arguments, *options, CE)
    good("train", "--workdir", str(workdir), *arguments, *options, CE)
    assert losses(workdir)[-1] < losses(workdir)[0]
    only = ["--config.objective.kd.weight=0.0", "--config.objective.kd.divergence=next_token"]
    options, workdir = teacher(root, "text", signal="token", prompt=8), root / "run-text"
    assert "tokens/s" in good("cache", *arguments, *options, *only)
    # A store serves a job of some of its domains, and what is drawn for a row stays its own.
    assert "100% of the text" in good("check", *arguments, *options, *only, "--config.data.domains.alpha=")
    good("train", "--workdir", str(workdir), *arguments, *options, *only)
    rows = lines(workdir / "metrics.jsonl")
    # A random teacher writes any byte as likely as any other; on the data's text the loss falls below 5 by now.
    assert rows[-1]["loss"] > 5.4
    assert rows[0]["tokens"] < 8 * 63 - 20  # prompts have no weight


@pytest.mark.slow
def test_a_killed_cache_goes_on_and_is_the_same(root, arguments):
    """Killed while it writes, the polite way too; the bytes are those of an undisturbed cache."""
    rows = ["--config.data.train_rows=0"]
    whole, cut = (teacher(root, name, signal="top_k", entries=8) for name in ("whole", "cut"))
    good("cache", *arguments, *rows, *whole)
    command = [sys.executable, "-m", "jaxkd", "cache", *arguments, *rows, *cut]
    for number in range(2):
        process = subprocess.Popen(
            command, env=process_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        files = lambda: list((root / "cut").rglob("*.array_record*"))
        deadline = time.monotonic() + 120
        while len(files()) <= number and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal((signal.SIGKILL, signal.SIGTERM)[number])
        assert process.wait(timeout=20) in (0, -signal.SIGKILL, -signal.SIGTERM)
    good("cache", *arguments, *rows, *cut)
    both = [Store(root / name) for name in ("whole", "cut")]
    for domain, splits in both[0].manifest["sizes"].items():
        for split, count in splits.items():
            of = [store.read(domain, split, range(count)) for store in both]
            assert of[0] == of[1]
    assert both[0].manifest == both[1].manifest


def test_what_does_not_fit_is_named(root, arguments):
    """One line each, before anything is loaded or trained."""
    options = teacher(root, "small", signal="top_k", entries=8)
    assert "jaxkd cache" in fails("train", "--workdir", str(root / "none"), *arguments, *options)
    good("cache", *arguments, *options)
    output = fails(
        "train", "--workdir", str(root / "other"), *arguments, *teacher(root, "small", signal="top_k", entries=4)
    )
    assert re.search(r"entries.*8.*4", output)
    output = fails("train", "--workdir", str(root / "other"), *arguments, *options, "--config.run.seed=1")
    assert "fingerprint" in output  # a random teacher of another seed is another teacher
    build = lambda *more: job.build(recipe(*arguments, *more))
    for more, expected in (
        ([*options, "--config.objective.kd.temperature=2.0"], "stored at temperature 1.0, not at 2.0"),
        ([*options, "--config.objective.kd.standardize=True"], "standardising"),
        ([*options, "--config.teacher.stored=int8"], "uint8, float32"),
        (["--config.teacher.signal=sampled"], "linear in p"),
        (["--config.teacher.signal=token"], "no distribution"),
    ):
        with pytest.raises(ValueError, match=expected):
            build(*more)
    assert "teacher.cache" in fails("cache", *arguments)


SHAPE = {"vocab": 257, "embed": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64}
WIDE = {"embed": 48, "heads": 6}


def keys(block: str, values: dict) -> list[str]:
    return [f"--config.{block}.{key}={value}" for key, value in values.items()]


def members(**domains: str) -> list[str]:
    """Two teachers of unequal width; `domains` names the only one that each of them serves."""
    given = ["--config.teacher.path="]
    for name, shape in (("one", SHAPE), ("two", SHAPE | WIDE)):
        block = f"teacher.members.{name}"
        given += [*keys(block, {"path": "random", "weight": 0.5}), *keys(f"{block}.shape", shape)]
        given += keys(f"{block}.domains", {domains[name]: 1.0} if domains else {})
    return given


@pytest.mark.slow
def test_several_teachers_train_and_are_evaluated(root, arguments):
    workdir = root / "many"
    output = good("train", "--workdir", str(workdir), *arguments, *members())
    assert "teacher one: random" in output
    assert "teacher two: random" in output
    assert losses(workdir)[-1] < losses(workdir)[0]
    assert len({row["teacher_nats"] for row in lines(workdir / "evals.jsonl") if row["domain"] == "alpha"}) == 1
    assert "student" in good("evaluate", "--workdir", str(workdir))


@pytest.mark.slow
def test_members_may_be_cached_each_for_its_own_domains(root, arguments):
    """One teacher's hidden states for one domain, another's for the other: trained as the live ones."""
    route = members(one="alpha", two="beta")
    for name, other, seed, shape in (("one", "beta", 0, {}), ("two", "alpha", 2, WIDE)):
        cached = teacher(root, f"member-{name}", signal="hidden", stored="float32")
        more = [*keys("teacher.shape", shape), f"--config.run.seed={seed}", f"--config.data.domains.{other}="]
        good("cache", *arguments, *cached, *more)
    caches = [f"--config.teacher.members.{name}.cache={root / f'member-{name}'}" for name in ("one", "two")]
    for name, more in (("members", caches), ("members-live", [])):
        good("train", "--workdir", str(root / name), *arguments, *route, *more)
    assert losses(root / "members") == pytest.approx(losses(root / "members-live"), rel=1e-5)


@pytest.mark.slow
def test_features_learn_from_cached_hidden_states(root, arguments):
    feature = ["--config.objective.kd.divergence=", "--config.objective.kd.feature=hidden_mse(layers={-1: -1})"]
    options = teacher(root, "hidden32", signal="hidden", stored="float32")
    good("cache", *arguments, *options)
    for name, more in (("features-cached", options), ("features-live", [])):
        good("train", "--workdir", str(root / name), *arguments, *more, *feature)
    assert losses(root / "features-cached") == pytest.approx(losses(root / "features-live"), rel=1e-5)
    sparse = teacher(root, "hidden32", signal="top_k", entries=8)
    assert "objective.kd.feature" in fails(
        "train", "--workdir", str(root / "features-no"), *arguments, *sparse, *feature
    )
    deep = "--config.objective.kd.feature=hidden_mse(layers={1: 2})"
    assert "objective.kd.feature" in fails(
        "train", "--workdir", str(root / "features-no"), *arguments, *options, feature[0], deep
    )


@pytest.mark.slow
def test_a_student_teaches_itself_and_its_average_is_kept(root, arguments):
    """Stopped half-way and continued, the run is the undisturbed one to the last bit."""
    self_taught = [
        "--config.teacher.path=self", "--config.teacher.decay=0.9", "--config.student.path=random",
        "--config.student.layers=()", *keys("student.shape", SHAPE | {"layers": 2}),
    ]  # fmt: skip
    whole, parts = root / "self", root / "self-parts"
    good("train", "--workdir", str(whole), *arguments, *self_taught)
    assert lines(whole / "evals.jsonl")[-1]["kl"] > 1e-4
    Background(parts, [*arguments, *self_taught]).kill_at(5)
    good("train", "--workdir", str(parts), *arguments, *self_taught)
    assert_same_run(parts, whole)
    assert "student" in good("evaluate", "--workdir", str(whole))


TEXT = (
    "--config.teacher.signal=token",
    "--config.teacher.prompt=8",
    "--config.objective.kd.weight=0.0",
    "--config.objective.kd.divergence=next_token",
)


@pytest.mark.slow
def test_a_killed_run_writes_the_same_text_again(arguments, tmp_path):
    arguments = [*arguments, *TEXT]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert here("train", "--no-check", "--workdir", str(whole), *arguments).returncode == 0
    rows = lines(whole / "metrics.jsonl")
    # A random teacher writes any byte as likely as any other; on the data's text the loss falls below 5 by now.
    assert rows[-1]["loss"] > 5.4
    assert rows[0]["tokens"] < 8 * 63 - 20  # prompts have no weight
    Background(killed, arguments).kill_at(8)  # behind a checkpoint, before the last step
    output = succeeds("train", "--workdir", str(killed), *arguments)
    assert "resuming at step" in output
    assert_same_run(killed, whole)
