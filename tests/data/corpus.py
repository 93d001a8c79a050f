"""Made-up texts, and settings for property tests on machines whose speed says nothing."""

import json
from pathlib import Path

from hypothesis import settings

quick = settings(deadline=None, max_examples=50)  # machines that run tests are shared: time says nothing


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def sentences(number: int, word: str = "word") -> list[str]:
    """Distinct texts of 10 to about 150 bytes, with characters of one to four bytes."""
    return [f"{word} {i} äß中𝔘 " + f"{i * 7919 % 1000} " * (i % 30) for i in range(number)]
