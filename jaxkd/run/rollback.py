"""`jaxkd rollback`: make an earlier checkpoint the newest; later ones are renamed, never deleted."""

import contextlib
import os
import platform
import time
from pathlib import Path

import jax

from jaxkd.run import restore
from jaxkd.run.workdir import lock, saved_experiment
from jaxkd.runtime import cluster, watchdog
from jaxkd.train.checkpoint import Checkpoints


def go(workdir: Path, step: str) -> list[str]:
    """Make a step, a number or "best", the newest of a run; returns lines on what was done and how to undo it.

    ValueError where there is no such step, it is damaged, or the run is still in progress.
    """
    e = saved_experiment(workdir)
    if cluster.detect(os.environ, "cpu", single_ok=True).size > 1:
        raise ValueError("`jaxkd rollback` renames directories from one process: start it on one host, by itself")
    jax.config.update("jax_platforms", "cpu")  # a TPU would wait for its other hosts
    stop = "Stop it first: SIGTERM saves and ends it"
    beat = watchdog.live_heartbeat(workdir)
    try:
        host = (workdir / ".lock").read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        host = "a host"
    if beat is not None and host != platform.node():  # on this host the lock decides
        raise ValueError(
            f"a run is in progress in {workdir}: {host} wrote heartbeat.json {time.time() - beat['time']:.0f} s ago, "
            f"in the phase '{beat['phase']}'. {stop}; a killed run counts as over after {watchdog.HEARTBEAT_TTL_S:g} s"
        )
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(workdir))
        except ValueError:
            raise ValueError(f"a run is in progress in {workdir}, on this host. {stop}") from None
        checkpoints = Checkpoints(restore.directory(e.run, workdir), read_only=True)
        number = restore.numbered(checkpoints, workdir, step)
        checkpoints.verify(number)
        with contextlib.closing(restore.writer(e.run, workdir)) as writer:
            names = writer.rollback(number)
            restore.mark(writer, e.run, workdir)
    if not names:
        return [f"step {number} is already the newest whole checkpoint under {checkpoints.directory}"]
    done = ", ".join(f"{later} as {name}" for later, name in names.items())
    back = ", ".join(f"{name} to {later}" for later, name in names.items())
    return [
        f"step {number} is the newest checkpoint again. Renamed under {checkpoints.directory}: {done}",
        f"the same `jaxkd train` resumes from step {number} and drops later lines of its logs; with changed settings, "
        "such as a lower --config.optim.lr.peak, it needs --accept-changes",
        f"to undo this before resuming, rename {back}",
    ]
