"""How a checkpoint's parts are written and read: the only file that knows Orbax."""

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import options

from jaxkd.core.types import PyTree
from jaxkd.train import checkpoint_errors, manifest
from jaxkd.train.checkpoint_errors import Damaged
from jaxkd.train.retention import Keep, Retention

_PORTION = 2**30  # bytes that `portions` holds at a time


def handler() -> ocp.PyTreeCheckpointHandler:
    """What writes and reads arrays."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every file; its errors are ours to tell
    # Float weights hardly shrink: compressing them costs seconds of the cores that train, and saves a tenth.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


class _Manager(ocp.CheckpointManager):
    """Without Orbax's own questions after SIGTERM, which it asks at a save and, of an old step, from a thread later on.

    JAX takes the last number that anybody asked with for the step that a process is at, stops all of them one after the
    largest, and looks for nothing but equality: the loop alone may ask.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def manager(directory: epath.Path, keep: Keep, metrics: Mapping[int, float]) -> ocp.CheckpointManager:
    """What writes steps in the background, and removes those that do not stay.

    Args:
        directory: one that exists.
        keep: which steps stay.
        metrics: of steps, looked at whenever one has been saved.
    """
    # Named, they meet through the coordination service, which gives up in the end and says who is missing.
    everyone = set(range(jax.process_count())) if jax.process_count() > 1 else None
    return _Manager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=Retention(keep, metrics),
            atomicity_options=options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            create=False,
            multiprocessing_options=options.MultiprocessingOptions(
                active_processes=everyone, barrier_sync_key_prefix="jaxkd"
            ),
        ),
        item_handlers={
            "train": handler(),
            "mixture": ocp.JsonCheckpointHandler(),
            "manifest": ocp.JsonCheckpointHandler(),
        },
    )


def items(state: PyTree, progress: dict[str, Any], body: dict[str, Any]) -> ocp.args.Composite:
    """What one step is made of: arrays, JSON values, and the manifest of both."""
    return ocp.args.Composite(
        train=ocp.args.PyTreeSave(state), mixture=ocp.args.JsonSave(progress), manifest=ocp.args.JsonSave(body)
    )


def read(arrays: ocp.PyTreeCheckpointHandler, place: epath.Path, target: PyTree, whole: bool) -> PyTree:
    """Arrays as `target` says. By the handler, which waits for no other process: one that fails must be able to say so.

    Args:
        arrays: from `handler`.
        place: of a step's arrays.
        target: ShapeDtypeStruct leaves with shardings.
        whole: whether there must be nothing else.

    Raises:
        OSError, Damaged: as `damage.judged`.
    """
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=not whole
    )
    return checkpoint_errors.attempt(lambda: arrays.restore(place, args=arguments))


def portions(
    arrays: ocp.PyTreeCheckpointHandler, place: epath.Path, leaves: Mapping[str, manifest.Leaf]
) -> Iterator[dict[str, jax.Array]]:
    """All arrays of a step by their names, some at a time, on this process's first device.

    Args:
        arrays: from `handler`.
        place: of a step's arrays.
        leaves: what was saved.

    Raises:
        OSError, Damaged: as `damage.judged`.
    """
    tree = checkpoint_errors.attempt(lambda: arrays.metadata(place).tree)
    found = manifest.named(tree)
    if gone := sorted(leaves.keys() - found.keys()):
        raise Damaged(f"{gone[0]} is missing")
    for names in manifest.portions(leaves, _PORTION):
        asked = {id(found[name]) for name in names}
        some = jax.tree.map(lambda leaf, asked=asked: leaf if id(leaf) in asked else ocp.PLACEHOLDER, tree)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), some)
        arguments = ocp.args.PyTreeRestore(item=some, restore_args=how)
        got = manifest.named(checkpoint_errors.attempt(functools.partial(arrays.restore, place, args=arguments)))
        yield {name: jnp.asarray(got[name]) for name in names}
