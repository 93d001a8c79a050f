"""A workdir belongs to one experiment: claiming it, locking it, and its config.json."""

import contextlib
import os
import platform
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jaxkd.config.schema import Experiment, experiment, plain
from jaxkd.report.records import EVALS, METRICS, MIXTURE, RunInfo, leaves, read_run
from jaxkd.runtime import files, locks
from jaxkd.runtime.goodput import FILE as GOODPUT

# These decide which rows a step sees: a run that changed them would repeat some rows and never see others.
_ORDER = ("data.batch", "data.interval", "data.length", "data.mixture", "run.seed", "data.domains")


def claim(workdir: Path, e: Experiment, accept_changes: bool) -> list[str]:
    """Check that a workdir is this experiment's; one in which nothing was trained becomes so.

    Returns what changes in a run that has been trained, a phrase each; `write_config` saves it once the run is loaded.
    ValueError where it holds another experiment, or something else.
    """
    saved, config = workdir / "config.json", plain(e)
    metrics = workdir / METRICS  # counts as trained too: checkpoints may have been moved
    saved_steps = any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*"))
    trained = saved_steps or (metrics.exists() and metrics.stat().st_size > 0)
    if not saved.exists():
        if workdir.is_symlink() and not workdir.exists():
            raise ValueError(f"--workdir {workdir} is a link to {os.readlink(workdir)}, which does not exist")
        others = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
        others -= {"lost+found", ".lock"}  # of a mount point; of a command that found the disk full
        if any(not name.startswith(files.PARTIAL) for name in others):
            raise ValueError(f"{workdir} is not empty and holds no jaxkd run (no config.json): use a new --workdir")
        write_config(workdir, e)
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
    with contextlib.suppress(ValueError):  # keys that are gone are named by the comparison below
        values = plain(experiment(values))  # with defaults for keys that are newer than it
    names = lambda values: {"data.domains": list(values.get("data", {}).get("domains", ()))}
    before, after = (leaves(c) | names(c) for c in (values, config))
    keys = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    changes = [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys]
    if (changes or not saved.stat().st_size) and not trained:
        for name in (EVALS, METRICS, MIXTURE, GOODPUT, "run.json"):
            (workdir / name).unlink(missing_ok=True)  # of an experiment that was never trained
        write_config(workdir, e)
        return []
    # A checkpoint knows its rows by their content, so the same domains may be read from renamed or moved files.
    moved = {k for k in keys if k.startswith("data.domains.") and saved_steps and "data.domains" not in keys}
    fixed = [k for k in keys if k.startswith(_ORDER) and k not in moved]
    differs = f"{workdir} holds another experiment: {'; '.join(changes[:6])}"
    if fixed:
        raise ValueError(f"{differs}. {fixed[0]} decides which rows a step sees: use a new --workdir")
    if not moved.issuperset(keys) and not accept_changes:
        more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
        raise ValueError(f"{differs}{more}. Use a new --workdir, or add --accept-changes")
    return changes


def write_config(workdir: Path, e: Experiment) -> None:
    """Save the experiment as config.json, making the workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "config.json", plain(e))


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[str]:
    """Hold the workdir's lock; gives the content of the lock's file, for `wait_for_lock`."""
    path = workdir / ".lock"
    with path.open("a+b", buffering=0) as file:
        if not locks.acquire(file, path):
            raise ValueError(f"another process is training in {workdir}: wait for it or use a new --workdir")
        mark = f"{platform.node()} {os.getpid()} {secrets.token_hex(8)}"
        with files.errors_name(path):
            file.truncate(0)
            file.write(mark.encode())
            os.fsync(file.fileno())
        yield mark


def wait_for_lock(workdir: Path, mark: str, seconds: float = 30.0) -> None:
    """Wait until this host sees the lock file that process 0 wrote (`mark`): all hosts must share the workdir."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if (workdir / ".lock").read_text() == mark:
                return
        if time.monotonic() > until:
            raise ValueError(
                f"process 0 made {workdir}, but {platform.node()} does not see it: --workdir must be on storage that "
                "every host shares, such as a mounted bucket or file system"
            )
        time.sleep(0.2)


def saved_experiment(workdir: Path) -> Experiment:
    """The experiment in a workdir's config.json; FileNotFoundError without it, ValueError where it is damaged."""
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no run: {path} is missing; `jaxkd train --workdir` makes one")
    try:
        return experiment(files.read_json(path))
    except files.Torn as error:
        raise ValueError(f"{error}: restore it, or repeat the run's `jaxkd train` command, which writes it") from None


def saved_info(workdir: Path) -> RunInfo:
    """What run.json holds; where it is missing or damaged, an empty record and a line on stderr."""
    try:
        return read_run(workdir)
    except (FileNotFoundError, ValueError) as error:
        print(f"jaxkd: {error}: the run's command and kept layers are unknown", file=sys.stderr, flush=True)
        return RunInfo()
