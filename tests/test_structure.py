"""The shape of the repository: folders, doors of dependencies, sizes, docstrings, recipes, README's commands.

The order of the folders and the doors are read from docs/design.md.
"""

import ast
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxkd.config.recipe import read_config
from jaxkd.config.schema import experiment, plain
from jaxkd.report.records import leaves

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxkd"
CODE = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.py") if not path.name.startswith("_"))
BLOCKS = ["data", "objective", "optim", "run", "student", "teacher"]
FILE_LINES, FUNCTION_LINES, LEAVES = 600, 80, 60
NOWHERE = ("torch", "transformers", "tensorflow", "clu")
IMPORT_NAMES = {"tensorflow-datasets": "tensorflow_datasets", "GGUF": "gguf"}  # where design.md writes otherwise
WITH_A_DOOR = {"orbax", "tensorflow_datasets", "grain", "safetensors", "gguf", "ml_collections"}


def folders() -> list[str]:
    """The folders of the package from left to right, from the one line of design.md that lists them."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    return re.search(r"^core( · \w+)+$", text, re.M).group(0).split(" · ")


def test_the_table_of_folders_lists_their_files():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| [^|]+ \| ((?:`\w+`(?:, )?)+) \|$", text, re.M))
    listed = {f"{folder}/{name}" for folder, names in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert listed == {
        name_of(path).removeprefix("jaxkd/").removesuffix(".py") for path in CODE if path.parent != PACKAGE
    }


def doors() -> dict[str, list[str]]:
    """Import name -> the files and folders that may import it, from design.md's "One door per dependency"."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    allowed: dict[str, list[str]] = {}
    for clause in re.search(r"One door per dependency: (.*?)\.\s", text.replace("\n", " ")).group(1).split(";"):
        names, paths = re.sub(r"`[^`]*`", "", clause), re.findall(r"`([^`]+)`", clause)
        for word in re.findall(r"[\w-]+", names):
            if (name := IMPORT_NAMES.get(word, word)) in WITH_A_DOOR:
                allowed[name] = [p if p.startswith("configs/") else f"jaxkd/{p}" for p in paths]
    return allowed


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything a file imports, inside functions too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*parts, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def module_of(dotted: str) -> str | None:
    """The file that `jaxkd.x.y.z` names or lies in, None for a folder."""
    parts = dotted.split(".")
    for end in range(len(parts), 1, -1):
        if ROOT.joinpath(*parts[:end]).with_suffix(".py").is_file():
            return "/".join(parts[1:end])
    return None


def imported_files(path: Path) -> Iterator[tuple[int, str]]:
    """(line, file of ours) for everything of jaxkd that a file imports."""
    for line, dotted in imports(path):
        there = module_of(dotted) if dotted.startswith("jaxkd.") else None
        if there:
            yield line, there


def test_folders_are_ordered_and_imports_go_to_the_left():
    there = {path.parent.relative_to(PACKAGE).as_posix() for path in CODE} - {"."}
    assert there <= set(folders())
    assert [path.name for path in CODE if path.parent == PACKAGE] == ["__main__.py"]
    order, wrong = {name: index for index, name in enumerate(folders())}, []
    for path in CODE:
        here = path.parent.name
        for line, there in imported_files(path) if here in order else ():
            if order[there.split("/")[0]] > order[here]:
                wrong.append(f"{name_of(path)}:{line} imports {there}")
    assert not wrong, "a file imports its own folder and folders to its left:\n" + "\n".join(dict.fromkeys(wrong))


def test_no_circles_within_a_folder():
    graph = {
        name: {
            there for _, there in imported_files(PACKAGE / f"{name}.py") if there.split("/")[0] == name.split("/")[0]
        }
        for name in (path.relative_to(PACKAGE).with_suffix("").as_posix() for path in CODE)
    }
    while leaves := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in leaves:
            del graph[name]
    assert not graph, f"files that import each other: {sorted(graph)}"


def test_package_files_import_nothing_of_ours():
    wrong = [
        f"{name_of(path)}:{line} imports {dotted}"
        for path in PACKAGE.rglob("__init__.py")
        for line, dotted in imports(path)
        if dotted.split(".")[0] == "jaxkd"
    ]
    assert not wrong, "\n".join(wrong)


def test_one_door_per_dependency():
    allowed, wrong = doors(), []
    assert set(allowed) == WITH_A_DOOR
    assert all((ROOT / path).exists() for paths in allowed.values() for path in paths), allowed
    for path in [*PACKAGE.rglob("*.py"), *RECIPES]:
        for line, dotted in imports(path):
            name, here = dotted.split(".")[0], name_of(path)
            if name in NOWHERE:
                wrong.append(f"{here}:{line} imports {name}, which nothing in jaxkd may")
            elif name in allowed and not any(
                here == door or (door.endswith("/") and here.startswith(door)) for door in allowed[name]
            ):
                wrong.append(f"{here}:{line} imports {name}, whose door is {' and '.join(allowed[name])}")
    assert not wrong, "\n".join(wrong)


def test_sizes():
    wrong = []
    for folder in ("jaxkd", "configs", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > FILE_LINES:
                wrong.append(f"{name_of(path)} has {lines} lines")
            for node in ast.walk(parsed(path)) if folder in ("jaxkd", "configs") else ():
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = node.end_lineno - node.lineno + 1
                    if lines > FUNCTION_LINES:
                        wrong.append(f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines")
    assert not wrong, f"files have at most {FILE_LINES} lines, functions {FUNCTION_LINES}:\n" + "\n".join(wrong)


def test_modules_and_what_they_offer_have_docstrings():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        tree = parsed(path)
        if tree.body and not ast.get_docstring(tree):
            wrong.append(f"{name_of(path)}")
        for node in tree.body:
            kind = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if kind and not node.name.startswith("_") and not ast.get_docstring(node):
                wrong.append(f"{name_of(path)}:{node.lineno} {node.name}")
    assert not wrong, "without a docstring:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    text = ast.get_docstring(parsed(path)) or ""
    assert re.search(rf"jaxkd \w+ --config[ =]configs/{path.stem}\.py", text), "the docstring holds the command"
    stated = read_config([f"--config={path}"])
    resolved = plain(experiment(stated))
    assert sorted(resolved) == BLOCKS
    assert len(leaves(stated)) < LEAVES
    for key in leaves(stated).keys() - {"teacher.entries"}:  # which is a recipe's argument
        with contextlib.suppress(ValueError):  # a key without a default
            without = plain(experiment(read_config([f"--config={path}", f"--config.{key}=None"])))
            assert without != resolved, f"{key} states the default"


def fenced(text: str, *languages: str) -> list[str]:
    """The commands of a Markdown text's fenced blocks: their lines, without prompts and comments."""
    blocks = re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.M | re.S)
    lines = [re.sub(r"(^|\s+)#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line]


def test_readme_begins_with_the_two_commands_and_recipes_exist():
    assert {"quickstart", "tiny", "logit_kd"} <= {path.stem for path in RECIPES}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fenced(text, "bash", "sh", "shell", "console")[:2] == ["bash launch/local.sh", "bash launch/test.sh"]


def test_every_verb_that_is_named_exists():
    from jaxkd.cli.main import VERBS

    wrong = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *RECIPES]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":  # code only: in prose the word after jaxkd is any verb
            text = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, re.M | re.S))
        verbs = re.findall(r"(?<![\w/.-])(?<!import )jaxkd ([a-z]+)\b", text)
        wrong += [f"{name_of(path)}: jaxkd {verb}" for verb in verbs if verb not in VERBS]
    assert not wrong, f"the verbs are {', '.join(VERBS)}:\n" + "\n".join(wrong)


def test_no_file_names_a_place_of_one_machine():
    folders = ("jaxkd", "configs", "tests", "launch", "benchmarks", "docs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.glob("*.*") if path.name != ".git"]
    wrong = []
    for path in files:
        if not path.is_file() or path.suffix in (".pyc", ".png", ".gz", ".npz"):
            continue
        roots = "work|root" if name_of(path).startswith("tests/") else "work|root|tmp"
        for index, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if re.search(rf"(?<![\w.~)}}])/(?:{roots})/", line):
                wrong.append(f"{name_of(path)}:{index}: {line.strip()[:80]}")
    assert not wrong, "\n".join(wrong)
