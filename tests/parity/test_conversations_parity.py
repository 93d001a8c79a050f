"""Token weights of conversations against the assistant masks of transformers, and of TRL's templates for training."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxkd.data import conversations, tokenize
from jaxkd.data.conversations import conversation

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
ONE_TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi  there \n"},
    {"role": "assistant", "content": "Hello, 12 friends: \u00e9\U0001f600."},
]
TALK = [*ONE_TURN, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye\n"}]
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATES = {"qwen2_5": CHATML, "qwen3": CHATML, "qwen3_instruct_2507": CHATML, "llama3": LLAMA}
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}"
    "{{ '\n' }}"
)


@pytest.fixture
def both(teacher, tmp_path):
    """(template, control tokens, of which the last ends a turn) -> the same tokenizer, ours and transformers'."""
    import tokenizers

    def make(template: str, control: tuple[str, ...]):
        inner = tokenizers.Tokenizer.from_str(teacher.tokenizer.json)
        inner.add_special_tokens(list(control))
        inner.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": control[0], "eos_token": control[-1]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "chat_template.jinja").write_text(template)
        return tokenize.from_directory(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)

    return make


@pytest.fixture(scope="module")
def trl_template():
    """Name -> a template of TRL's files, the model's own or, with `_training`, the one with generation marks."""
    module = pytest.importorskip("trl.chat_template_utils", reason="TRL's templates come with the peers extra")
    return lambda name: (Path(module.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def weights_and_mask(both, template: str, marked: str, control: tuple[str, ...], talk: list):
    """Our ids and weights under one template, their mask under another, of the same text."""
    ours, theirs = both(template, control)
    [tokens] = conversations.encode(ours, [conversation({"messages": talk})], "the model")
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    answer = theirs.apply_chat_template(talk, chat_template=marked, **options)
    np.testing.assert_array_equal(tokens.ids, answer["input_ids"])
    return tokens.ids, tokens.weights, np.asarray(answer["assistant_masks"]), ours.tokenizer.token_to_id


@pytest.mark.parametrize("talk", [ONE_TURN, TALK], ids=["one turn", "two turns"])
@pytest.mark.parametrize("with_marks", [False, True])
def test_smollm2(teacher, both, talk, with_marks):
    """Its own template has no marks: rendered prefixes give what marks around content and end token would."""
    own = teacher.tokenizer.chat_template
    marked = own.replace(TURN, MARKED_TURN)
    assert marked != own
    _, weights, mask, _ = weights_and_mask(both, marked if with_marks else own, marked, CHATML, talk)
    np.testing.assert_array_equal(weights, mask)


@pytest.mark.parametrize("talk", [ONE_TURN, TALK], ids=["one turn", "two turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_with_generation_marks(both, trl_template, name, talk):
    marked = trl_template(f"{name}_training")
    _, weights, mask, _ = weights_and_mask(both, marked, marked, TEMPLATES[name], talk)
    np.testing.assert_array_equal(weights, mask)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_without_marks(both, trl_template, name):
    """The same tokens, but for a line's end before and after a turn, which TRL marks and a model does not write."""
    talk = ONE_TURN if name == "qwen3" else TALK  # which forgets the thinking of earlier turns
    own, marked = trl_template(name), trl_template(f"{name}_training")
    ids, weights, mask, id_of = weights_and_mask(both, own, marked, TEMPLATES[name], talk)
    end = id_of(TEMPLATES[name][-1])
    assert (weights <= mask).all()
    assert weights[ids == end].sum() == sum(message["role"] == "assistant" for message in talk)
    more = np.flatnonzero(mask != weights)
    assert set(ids[more]) <= {id_of("\u010a")}
    assert all(end == ids[i - 1] or not weights[i - 1] for i in more)


def test_a_template_that_forgets_is_refused_by_name(both, trl_template):
    tokenizer, _ = both(trl_template("qwen3"), CHATML)
    with pytest.raises(ValueError, match="chat template of the model"):
        conversations.encode(tokenizer, [conversation({"messages": TALK})], "the model")
