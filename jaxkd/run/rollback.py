"""Going back to a checkpoint on purpose: what came after it is set aside, and nothing is deleted."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxkd.run import restore
from jaxkd.run.workdir import lock, saved_experiment
from jaxkd.runtime import cluster, watchdog
from jaxkd.train.checkpoint import Checkpoints


def go(workdir: Path, step: str) -> list[str]:
    """Make a step the newest of a run.

    Args:
        workdir: of the run.
        step: a number, or "best".

    Returns:
        What was done and how to go on, a line each.

    Raises:
        FileNotFoundError: the workdir holds no run.
        ValueError: there is no such step, it is damaged, or the run is still going on.
        OSError: it cannot be read just now.
    """
    e = saved_experiment(workdir)
    if cluster.detect(os.environ, "cpu", single_ok=True).size > 1:
        raise ValueError("`jaxkd rollback` renames directories from one process: start it on one host, by itself")
    jax.config.update("jax_platforms", "cpu")  # it needs no device, and a TPU's other hosts are not there
    with _alone(workdir):
        checkpoints = Checkpoints(restore.directory(e.run, workdir), read_only=True)
        number = restore.numbered(checkpoints, workdir, step)
        checkpoints.verify(number)
        with contextlib.closing(restore.writer(e.run, workdir)) as writer:
            names = writer.rollback(number)
            restore.mark(writer, e.run, workdir)
    if not names:
        return [f"step {number} is whole and the newest under {checkpoints.directory}: nothing had to be set aside"]
    done = ", ".join(f"{later} as {name}" for later, name in names.items())
    back = ", ".join(f"{name} to {later}" for later, name in names.items())
    return [
        f"step {number} is whole, and the newest again. Set aside under {checkpoints.directory}: {done}",
        f"the same `jaxkd train` goes on from step {number} and drops the lines of its logs after it; with other "
        "settings, such as a lower --config.optim.lr.peak, it needs --accept-changes",
        f"to undo this before that, rename {back}",
    ]


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Keep `train` out of a workdir, in which none is going on: neither on this host nor on another."""
    how = "Stop it first: SIGTERM saves and ends it"
    beat = watchdog.live_heartbeat(workdir)
    try:
        host = (workdir / ".lock").read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        host = "a host"
    if beat is not None and host != platform.node():  # of a run on this host the lock itself tells
        raise ValueError(
            f"a run is going on in {workdir}: {host} wrote heartbeat.json {time.time() - beat['time']:.0f} s ago, in "
            f"the phase '{beat['phase']}'. {how}; a killed run counts as over after {watchdog.HEARTBEAT_TTL_S:g} s"
        )
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(workdir))
        except ValueError:
            raise ValueError(f"a run is going on in {workdir}, on this host. {how}") from None
        yield
