"""A workdir belongs to one experiment: claiming it, its lock, its config.json and run.json."""

import contextlib
import importlib.metadata
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxkd import __version__
from jaxkd.config.schema import Experiment, experiment, leaves, plain
from jaxkd.runtime import files, locks

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
        others = (path.name for path in workdir.iterdir()) if workdir.exists() else ()
        if any(not name.startswith(files.PARTIAL) for name in others):
            raise ValueError(f"{workdir} is not empty and holds no jaxkd run (no config.json): use a new --workdir")
        adopt(workdir, e)
        return []
    try:
        values = files.read_json(saved)
    except files.Torn as error:
        if trained:
            return [f"config.json, because {error}: written from this command, not compared with the earlier one"]
        if saved.stat().st_size:
            raise ValueError(f"{error}, and nothing was trained in {workdir}: use a new --workdir") from None
        values = config
    if not trained and not {"student", "objective", "data"} <= values.keys():
        raise ValueError(f"{saved} is not a jaxkd run's: use a new --workdir")
    before, after = leaves(_completed(values)), leaves(config)
    keys = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    changes = [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys]
    if (changes or not saved.stat().st_size) and not trained:
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
    files.write_json(workdir / "config.json", plain(e))


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[str]:
    """Keep a second command out of a run's workdir; gives what is in the lock's file, for `see`.

    Raises:
        ValueError: another one is training in it.
    """
    with (workdir / ".lock").open("a+") as file:
        if not locks.acquire(file, workdir / ".lock"):
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
        return experiment(files.read_json(path))
    except files.Torn as error:
        raise ValueError(f"{error}: restore it, or repeat the run's `jaxkd train` command, which writes it") from None


def saved_facts(workdir: Path) -> dict[str, Any]:
    """What run.json holds; where it is missing, empty or torn, {} and a line on stderr."""
    try:
        return files.read_json(workdir / "run.json")
    except (FileNotFoundError, ValueError) as error:
        print(f"jaxkd: {error}: the run's command and kept layers are unknown", file=sys.stderr, flush=True)
        return {}


def versions() -> dict[str, str]:
    """Of Python, jaxkd and what its results depend on."""
    found = {"python": platform.python_version(), "jaxkd": __version__}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """Of the checkout that this code runs from; None where it is no checkout of its own, or there is no git."""
    root = Path(__file__).resolve().parents[2]
    git = lambda *words: subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    try:
        if Path(git("rev-parse", "--show-toplevel").stdout.strip()).resolve() != root:
            return None
        return git("rev-parse", "HEAD").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
