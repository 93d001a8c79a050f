"""Chat templates: what a template may use, and errors of one sentence; transformers on the same templates."""

import datetime

import pytest

from jaxkd.data import chat

CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4", "tool_calls": None},
    {"role": "user", "content": "And 3 + 3?"},
]
BASE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT = "<|user|>\nWhat is 2 + 2?</s>\n<|assistant|>\n4</s>\n<|user|>\nAnd 3 + 3?</s>\n<|assistant|>\n"
TEMPLATES = {
    "plain": BASE,
    "generation": BASE.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}"),
    "break": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "strftime": "{{ strftime_now('%Y') }}",
    "tojson": "{{ messages[0] | tojson }} {{ {'b': 'é<', 'a': 1} | tojson(true, indent=2, sort_keys=true) }}",
    "separators": "{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}",
    "undefined": "{{ bos_token }}|{{ tools is none }}|{{ messages[1].tool_calls is defined }}|{{ documents }}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "blocks": "{%- for m in messages %}\n {%- if m.role == 'user' %}\n   {{ m.content }}\n {% endif %}\n{%- endfor %}",
}


def render(template, **options):
    return chat.render(template, CHAT, tokens={"eos_token": "</s>"}, source="models/a", **options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain", TEXT),
        ("generation", TEXT),
        ("break", "What is 2 + 2?"),
        ("continue", "4"),
        ("strftime", str(datetime.datetime.now().year)),
        ("tojson", '{"role": "user", "content": "What is 2 + 2?"} {\n  "a": 1,\n  "b": "\\u00e9<"\n}'),
        ("separators", '[1,{"a":2}]'),
        ("undefined", "|True|False|None"),
        ("namespace", "3"),
    ],
)
def test_templates(name, text):
    assert render(TEMPLATES[name], add_generation_prompt=True) == text


def test_variables_and_reasoning():
    assert render("{{ tools[0] }}", tools=["t"]) == "t"
    template, message = "{{ messages[0].reasoning_content }}", {"role": "assistant", "thinking": "why"}
    assert chat.render(template, [message], tokens={}, source="a") == "why"


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ messages[0].tool_calls[0].name }}", "tool_calls"),
        ("{% set x = 'n=' + 1 %}", "str"),
        ("{% for m in messages %}", "line 1"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ range(1000000000) }}", "range"),
        ("{{ {'a': messages} | tojson(indent='x', separators=3) }}", ""),
    ],
)
def test_errors_are_one_sentence(template, cause):
    with pytest.raises(ValueError, match=f"models/a.*{cause}") as caught:
        render(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_renders_the_same(name, smollm2, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    smollm2.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for prompt in (True, False):
        text = theirs.apply_chat_template(
            CHAT, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
        )
        tokens = smollm2.generation.tokens
        assert text == chat.render(TEMPLATES[name], CHAT, tokens=tokens, source="a", add_generation_prompt=prompt)
