"""The door: recipes and overrides become plain values, and a workdir belongs to one experiment.

The only module beside `configs/` that knows absl and ml_collections.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxkd import __version__
from jaxkd.experiment import Experiment, experiment, nearest

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
    overrides = [a for a in arguments if not a.startswith("--config=")]
    if len(recipe) != 1:
        raise ValueError("give one recipe: --config=configs/quickstart.py")
    path = recipe[0].removeprefix("--config=").split(":")[0]
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}")
    config = _parse(recipe)
    for argument in overrides:
        key = argument.removeprefix("--config.").split("=")[0]
        known = _leaves(config.to_dict())
        if key not in known and not _in_free_block(key, config):
            inner = [k for k in known if k.startswith(key + ".")]
            hint = f"it is a block; set one of {', '.join(inner[:8])}" if inner else nearest(key, known)
            raise ValueError(f"unknown key --config.{key}: {hint}")
    free = [a for a in overrides if a.removeprefix("--config.").split("=")[0] not in _leaves(config.to_dict())]
    config = _parse([*recipe, *[a for a in overrides if a not in free]])
    with config.unlocked():
        for argument in free:  # a domain that the recipe does not have
            key, _, value = argument.removeprefix("--config.").partition("=")
            config.data.domains[key.removeprefix("data.domains.")] = value
    result = config.to_dict()
    if "data" in result:
        result["data"]["domains"] = {k: v for k, v in result["data"]["domains"].items() if v}
    return result


def _in_free_block(key: str, config: ConfigDict) -> bool:
    return key.startswith("data.domains.") and key.count(".") == 2


def _parse(arguments: Sequence[str]) -> ConfigDict:
    values = flags.FlagValues()
    line = ["jaxkd", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=line)
    try:
        values(line)
        return values.config
    except (flags.Error, TypeError) as error:
        raise ValueError(str(error).splitlines()[0]) from None


def _leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _leaves(value, name + ".")
        else:
            found[name] = value
    return found


# ------------------------------------------------------------------------------------- the workdir


def claim(workdir: Path, e: Experiment, accept_changes: bool) -> None:
    """Make the workdir this experiment's, or see that it already is.

    Raises:
        ValueError: it holds another experiment, or something that is none.
    """
    saved, config = workdir / "config.json", json.loads(json.dumps(dataclasses.asdict(e)))
    if saved.exists():
        try:
            before = _leaves(json.loads(saved.read_text(encoding="utf-8")))
        except json.JSONDecodeError:
            raise ValueError(f"{saved} is damaged: it is not JSON; use a new --workdir") from None
        after = _leaves(config)
        changed = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
        if changed and not accept_changes:
            listing = "; ".join(f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in changed[:6])
            more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
            raise ValueError(
                f"{workdir} holds another experiment: {listing}{more}. Use a new --workdir, or add --accept-changes"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and holds no jaxkd run (no config.json): use a new --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(saved, config)


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
    return experiment(json.loads(path.read_text(encoding="utf-8")))


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
    """Of the checkout that this code runs from; None where it is no checkout."""
    here = Path(__file__).resolve().parent
    result = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
