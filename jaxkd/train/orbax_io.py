"""Orbax: writing and reading a checkpoint's items. No other file imports it."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers, options

from jaxkd.core.types import PyTree
from jaxkd.train import manifest
from jaxkd.train.checkpoint_errors import DamagedCheckpoint, call_orbax
from jaxkd.train.retention import Keep

_PORTION = 2**30  # bytes that `portions` reads at a time


def handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of array trees."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every file; its exceptions are reported by us
    # Float weights hardly compress: it would cost seconds of the cores that train and save a tenth.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


class _Manager(ocp.CheckpointManager):
    """A manager that takes a step's metric from our manifest, and never asks JAX about preemption.

    `reached_preemption_sync_point` takes the last number that anybody asked with as the process's step, stops all
    processes one after the largest, and compares for equality only: the training loop alone may ask.
    """

    def __init__(self, *args: Any, metric: Callable[[int], float | None], **options: Any):
        self._metric = metric  # first, since Orbax reads the metrics of existing steps as it starts
        super().__init__(*args, **options)

    def metrics(self, step: int) -> float | None:
        return self._metric(step)

    def reached_preemption(self, step: int) -> bool:
        return False


def manager(directory: epath.Path, keep: Keep, metric: Callable[[int], float | None]) -> ocp.CheckpointManager:
    """Writes steps in the background and deletes those that are not kept.

    Args:
        directory: an existing one.
        keep: which steps are kept.
        metric: of an existing step, None where it has none; a new one's is the `metrics` of its save.
    """
    policies: list[Any] = [checkpoint_managers.LatestN(keep.latest)]
    if keep.every:
        policies.append(checkpoint_managers.EveryNSteps(keep.every))
    if keep.best:  # its last n of the descending order
        lowest = checkpoint_managers.BestN(
            get_metric_fn=lambda metric: metric, reverse=True, n=keep.best, keep_checkpoints_without_metrics=False
        )
        policies.append(lowest)
    # With named processes, barriers use the coordination service, which times out and says who is missing.
    everyone = set(range(jax.process_count())) if jax.process_count() > 1 else None
    return _Manager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
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
        metric=metric,
    )


def items(state: PyTree, progress: dict[str, Any], body: dict[str, Any]) -> ocp.args.Composite:
    """The items of a step: arrays, JSON values, and the manifest of both."""
    return ocp.args.Composite(
        train=ocp.args.PyTreeSave(state), mixture=ocp.args.JsonSave(progress), manifest=ocp.args.JsonSave(body)
    )


def read(arrays: ocp.PyTreeCheckpointHandler, path: epath.Path, target: PyTree, complete: bool) -> PyTree:
    """Arrays as `target` describes them.

    Through the handler, not the manager: it waits for no other process, so one that fails can report it.

    Args:
        arrays: from `handler`.
        path: of a step's arrays.
        target: ShapeDtypeStruct leaves with shardings.
        complete: whether the step must hold nothing else.

    Raises:
        OSError, DamagedCheckpoint: see `checkpoint_errors.classify`.
    """
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=not complete
    )
    return call_orbax(lambda: arrays.restore(path, args=arguments))


def portions(
    arrays: ocp.PyTreeCheckpointHandler, path: epath.Path, leaves: Mapping[str, manifest.Leaf]
) -> Iterator[dict[str, jax.Array]]:
    """All arrays of a step by dotted path, `_PORTION` bytes at a time, on this process's first device.

    Args:
        arrays: from `handler`.
        path: of a step's arrays.
        leaves: of its manifest.

    Raises:
        OSError, DamagedCheckpoint: see `checkpoint_errors.classify`.
    """
    tree = call_orbax(lambda: arrays.metadata(path).tree)
    saved = manifest.arrays_by_path(tree)
    if missing := sorted(leaves.keys() - saved.keys()):
        raise DamagedCheckpoint(f"{missing[0]} is missing")
    for names in manifest.portions(leaves, _PORTION):
        wanted = {id(saved[name]) for name in names}
        target = jax.tree.map(lambda leaf, wanted=wanted: leaf if id(leaf) in wanted else ocp.PLACEHOLDER, tree)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        arguments = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
        values = manifest.arrays_by_path(call_orbax(functools.partial(arrays.restore, path, args=arguments)))
        yield {name: jnp.asarray(values[name]) for name in names}
