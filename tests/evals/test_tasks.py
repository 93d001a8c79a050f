"""Evaluation by task: scores of continuations, figures on known values, task files, and `jaxkd evaluate --tasks`."""

import dataclasses
import itertools
import json
import math
import re
import sys

import jax
import numpy as np
import pytest
from harness import REPOSITORY, batch_of, fails, random_params, succeeds

from jaxkd.data import tokenize
from jaxkd.evals import judge, metrics, scoring, tasks
from jaxkd.evals.scoring import Score, score
from jaxkd.evals.subject import Subject
from jaxkd.evals.verify import Verifier
from jaxkd.models.transformer import CausalLM, Config
from jaxkd.run import evaluate
from jaxkd.sampling.sampler import decoder
from jaxkd.sampling.text import Writer

CONFIG = Config(vocab=260, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, max_length=192)
VOCAB = 257  # of the byte tokenizer
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
)


@pytest.fixture(scope="module")
def subject():
    params, tokenizer = random_params(CONFIG, 0, spread=0.3), tokenize.byte_tokenizer()
    return Subject(Writer("tiny", decoder(CONFIG), params, tokenizer, 192, VOCAB), CausalLM(CONFIG))


def with_template(subject):
    tokenizer = subject.writer.tokenizer
    generation = dataclasses.replace(tokenizer.generation, templates={"default": TEMPLATE})
    tokenizer = dataclasses.replace(tokenizer, generation=generation)
    return subject._replace(writer=subject.writer._replace(tokenizer=tokenizer))


def task_file(path, header, *records):
    path.write_text("\n".join(json.dumps(line) for line in ({"task": "mine", **header}, *records)) + "\n")
    return path


def run(subject, path):
    [task] = tasks.read(path)
    result = tasks.run(task, subject, None, lambda _: subject)
    return {one.metric: one.value for one in result.scores}, result.examples


@pytest.fixture(scope="module")
def dense(subject):
    """Next-token log-probabilities [L V] of token ids [L]."""

    @jax.jit
    def run(params, batch):
        head = subject.forward(params, batch).head
        return jax.nn.log_softmax((head.hidden @ head.unembed)[0, :, :VOCAB], -1)

    def padded(ids):
        row = np.zeros(192, np.int32)
        row[: len(ids)] = ids
        return np.asarray(run(subject.writer.params, batch_of(row[None])))[: len(ids)]

    return padded


def test_scores_are_those_of_the_dense_logits_for_any_batch(subject, dense):
    forward, params = subject.forward, subject.writer.params
    rng = np.random.default_rng(0)
    sizes = [(3, 4), (2, 1), (180, 30), (5, 192), (20, 17)]
    pairs = [(rng.integers(0, VOCAB, a), rng.integers(0, VOCAB, b)) for a, b in sizes]
    scores = score(forward, params, pairs, vocab=VOCAB)
    probes = []
    for (context, continuation), got, other in zip(pairs, scores, score(forward, params, pairs, vocab=VOCAB, batch=2)):
        ids = np.concatenate([context, continuation])[-193:]
        after = dense(ids[:-1])
        want = after[np.arange(len(ids) - 1), ids[1:]][-len(continuation) :]
        np.testing.assert_allclose(got.logprobs, want, atol=2e-5)
        np.testing.assert_allclose(other.logprobs, got.logprobs, atol=2e-5)
        assert got.total == pytest.approx(want.sum(dtype=np.float64), rel=1e-6)
        best = after[-1].argmax()
        probes += [(ids[:-1], [best]), (ids[:-1], [best - 1]), (ids[:-2], [ids[-2], best])]
    greedy = [one.greedy for one in score(forward, params, probes, vocab=VOCAB)]
    assert greedy == [True, False, False] * 5
    with pytest.raises(ValueError, match="pair 2"):
        score(forward, params, [([1], [2]), ([], [2])])
    with pytest.raises(ValueError, match="192"):
        score(forward, params, [([1], [2] * 193)])


def test_rows_of_similar_length_share_a_program(subject):
    before = scoring._scored._cache_size()
    score(
        subject.forward, subject.writer.params, [([1] * n, [2] * m) for n in range(1, 33, 3) for m in range(1, 17, 4)]
    )
    assert scoring._scored._cache_size() - before <= 4


def test_figures_on_known_values():
    for n, correct, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 3, 2), (3, 3, 3)]:
        draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert metrics.pass_at_k(n, correct, k) == pytest.approx(np.mean([any(draw) for draw in draws]))
    assert metrics.normalised("  The\n Cat. ") == metrics.normalised("the cat")
    assert metrics.normalised("3.5") != metrics.normalised("35")
    assert metrics.distinct([["a", "b", "a"], ["a", "b"]], 1) == 2 / 5
    assert metrics.distinct([[1, 2, 1], [1, 2]], 2) == 2 / 3
    assert math.isnan(metrics.distinct([["a"], []], 2))
    assert metrics.rouge_l("the cat", ["a dog", "the cat sat"]) == pytest.approx(0.8)
    assert metrics.self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert metrics.self_bleu(["a b c d e", "f g h i j"]) == 0.0


def test_intervals():
    wilson = metrics.estimate([1.0] * 5 + [0.0] * 5)
    assert wilson == pytest.approx((0.5, 0.2366, 0.7634, 10), abs=1e-4)  # published for 5 of 10
    assert metrics.estimate([1.0] * 3).low == pytest.approx(0.4385, abs=1e-4)
    x = np.random.default_rng(1).uniform(size=400).tolist()
    found, spread = metrics.estimate([*x, math.nan]), 1.96 * np.std(x) / 20
    assert found == pytest.approx((np.mean(x), np.mean(x) - spread, np.mean(x) + spread, 400), abs=0.005)
    assert metrics.estimate([math.nan]) is None


def test_answers_are_verified_in_a_process_that_may_hang():
    with Verifier() as verifier:
        assert verifier.verify(["2", "1/2"], "so it is $0.5$.")
        assert verifier.verify(["x+1"], "\\boxed{1+x}")
        assert not verifier.verify(["12"], "the answer is 13")
        assert not verifier.verify(["12"], "")
        with pytest.raises(ValueError, match=r"\?"):
            verifier.verify(["?"], "1")
        verifier._seconds = 0.0
        assert not verifier.verify(["12"], "13")
        verifier._seconds = 60.0
        assert verifier.verify(["12"], "12")  # and not the late answer to the question before


def test_choices_by_likelihood(subject, tmp_path):
    choices = [" a", " an answer of many bytes", " ü"]
    path = task_file(
        tmp_path / "t", {"kind": "choice"}, *({"prompt": "so ", "choices": choices, "label": i} for i in range(3))
    )
    figures, examples = run(subject, path)
    ids = lambda text: subject.writer.tokenizer.encode([text])[0][0]
    scores = subject.score([(ids("so"), ids(" " + choice)) for choice in choices])  # the space belongs to the choice
    totals = [one.total for one in scores]
    assert [row["logprob"] for row in examples[0]["choices"]] == pytest.approx(totals)
    assert [row["bytes"] for row in examples[0]["choices"]] == [1, 23, 2]
    assert figures["acc"] == pytest.approx(1 / 3)
    bests = int(np.argmax(totals)), int(np.argmax(np.divide(totals, [1, 23, 2])))
    assert bests[0] != bests[1]
    for label in range(3):
        one = task_file(tmp_path / "one", {"kind": "choice"}, {"prompt": "so ", "choices": choices, "label": label})
        assert [run(subject, one)[0][name] for name in ("acc", "acc_norm")] == [float(label == best) for best in bests]


def test_completions_are_matched_by_their_answers(subject, tmp_path):
    header = {"kind": "rouge", "max_new_tokens": 12, "temperature": 1.0, "n": 4, "seed": 3}
    prompts = [{"prompt": f"{i} is"} for i in range(5)]
    _, examples = run(subject, task_file(tmp_path / "t", header, *({**p, "answer": "x"} for p in prompts)))
    texts = [[one["text"] for one in row["completions"]] for row in examples]
    assert len({text for row in texts for text in row}) == 20
    # Answers that the first, and only the first, of four completions begins with.
    header |= {"kind": "exact", "k": [1, 2], "extract": "(?s)^(.{3})"}
    records = [{**p, "answer": row[0][:3].strip(" .") or "-"} for p, row in zip(prompts, texts)]
    figures, examples = run(subject, task_file(tmp_path / "t", header, *records))
    assert [[one["text"] for one in row["completions"]] for row in examples] == texts
    right = [
        [metrics.normalised(text[:3]) == metrics.normalised(r["answer"]) for text in row]
        for r, row in zip(records, texts)
    ]
    assert sum(map(sum, right)) >= 4
    assert figures["pass@1"] == pytest.approx(np.mean(right))
    assert figures["pass@2"] == pytest.approx(np.mean([metrics.pass_at_k(4, sum(row), 2) for row in right]))
    assert 0 < figures["distinct-1"] <= 1
    assert 0 <= figures["self-BLEU"] < 1
    assert 0 < figures["tokens"] <= 12


def test_blocks_of_prompts_draw_apart(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxkd.evals.subject._BLOCK", 2)
    header = {"kind": "exact", "max_new_tokens": 8, "temperature": 2.0}
    _, examples = run(subject, task_file(tmp_path / "t", header, *[{"prompt": "same", "answer": "x"}] * 5))
    assert [row["line"] for row in examples] == [2, 3, 4, 5, 6]
    assert len({row["completions"][0]["text"] for row in examples}) == 5


def test_conversations_are_answered_by_the_template(subject, tmp_path):
    record = {"messages": [{"role": "user", "content": "hi"}], "choices": ["a", "b"], "label": 0}
    path = task_file(tmp_path / "t", {"kind": "choice", "system": "be brief"}, record)
    with pytest.raises(ValueError, match="chat template"):
        run(subject, path)
    templated = with_template(subject)
    _, examples = run(templated, path)
    ids = lambda text: subject.writer.tokenizer.encode([text])[0][0]
    [want] = subject.score([(ids("system: be brief\nuser: hi\n>"), ids(" a"))])
    assert examples[0]["choices"][0]["logprob"] == pytest.approx(want.total)
    assert templated.encode("<|endoftext|>", True).tolist() == [256]
    assert len(templated.encode("<|endoftext|>")) == 13


@pytest.mark.parametrize("templated", [False, True])
def test_a_judge_has_no_side(subject, templated):
    one = with_template(subject) if templated else subject
    with pytest.raises(ValueError, match="judge tiny"):
        judge.wins(one, [judge.Match("which?", "one" * 60, "the other")])
    longer = CausalLM(dataclasses.replace(CONFIG, max_length=1024))
    one = Subject(one.writer._replace(context=1024), longer)
    matches = [judge.Match("which?", f"{i} is", "the other") for i in range(6)]
    won = judge.wins(one, matches)
    swapped = judge.wins(one, [match._replace(answer=match.other, other=match.answer) for match in matches])
    assert [a + b for a, b in zip(won, swapped)] == [1.0] * 6
    assert judge.wins(one, [judge.Match([{"role": "user", "content": "which?"}], "same", "same")]) == [0.5]


class Longest(Subject):
    """Prefers the longer answer; between equally long ones, A."""

    def pair(self, context, continuation, rendered=False):
        answers = re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nReply", context).groups()
        return [len(answers["AB".index(continuation.strip())])], continuation

    def score(self, pairs):
        totals = [size + 0.5 * (letter == " A") for [size], letter in pairs]
        return [Score(np.asarray([total], np.float32), False) for total in totals]


def test_the_judge_prefers_an_answer_and_not_a_letter(subject):
    judged = [("longer", "short"), ("short", "longer"), ("equal", "other")]
    assert judge.wins(Longest(*subject), [judge.Match("which?", *pair) for pair in judged]) == [1.0, 0.0, 0.5]


GOOD = {"prompt": "x", "answer": "y"}


@pytest.mark.parametrize(
    ("header", "record", "line", "key"),
    [
        ({"kind": "exactly"}, GOOD, 1, "kind"),
        ({"kind": "exact", "max_tokens": 3}, GOOD, 1, "max_tokens"),
        ({"kind": "exact", "n": "3"}, GOOD, 1, "n has"),
        ({"kind": "exact", "n": 3}, GOOD, 1, "temperature"),
        ({"kind": "exact", "n": 3, "temperature": 1, "k": [4]}, GOOD, 1, "k is"),
        ({"kind": "exact", "top_p": 2.0}, GOOD, 1, "top_p"),
        ({"kind": "exact", "max_new_tokens": 0}, GOOD, 1, "max_new_tokens"),
        ({"kind": "exact", "extract": "("}, GOOD, 1, "extract"),
        ({"kind": "exact", "stop": [""]}, GOOD, 1, "stop"),
        ({"kind": "rouge", "k": [1]}, GOOD, 1, "'k'"),
        ({"kind": "judge"}, GOOD, 1, "judge"),
        ({"kind": "exact", "task": "a/b"}, GOOD, 1, "a/b"),
        ({"kind": "exact"}, {"prompt": "x"}, 2, "answer"),
        ({"kind": "exact"}, {"answer": "y"}, 2, "prompt"),
        ({"kind": "exact"}, {**GOOD, "messages": []}, 2, "prompt or messages"),
        ({"kind": "exact"}, {"messages": [{"role": "user"}], "answer": "y"}, 2, "messages"),
        ({"kind": "choice"}, {"prompt": "x", "choices": ["a", " "], "label": 0}, 2, "choices"),
        ({"kind": "choice"}, {"prompt": "x", "choices": ["a", "b"], "label": 2}, 2, "label"),
    ],
)
def test_a_bad_line_names_its_number_and_key(tmp_path, header, record, line, key):
    with pytest.raises(ValueError, match=key) as caught:
        tasks.read(task_file(tmp_path / "bad.jsonl", header, record))
    assert f"bad.jsonl, line {line}:" in str(caught.value)


def test_the_file_of_the_documentation(tmp_path):
    [block] = re.findall(
        r"^```json\n(.*?)^```", (REPOSITORY / "docs/tasks.md").read_text(encoding="utf-8"), re.M | re.S
    )
    path = tmp_path / "tasks.jsonl"
    path.write_text(block)
    sums, capitals = tasks.read(path)
    assert tasks.answer_of("The answer is 4, no, the answer is -5.", sums.extract) == "-5"
    assert [len(task.records) for task in (sums, capitals)] == [2, 1]


def test_a_bad_file_is_named(subject, tmp_path):
    path = tmp_path / "bad.jsonl"
    for content, key in [
        ("", "no task"),
        ("{}", "line 1"),
        ('{"task"', "line 1"),
        ('{"task": "a", "kind": "exact"}', "a"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=key):
            tasks.read(path)
    with pytest.raises(ValueError, match="line 2"):
        run(subject, task_file(path, {"kind": "exact"}, {"prompt": "x" * 192, "answer": "y"}))
    with pytest.raises(ValueError, match="line 2"):
        tasks.check(tasks.read(task_file(path, {"kind": "math"}, {"prompt": "x", "answer": "?"})))


@pytest.fixture(scope="module")
def export(undisturbed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "student"
    succeeds("export", "--workdir", str(undisturbed), "--output", str(directory))
    return str(directory)


@pytest.mark.slow
def test_the_command(undisturbed, export, tmp_path, monkeypatch):
    short = {"max_new_tokens": 6}
    task_file(tmp_path / "a.jsonl", {"task": "words", "kind": "rouge", **short}, {"prompt": "a student", "answer": "a"})
    with (tmp_path / "a.jsonl").open("a") as file:
        lines = [{"task": "pick", "kind": "choice"}, {"prompt": "the", "choices": [" teacher", " qzxqzxq"], "label": 0}]
        lines += [{"task": "sums", "kind": "math", **short}, {"prompt": "1 + 1 =", "answer": "2"}]
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    task_file(tmp_path / "b.jsonl", {"task": "duel", "kind": "judge", "judge": export, **short}, GOOD)
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    output = tmp_path / "out"
    command = ("evaluate", "--workdir", str(undisturbed), "--output", str(output), "--tasks", *files)
    rows = [json.loads(line) for line in succeeds(*command, "--json").splitlines()]
    by_name = {(row["task"], row["metric"]): row for row in rows}
    assert {task for task, _ in by_name} == {"words", "pick", "sums", "duel"}
    assert by_name["pick", "acc"]["value"] == 1.0
    assert by_name["duel", "win_rate"]["examples"] == 1
    assert rows == [json.loads(line) for line in (output / "tasks.jsonl").read_text().splitlines()]
    assert not (undisturbed / "tasks.jsonl").exists()
    [example] = [json.loads(line) for line in (output / "tasks" / "words-12.jsonl").read_text().splitlines()]
    written = succeeds(
        "generate", "--workdir", str(undisturbed), "a student", "--max-new-tokens", "6", "--temperature", "0"
    )
    assert example["completions"][0]["text"] == written.removesuffix("\n")
    lines = succeeds("evaluate", "--model", export, "--json", "--tasks", files[0]).splitlines()
    exported = [json.loads(line) for line in lines]
    assert [row["value"] for row in exported] == pytest.approx([row["value"] for row in rows if row["task"] != "duel"])
    # What is there is not run again.
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.tasks, "run", None)
        title, head, _, *figures = succeeds(*command).splitlines()
    assert title == "student, step 12"
    assert head.split()[0] == "task"
    assert len(figures) == len(rows)
    changed = (tmp_path / "a.jsonl").read_text().replace("qzx", "qqz")
    (tmp_path / "a.jsonl").write_text(changed)
    again = [json.loads(line) for line in succeeds(*command, "--json").splitlines()]
    assert {row["task"] for row in again if row in rows} == {"words", "sums", "duel"}


def test_what_the_command_refuses(export, tmp_path, monkeypatch):
    path = str(task_file(tmp_path / "a.jsonl", {"kind": "rouge"}, GOOD))
    model = ("evaluate", "--model", export)
    assert "--data" in fails(*model, "--tasks", path, "--data", path)
    assert "--step" in fails(*model, "--tasks", path, "--step", "3")
    assert "--tasks" in fails(*model, "--teacher", export, "--data", path, "--json")
    assert "'mine'" in fails(*model, "--tasks", path, path)
    assert "none.jsonl" in fails(*model, "--tasks", str(tmp_path / "none.jsonl"))
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert 'pip install "jaxkd[tasks]"' in fails(*model, "--tasks", path)
