"""Whole runs in which student and teacher write the rows."""

import html
import json

import pytest
from harness import Background, assert_same_run, fails, lines, logged, succeeds, write_tokenizer

ON_POLICY = (
    "--config.data.rollout.student=0.5",
    "--config.data.rollout.teacher=0.25",
    "--config.data.rollout.prompt=8",
    "--config.data.rollout.length=16",
    "--config.run.rollout_every=2",
    "--config.data.interval=6",
    "--config.run.samples=3",
)
SHAPE = {"vocab": 257, "embed": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64}
WRITTEN = ("samples.jsonl", "diagnostics.jsonl")
REPLAYED = (
    "--config.data.rollout.student=0.6",
    "--config.data.rollout.buffer=16",
    "--config.data.rollout.adaptive=0.1",
)


@pytest.fixture(scope="module")
def on_policy(arguments):
    return [*arguments, *ON_POLICY, "--config.run.keep_checkpoints=9"]


@pytest.fixture(scope="module")
def run(on_policy, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rollouts") / "run"
    succeeds("train", "--workdir", str(workdir), *on_policy, *REPLAYED)
    return workdir


@pytest.mark.slow
def test_a_run_resumed_between_a_rollout_and_its_step_has_the_same_bits(run, on_policy):
    """Step 3 trains on the text that was written before it; the buffer is not empty."""
    rows = lines(run / "metrics.jsonl")
    assert all(0 < row.get("rollout_tokens", 1) <= 16 for row in rows)
    assert 0.2 < sum(row["rollout_share"] for row in rows) / len(rows) < 0.9
    before, texts = logged(run), [lines(run / name) for name in WRITTEN]
    succeeds("rollback", "--workdir", str(run), "--step", "3")
    printed = succeeds("train", "--workdir", str(run), *on_policy, *REPLAYED)
    assert "resuming at step 3" in printed
    assert logged(run) == before
    assert [lines(run / name) for name in WRITTEN] == texts


@pytest.mark.slow
def test_an_evaluation_continues_fixed_prompts(run):
    samples, figures = (lines(run / name) for name in WRITTEN)
    assert [row["step"] for row in figures] == [0, 6, 12]
    assert figures[0]["importance_ratio"] == pytest.approx(1, abs=1e-4)
    assert figures[0].keys() >= {
        "reverse_kl",
        "student_entropy",
        "teacher_mass",
        "overlap",
        "tokens",
        "ended",
        "distinct_2",
    }
    by_author = lambda author, step: [row for row in samples if (row["author"], row["step"]) == (author, step)]
    prompts = [row["prompt"] for row in by_author("teacher", 0)]
    assert len(prompts) == 3
    assert all([row["prompt"] for row in by_author("student", step)] == prompts for step in (0, 6, 12))
    assert all(row["tokens"] <= 16 for row in samples)
    page = (run / "report.html").read_text()
    assert "student, step 12" in page
    assert all(html.escape(row["text"]) in page for row in by_author("teacher", 0))


@pytest.mark.slow
def test_a_run_killed_while_it_writes_has_the_same_bits(run, on_policy, tmp_path):
    workdir = tmp_path / "killed"
    Background(workdir, [*on_policy, *REPLAYED]).kill_at(4)
    succeeds("train", "--workdir", str(workdir), *on_policy, *REPLAYED)
    assert_same_run(workdir, run)


@pytest.mark.slow
def test_a_share_of_nothing_is_the_run_without_rollouts(arguments, undisturbed, tmp_path):
    """GKD's lambda of 0: the rows of the data, to the last bit."""
    workdir = tmp_path / "zero"
    zero = json.dumps({"schedule": "constant", "peak": 0.0})
    succeeds(
        "train",
        "--workdir",
        str(workdir),
        *arguments,
        f"--config.data.rollout.student={zero}",
        "--config.data.rollout.prompt=8",
    )
    bare = lambda row: {key: value for key, value in row.items() if not key.startswith("rollout")}
    assert [bare(row) for row in logged(workdir)] == logged(undisturbed)
    assert {row["rollout_share"] for row in logged(workdir)} == {0.0}


@pytest.mark.slow
def test_a_teacher_with_a_context_is_another_teacher(arguments, undisturbed, tmp_path):
    workdir = tmp_path / "context"
    more = (
        "--config.data.rollout.student=1.0",
        "--config.data.rollout.prompt=8",
        "--config.data.rollout.context=mind the price",
    )
    succeeds("train", "--workdir", str(workdir), *arguments, *more, "--config.run.steps=3")
    assert logged(workdir)[0]["kd"] > 0
    assert logged(workdir)[0]["rollout_share"] == 1.0
    assert len(lines(workdir / "samples.jsonl")) >= 8  # by default where the student writes, and not elsewhere
    assert not (undisturbed / "samples.jsonl").exists()


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def conversation(i, told):
    turns = [{"role": "user", "content": f"{i} and 1?"}, {"role": "assistant", "content": f"{i + 1}."}]
    return {"messages": turns} | ({"teacher_context": f"the sum is {i + 1}"} if told else {})


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ddk(alpha=0.5)", "doremi_proxy(eta=5.0)"])
def test_a_rule_weighs_domains_of_conversations(arguments, tmp_path, rule):
    own = [argument for argument in arguments if "domains" not in argument]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("sums", "words")}
    words = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "qzx vjk " * 3}] for i in range(60)]
    files["sums"].write_text("".join(json.dumps(conversation(i, False)) + "\n" for i in range(60)))
    files["words"].write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in words))
    more = [
        "--config.data.domains.code=", "--config.data.domains.manual=", f"--config.data.mixture={rule}",
        *(f"--config.data.domains.{name}={file}" for name, file in files.items()),
        f"--config.data.tokenizer={write_tokenizer(tmp_path, TEMPLATE)}", "--config.data.interval=4",
    ]  # fmt: skip
    succeeds("train", "--workdir", str(tmp_path / "run"), *own, *more)
    file, key = ("mixture.jsonl", "share/") if rule.startswith("ddk") else ("metrics.jsonl", "weight/")
    pairs = [(row[f"{key}sums"], row[f"{key}words"]) for row in lines(tmp_path / "run" / file)]
    assert pairs[0] != pairs[-1]
    assert all(sum(pair) == pytest.approx(1) and min(pair) > 0 for pair in pairs)


@pytest.mark.slow
def test_a_student_learns_from_itself_what_a_conversations_context_says(arguments, tmp_path):
    """Without the contexts teacher and student are one model, and there is nothing to learn."""
    own = [argument for argument in arguments if "domains" not in argument]
    tokenizer, first = write_tokenizer(tmp_path, TEMPLATE), {}
    for name in ("told", "untold"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(conversation(i, name == "told")) + "\n" for i in range(60)))
        more = [
            "--config.data.domains.code=", "--config.data.domains.manual=", f"--config.data.domains.{name}={file}",
            f"--config.data.tokenizer={tokenizer}", "--config.data.context=64", "--config.data.rollout.student=1.0",
            "--config.student.path=random", *(f"--config.student.shape.{k}={v}" for k, v in SHAPE.items()),
            "--config.teacher.path=self", "--config.teacher.decay=1.0", "--config.teacher.shape=None",
            "--config.student.layers=None", "--config.objective.ce.weight=0.0", "--config.run.steps=1",
            "--config.run.samples=2",
        ]  # fmt: skip
        succeeds("train", "--workdir", str(tmp_path / f"run-{name}"), *own, *more)
        [first[name]] = logged(tmp_path / f"run-{name}")
    assert first["told"]["kd"] > 1e-5
    assert first["untold"]["kd"] == pytest.approx(0, abs=1e-6)
    assert first["told"]["rollout_share"] == first["untold"]["rollout_share"] == 1


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--config.data.rollout.student=0.6", "--config.data.rollout.teacher=0.6"), "data.rollout.teacher"),
        (("--config.data.rollout.buffer=8",), "data.rollout.student"),
        (("--config.data.rollout.student=1.0", "--config.data.rollout.prompt=64"), "data.length"),
        (("--config.data.rollout.student=1.0", "--config.run.rollout_every=7"), "run.rollout_every"),
        (("--config.data.rollout.student=1.0", "--config.data.rollout.top_p=0.0"), "data.rollout.top_p"),
        (
            ("--config.data.rollout.student=1.0", "--config.teacher.path=self", "--config.data.rollout.mix=0.2"),
            "data.rollout.mix",
        ),
        (
            ("--config.data.rollout.student=1.0", "--config.data.rollout.mix=0.2", "--config.data.rollout.proposals=4"),
            "proposals",
        ),
        (("--config.run.rollout_every=2",), "run.rollout_every"),
    ],
)
def test_settings_that_do_not_fit_are_named(arguments, tmp_path, more, named):
    assert named in fails("train", "--workdir", str(tmp_path / "run"), *arguments, *more)
    assert not (tmp_path / "run").exists()
