"""The door: recipes and overrides become plain values, and a workdir belongs to one experiment.

The only module beside `configs/` that knows absl and ml_collections.
"""

import ast
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import secrets
import subprocess
import time
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxkd import __version__, locks
from jaxkd.experiment import Experiment, Member, MeshBlock, Term, experiment, leaves, nearest, plain

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "grain",
    "tokenizers",
)


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


# ------------------------------------------------------------------------------------- the workdir


# What decides which rows a step sees: a run that changed it would repeat some rows and never see others.
_ORDER = ("data.batch", "data.interval", "data.length", "data.mixture", "run.seed", "data.domains")


def claim(workdir: Path, e: Experiment, accept_changes: bool) -> list[str]:
    """See that a workdir is this experiment's, and make it so where nothing has been trained in it yet.

    Returns:
        What a run with a checkpoint is about to change, a phrase each; `adopt` makes it so once the run is loaded.

    Raises:
        ValueError: it holds another experiment, or something that is none.
    """
    saved, config = workdir / "config.json", plain(e)
    metrics = workdir / "metrics.jsonl"  # checkpoints may have been deleted or moved: logged steps are kept then too
    logged = metrics.exists() and metrics.stat().st_size > 0
    trained = logged or any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*"))
    if not saved.exists():
        if workdir.exists() and any(workdir.iterdir()):
            raise ValueError(f"{workdir} is not empty and holds no jaxkd run (no config.json): use a new --workdir")
        adopt(workdir, e)
        return []
    try:
        before, after = leaves(_completed(json.loads(saved.read_text(encoding="utf-8")))), leaves(config)
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"{saved} is damaged: it is not a JSON object; use a new --workdir") from None
    keys = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    changes = [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys]
    if changes and not trained:
        for name in ("evals.jsonl", "metrics.jsonl", "mixture.jsonl", "goodput.jsonl", "run.json"):
            (workdir / name).unlink(missing_ok=True)  # of an experiment that never made a step
        adopt(workdir, e)
        return []
    fixed = [k for k in keys if k.startswith(_ORDER)]
    if fixed:
        raise ValueError(
            f"{workdir} holds another experiment: {'; '.join(changes[:6])}. {fixed[0]} decides which rows a step sees "
            "and cannot change in a run: use a new --workdir"
        )
    if changes and not accept_changes:
        more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
        raise ValueError(
            f"{workdir} holds another experiment: {'; '.join(changes[:6])}{more}. "
            "Use a new --workdir, or add --accept-changes"
        )
    return changes


def _completed(values: Any) -> Any:
    """A saved config with the defaults of keys that an older jaxkd did not know."""
    try:
        return plain(experiment(values))
    except ValueError:  # it knew others: the comparison will name them
        return values


def adopt(workdir: Path, e: Experiment) -> None:
    """Write the experiment into its workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", plain(e))


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[str]:
    """Keep a second command out of a run's workdir; gives what is in the lock's file, for `see`.

    Raises:
        ValueError: another one is training in it.
    """
    with (workdir / ".lock").open("a+") as file:
        if not locks.take(file, workdir / ".lock"):
            raise ValueError(f"another process is training in {workdir}: wait for it or use a new --workdir")
        mark = f"{platform.node()} {os.getpid()} {secrets.token_hex(8)}"
        file.truncate(0)
        file.write(mark)
        file.flush()
        os.fsync(file.fileno())
        yield mark


def see(workdir: Path, mark: str, seconds: float = 30.0) -> None:
    """Wait until the lock that process 0 took is seen from here: a run's workdir is one directory for all hosts.

    Args:
        workdir: of the run.
        mark: what `lock` gave.
        seconds: that a network's file system may take.

    Raises:
        ValueError: it is another directory.
    """
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if (workdir / ".lock").read_text() == mark:
                return
        if time.monotonic() > until:
            raise ValueError(
                f"process 0 has made {workdir}, which is not to be seen on {platform.node()}: --workdir must be on "
                "storage that every host sees, such as a mounted bucket or file system"
            )
        time.sleep(0.2)


def saved_experiment(workdir: Path) -> Experiment:
    """The experiment that a workdir was made by.

    Raises:
        FileNotFoundError: it holds no run.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} holds no run: {path} is missing; `jaxkd train --workdir {workdir}` makes one"
        )
    try:
        return experiment(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError:
        raise ValueError(f"{path} is no JSON: put it back, or begin anew in another --workdir") from None


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one move."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Of Python, jaxkd and what its results depend on."""
    found = {"python": platform.python_version(), "jaxkd": __version__}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """Of the checkout that this code runs from; None where it is no checkout of its own, or there is no git."""
    root = Path(__file__).resolve().parent.parent
    git = lambda *words: subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    try:
        if Path(git("rev-parse", "--show-toplevel").stdout.strip()).resolve() != root:
            return None
        return git("rev-parse", "HEAD").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
