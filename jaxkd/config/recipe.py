"""Recipes and `--config...` arguments as plain values.

A recipe is a Python file with `get_config()` or `get_config(argument)`. It returns an `ml_collections.ConfigDict`, or a
dict, of the keys that differ from the schema's defaults. `--config.KEY=VALUE` sets any key of the schema:

- true, false; numbers; text as it is, without quotes
- sequences as (1, 2), [1, 2], 1,2 or a single 1
- blocks as {'schedule': 'linear', 'peak': 1.0}, or key by key
- None: the default again; None or nothing after = removes a domain, a term or another named entry
"""

import ast
import contextlib
import copy
import dataclasses
import inspect
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxkd.config.schema import Experiment, block_of, entry_of, nearest, scalars_of, typed

_WORDS = {"true": True, "false": False, "none": None}


def read_config(arguments: Sequence[str]) -> dict[str, Any]:
    """The values that `--config=FILE[:ARGUMENT]` and `--config.KEY=VALUE` arguments state, as nested dicts.

    ValueError for an unknown key, a value of another type, a recipe that fails, or not exactly one recipe.
    """
    recipes = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    if len(recipes) != 1:
        raise ValueError("give one recipe: --config=configs/quickstart.py")
    return override(_load(recipes[0]), [a for a in arguments if a.startswith("--config.")])


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values with `--config.KEY=VALUE` arguments applied to them, in place."""
    for argument in overrides:
        key, _, text = argument.removeprefix("--config.").partition("=")
        target, block = _target(values, key), values
        *blocks, name = target.path
        kind: Any = Experiment
        for inner in blocks:
            kind = typing.get_type_hints(block_of(kind))[inner] if block_of(kind) else entry_of(kind)
            if not isinstance(scalar := block.get(inner), dict):  # becomes the block's first key if the types agree
                first, its_type = next(iter(typing.get_type_hints(block_of(kind) or object).items()), ("", None))
                block[inner] = {first: scalar} if type(scalar) is its_type else {}
            block = block[inner]
        if target.removable and text.lower() in ("", "none"):
            if block.pop(name, None) is None:
                raise ValueError(f"--config.{key} removes nothing: {nearest(name, block)}")
        elif text.lower() == "none":
            block.pop(name, None)
        else:
            block[name] = _parse(target.kind, text, f"--config.{key}")
    return values


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Other arguments, and `--config.KEY=VALUE` ones, also of `--config.KEY VALUE` and of boolean `--config.KEY`."""
    rest, overrides, queue = [], [], list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        else:
            target = _target({}, argument.removeprefix("--config."))
            following = queue[0] if queue and not queue[0].startswith("--") else None
            if target.kind is bool and (following or "").lower() not in ("true", "false"):
                overrides.append(f"{argument}=true")
            elif following is None:
                raise ValueError(f"{argument} needs a value: write {argument}=VALUE")
            else:
                overrides.append(f"{argument}={queue.pop(0)}")
    return rest, overrides


def _load(recipe: str) -> dict[str, Any]:
    name, _, argument = recipe.partition(":")
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no config file {name}")
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        # Not imported: a file that changes twice in a second would be read from __pycache__.
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
        get_config = module.get_config
        if argument and not inspect.signature(get_config).parameters:
            raise ValueError(f"{name} takes no argument, got '{argument}'")
        config = get_config(argument) if argument else get_config()
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name not in str(error) else str(error)) from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        at = f" (line {lines[-1]})" if lines else ""
        raise ValueError(f"the recipe {name} cannot be read: {type(error).__name__}: {error}{at}") from None
    if isinstance(config, ConfigDict):
        return config.copy_and_resolve_references().to_dict()
    if not isinstance(config, Mapping):
        raise ValueError(f"{name}: get_config must return a ConfigDict, got {type(config).__name__}")
    return copy.deepcopy(dict(config))


class _Target(NamedTuple):
    """Where an override goes."""

    path: tuple[str, ...]  # keys of nested dicts
    kind: Any  # the schema's type there
    removable: bool  # an entry of a mapping, such as a domain


def _target(values: Mapping[str, Any], key: str) -> _Target:
    if (target := _resolve(Experiment, key.split("."), values)) is None:
        keys = list(_keys(Experiment, values))
        same = [k for k in keys if key.rpartition(".")[2] in k.split(".")]
        hint = nearest(key, keys, f"did you mean {' or '.join(same[:3])}?" if same else "docs/config.md lists all keys")
        raise ValueError(f"unknown key --config.{key}: {hint}")
    return target


def _resolve(kind: Any, parts: Sequence[str], values: Any) -> _Target | None:
    """What dotted `parts` spell in a value of type `kind`, or None.

    Names of domains may have dots: those in `values` are tried first, then the shortest.
    """
    if not parts:
        return _Target((), kind, False)
    values = values if isinstance(values, Mapping) else {}
    block, entry = block_of(kind), entry_of(kind)
    longest = len(parts) if entry and not dataclasses.is_dataclass(entry) else 1 if block or entry else 0
    names = [".".join(parts[:n]) for n in range(1, longest + 1)]
    for name in sorted(names, key=lambda name: name not in values):
        inner, rest = typing.get_type_hints(block).get(name) if block else entry, parts[name.count(".") + 1 :]
        if name and inner and (target := _resolve(inner, rest, values.get(name))) is not None:
            return _Target((name, *target.path), target.kind, target.removable or not (rest or block))
    return None


def _keys(kind: Any, values: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of the schema, with the named entries of `values`."""
    values = values if isinstance(values, Mapping) else {}
    block, entry = block_of(kind) if values or not scalars_of(kind) else None, entry_of(kind)
    inner = typing.get_type_hints(block) if block else dict.fromkeys(values, entry) if entry else {}
    if kind is not block and not inner:
        yield prefix
    for name, kind in inner.items():
        yield from _keys(kind, values.get(name), f"{prefix}.{name}" if prefix else name)


def _parse(kind: Any, text: str, key: str) -> Any:
    """The value of type `kind` that an override's text spells; blocks are checked later, when they are complete."""
    if block_of(kind) or entry_of(kind):
        if text.startswith("{") and isinstance(value := _literal(text), dict):
            return value
        if not scalars_of(kind):
            raise ValueError(f"{key} is a block: write {key}.{_fitting(kind, text)}={text}, or {key}={{...}}")
        (kind,) = scalars_of(kind)
    if kind is str:
        return text
    if kind is float:
        with contextlib.suppress(ValueError):
            return float(text)
    value = _literal(text)
    if typing.get_origin(kind) is tuple and not isinstance(value, list | tuple):
        value = (value,) if text else ()
    return value if kind is Any else typed(kind, value, key)


def _fitting(kind: Any, text: str) -> str:
    """A key of a block that takes this text, numbers before text."""
    if entry := entry_of(kind):
        return "NAME" if entry is Any or not dataclasses.is_dataclass(entry) else f"NAME.{_fitting(entry, text)}"
    hints = typing.get_type_hints(block_of(kind))
    for name, inner in sorted(hints.items(), key=lambda item: item[1] is str):
        with contextlib.suppress(ValueError):
            _parse(inner, text, name)
            return name
    return next(iter(hints))


class _Words(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        word = node.id.lower()
        return ast.Constant(_WORDS[word]) if word in _WORDS else node


def _literal(text: str) -> Any:
    """A Python literal, with true, false and none in any case; any other text as it is."""
    try:
        return ast.literal_eval(_Words().visit(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError):
        return text
