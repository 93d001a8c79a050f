"""Checkpoints of everything a run's next step depends on. The only file that knows Orbax."""

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers, options

from jaxkd.train.state import TrainState
from jaxkd.types import PyTree


class Checkpoints:
    """Steps of one run on disk, written in the background, each with train state and mixture together.

    A step exists once its commit file does, so a killed writer leaves nothing that looks whole.
    """

    def __init__(self, directory: Path, keep: int = 2, read_only: bool = False):
        """Open or make `directory`; what an earlier process left half-written is swept.

        Args:
            directory: absolute.
            keep: how many of the latest steps stay.
            read_only: write and sweep nothing.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                preservation_policy=checkpoint_managers.LatestN(keep),
                atomicity_options=options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE),
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=True,
                read_only=read_only,
            ),
            # Float weights hardly shrink: compressing them costs seconds of the cores that train, and saves a tenth.
            item_handlers={
                "train": ocp.PyTreeCheckpointHandler(use_compression=False),
                "mixture": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Copy the state off the device and write it in the background; a step already there stays.

        Args:
            step: updates made.
            state: may be donated as soon as this returns.
            progress: JSON values: the mixture and the run's counters.

        Raises:
            OSError: when there is no room for it, or an earlier background write failed.
        """
        self._raise_background_error()
        if step == self.latest():
            return
        self._check_room(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(train=ocp.args.PyTreeSave(_present(state)), mixture=ocp.args.JsonSave(progress)),
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and progress of a step, placed as `abstract` says.

        Args:
            step: one that exists.
            abstract: ShapeDtypeStruct leaves with shardings.

        Raises:
            ValueError: when the step cannot be read as this state; the message names the step.
        """
        target = _present(abstract)
        arguments = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
        )
        with self._readable(step):
            self._check(step, target)
            read = self._manager.restore(step, args=ocp.args.Composite(train=arguments, mixture=ocp.args.JsonRestore()))
        return TrainState(**read["train"]), read["mixture"]

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Name the checkpoint in whatever goes wrong while reading it."""
        where = Path(self._manager.directory) / str(step)
        if step not in self._manager.all_steps():
            there = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise ValueError(f"there is no checkpoint {where}; steps that are there: {there}")
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise ValueError(f"checkpoint {where} cannot be restored: {reason}") from error

    def _check(self, step: int, target: PyTree) -> None:
        """Compare shapes and dtypes first: Orbax would cast a wrong dtype in silence."""
        saved = _leaves(self._manager.item_metadata(step)["train"].tree)
        for name, leaf in _leaves(target).items():
            there, wanted = (
                f"{np.dtype(x.dtype)}{list(x.shape)}" if x is not None else "nothing" for x in (saved.get(name), leaf)
            )
            if there != wanted:
                raise ValueError(f"{name} should be {wanted}, there is {there}")

    def restore_student(self, step: int, abstract: PyTree) -> PyTree:
        """The student's parameters alone, as for evaluation and export.

        Raises:
            ValueError: as `restore`.
        """
        return self._restore(step, {"params": {"student": abstract}})["params"]["student"]

    def restore_average(self, step: int, abstract: PyTree) -> PyTree:
        """The running average of the student's parameters alone.

        Raises:
            ValueError: as `restore`.
        """
        return self._restore(step, {"ema": abstract})["ema"]

    def restore_objective(self, step: int, abstract: PyTree) -> PyTree:
        """What the objective learned, of those terms of `abstract` that are there; the others are left out.

        Raises:
            ValueError: when there are none, or as `restore`.
        """
        with self._readable(step):
            tree = self._manager.item_metadata(step)["train"].tree
            there = tree["params"].get("objective") or {}
            common = {name: term for name, term in abstract.items() if name in there}
            if not common:
                named = lambda terms: ", ".join(f"'{name}'" for name in terms) or "none"
                raise ValueError(f"its terms with parameters are {named(there)}, asked for were {named(abstract)}")
        return self._restore(step, {"params": {"objective": common}})["params"]["objective"]

    def _restore(self, step: int, target: dict[str, PyTree]) -> dict[str, PyTree]:
        """Parts of a train state."""
        arguments = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        with self._readable(step):
            self._check(step, target)
            read = self._manager.restore(step, args=ocp.args.Composite(train=arguments))
        return read["train"]

    def _check_room(self, state: TrainState) -> None:
        # Before writing: what Orbax and TensorStore print from their threads on a full disk helps nobody.
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) * 1.05 + 2**20
        free = shutil.disk_usage(self._manager.directory).free
        if free < need:
            said = f"the disk is full: a checkpoint takes {need / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
            raise OSError(errno.ENOSPC, said, str(self._manager.directory))

    def _raise_background_error(self) -> None:
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise OSError(f"writing a checkpoint under {self._manager.directory} failed: {error}") from error

    def wait(self) -> None:
        """Block until what was saved is on disk.

        Raises:
            OSError: when a background write failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise OSError(f"writing a checkpoint under {self._manager.directory} failed: {error}") from error
        self._raise_background_error()

    def close(self) -> None:
        """Finish writing and let go of the directory."""
        self._manager.close()


def _present(state: TrainState) -> dict[str, Any]:
    """The parts that a state has, by name: one that is not kept leaves nothing on disk."""
    return {name: part for name, part in state._asdict().items() if part is not None}


def _leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves that are arrays, by a path that does not tell tuples, dicts and NamedTuples apart, as on disk."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    name = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
    return {".".join(map(name, path)): leaf for path, leaf in found if hasattr(leaf, "shape")}
