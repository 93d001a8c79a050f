"""The door: recipes and overrides become plain values.

The only module beside `configs/` that knows absl and ml_collections.
"""

import ast
import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxkd.config.schema import Experiment, Member, MeshBlock, Term, leaves, nearest


def read_config(arguments: Sequence[str]) -> dict[str, Any]:
    """The config of `--config...` arguments as nested dicts.

    Raises:
        ValueError: an unknown key, a value of another type, or no `--config`.
        FileNotFoundError: no such file.
    """
    recipe = [a for a in arguments if a.startswith("--config=")]
    if len(recipe) != 1:
        raise ValueError("give one recipe: --config=configs/quickstart.py")
    path = recipe[0].removeprefix("--config=").split(":")[0]
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}")
    config = _parse(recipe)
    known, free, overrides = leaves(config.to_dict()), {}, []
    optional = _optional(known)
    for argument in (a for a in arguments if a not in recipe):
        key, _, value = argument.removeprefix("--config.").partition("=")
        if key in known:
            overrides.append(argument)
        elif _in_free_block(key) or key in optional:
            free[key] = value
        else:
            inner = [k for k in known if k.startswith(key + ".")]
            hint = f"it is a block; set one of {', '.join(inner[:8])}" if inner else nearest(key, [*known, *optional])
            raise ValueError(f"unknown key --config.{key}: {hint}")
    result = _parse([*recipe, *overrides], known).to_dict()
    for key, value in free.items():
        *blocks, name = key.split(".")
        place = result
        for block in blocks:
            place = place.setdefault(block, {})
        place[name] = value if blocks[0] == "data" or isinstance(optional.get(key), str) else _literal(value)
    if "domains" in result.get("data", {}):
        result["data"]["domains"] = {k: v for k, v in result["data"]["domains"].items() if v}
    return result


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--config.a.b value` and `--config.a.b=value`, joined and set apart from what argparse reads."""
    rest, overrides, waiting = [], [], None
    for argument in arguments:
        if waiting is not None:
            overrides.append(f"{waiting}={argument}")
            waiting = None
        elif argument.startswith("--config."):
            if "=" in argument:
                overrides.append(argument)
            else:
                waiting = argument
        else:
            rest.append(argument)
    if waiting is not None:
        raise ValueError(f"{waiting} needs a value")
    return rest, overrides


def _optional(known: Iterable[str]) -> dict[str, Any]:
    """Keys that a recipe with these may leave out, with what they then are."""
    blocks = {name: kind for name, kind in typing.get_type_hints(Experiment).items() if dataclasses.is_dataclass(kind)}
    blocks["run.mesh"] = MeshBlock
    for key in known:
        if named := re.match(r"(objective|teacher\.members)\.[^.]+", key):
            blocks[named[0]] = Term if named[1] == "objective" else Member
    return {
        f"{block}.{field.name}": field.default
        for block, kind in blocks.items()
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING and not dataclasses.is_dataclass(field.default)
    }


def _in_free_block(key: str) -> bool:
    """Blocks whose keys a recipe need not have: names of domains, and the sizes of a random model."""
    return bool(re.fullmatch(r"data\.domains\.[^.]+|(teacher|student)\.shape\.[^.]+", key))


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def _parse(arguments: Sequence[str], known: Mapping[str, Any] | None = None) -> ConfigDict:
    values, line = flags.FlagValues(), ["jaxkd", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=line)
    try:
        values(line)
        return values.config
    except (flags.Error, TypeError, ValueError) as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
        if wrong and known and wrong[1] in known:
            kind = type(known[wrong[1]]).__name__
            raise ValueError(f"--config.{wrong[1]} must be {kind}, got '{wrong[2]}'") from None
        lines = str(error).strip().splitlines()
        # What a recipe itself raises comes inside a traceback, whose last line it is.
        raise ValueError(lines[-1].removeprefix("ValueError: ") if "Traceback" in str(error) else lines[0]) from None
    except (SyntaxError, AttributeError, ImportError, NameError, KeyError) as error:
        raise ValueError(f"the recipe {arguments[0]} cannot be read: {type(error).__name__}: {error}") from None
