"""lm-eval's tasks on local data: its figures for our model and for its own `hf` model on the same exported weights."""

import json

import numpy as np
import pytest

from jaxkd.models.export import export

pytest.importorskip("torch")
pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

CHOICES = [
    ("The capital of France is", ["Paris", "London", "a small town in the north"], 0),
    ("Two plus two is", ["five", "four", "a number that nobody knows"], 1),
    ("Water boils at a temperature of one hundred", ["degrees", "metres", "years ago"], 0),
    ("The opposite of hot is", ["very warm indeed", "cold", "blue"], 1),
    ("Das Gegenteil von groß ist", ["klein", "größer", "naïve"], 0),
    ("", ["The cat sat on the mat.", "Mat the on sat cat the."], 0),
]
WRITTEN = [
    ("The largest planet is", " Jupiter"),
    ("1, 2, 3, 4,", " 5"),
    ("Q: What colour is the sky?\nA:", " The sky is blue."),
    ("def square(x):\n    return", " x ** 2"),
]
TEXTS = [
    "The exceptions that a program raises are named after what went wrong, and " * 3,
    "naïve café: 東京, Ω ≈ 3.14159",
    "One.",
]
COMMON = "test_split: train\ndataset_path: json\ndataset_kwargs: {{data_files: {data}, cache_dir: {cache}}}\n"
TASKS = {
    "local_choice": "output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_choice: '{{{{c}}}}'\n"
    "doc_to_target: '{{{{a}}}}'\nmetric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]\n",
    "local_written": "output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: '{{{{a}}}}'\n"
    'generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}\n'
    "metric_list: [{{metric: exact_match}}]\n",
    "local_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
    "metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]\n",
}


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory):
    options = {"tokenizer_json": teacher.tokenizer.json, "generation": teacher.tokenizer.generation, "card": {}}
    directory = tmp_path_factory.mktemp("export") / "student"
    return str(export(directory, teacher.config, teacher.params, dtype="bfloat16", **options))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks' files."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "local_choice": [{"q": q, "c": c, "a": a} for q, c, a in CHOICES],
        "local_written": [{"q": q, "a": a} for q, a in WRITTEN],
        "local_rolling": [{"text": text} for text in TEXTS],
    }
    for name, lines in rows.items():
        data = folder / f"{name}.json"
        data.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
        content = (COMMON + TASKS[name]).format(data=data, cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{content}")
    return folder


def figures(model, tasks):
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    numbers = {
        (task, name): value
        for task, row in found["results"].items()
        for name, value in row.items()
        if isinstance(value, float) and "stderr" not in name
    }
    responses = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return numbers, responses


@pytest.fixture(scope="module")
def models(exported):
    """Ours and theirs; theirs reads long texts in windows of 24 tokens."""
    from lm_eval.models.huggingface import HFLM

    from jaxkd.evals.lm_eval import LM

    return LM(exported, batch_size=4), HFLM(exported, dtype="float32", device="cpu", batch_size=4, max_length=24)


def test_texts_are_encoded_and_conversations_rendered_alike(models):
    ours, theirs = models
    assert (ours.eot_token_id, ours.prefix_token_id) == (theirs.eot_token_id, theirs.prefix_token_id)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    written = [*talk, {"role": "assistant", "content": " Because "}]
    for history, whole in ((talk, True), (written, True), (written, False)):
        assert ours.apply_chat_template(history, whole) == theirs.apply_chat_template(history, whole)
    for text in (*TEXTS, "", theirs.tokenizer.bos_token + "hi", theirs.apply_chat_template(talk)):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)


def test_figures_are_those_of_their_own_model(models, tasks, monkeypatch):
    ours, theirs = models
    monkeypatch.setattr(type(ours), "max_length", 24)
    numbers, responses = figures(ours, tasks)
    wanted, expected = figures(theirs, tasks)
    assert len(numbers) == 6
    assert numbers == pytest.approx(wanted, rel=1e-4)
    assert responses["local_written"] == expected["local_written"]
    assert len({text for [[text]] in responses["local_written"]}) == len(WRITTEN)
    flat = lambda rows: np.asarray([[float(x) for x in np.ravel(one)] for row in rows for one in row])
    for name in ("local_choice", "local_rolling"):
        np.testing.assert_allclose(flat(responses[name]), flat(expected[name]), rtol=1e-4)
