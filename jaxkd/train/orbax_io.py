"""Writing and reading a checkpoint's items with Orbax; no other file imports it."""

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
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every file; we report its exceptions
    # Compression would cost seconds of CPU time to save a tenth of float weights.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


class _Manager(ocp.CheckpointManager):
    """A manager that takes a step's metric from our manifest, and never asks JAX about preemption.

    `reached_preemption_sync_point` takes the number of its last caller as the process's step, stops all processes one
    after the largest, and compares for equality only: only the training loop may call it.
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

    `metric(step)` is that of an existing step or None; a new step's is the `metrics` of its save.
    """
    policies: list[Any] = [checkpoint_managers.LatestN(keep.latest)]
    if keep.every:
        policies.append(checkpoint_managers.EveryNSteps(keep.every))
    if keep.best:
        lowest = checkpoint_managers.BestN(
            get_metric_fn=lambda metric: metric, reverse=True, n=keep.best, keep_checkpoints_without_metrics=False
        )
        policies.append(lowest)
    # With active_processes, barriers use the coordination service, which times out and names missing processes.
    processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
    return _Manager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            atomicity_options=options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            create=False,
            multiprocessing_options=options.MultiprocessingOptions(
                active_processes=processes, barrier_sync_key_prefix="jaxkd"
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
    """Arrays as described by `target`, ShapeDtypeStructs with shardings; `complete`: they are the whole step.

    Uses the handler, not the manager: it does not wait for other processes, so a failure can be reported. Errors as
    `checkpoint_errors.classify`.
    """
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=not complete
    )
    return call_orbax(lambda: arrays.restore(path, args=arguments))


def portions(
    arrays: ocp.PyTreeCheckpointHandler, path: epath.Path, leaves: Mapping[str, manifest.Leaf]
) -> Iterator[dict[str, jax.Array]]:
    """All arrays of a step by dotted path, `_PORTION` bytes at a time, on this process's first device.

    Errors as `checkpoint_errors.classify`.
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
