"""Checkpoints of everything a run's next step depends on."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from jaxkd.core.types import PyTree
from jaxkd.runtime import multihost
from jaxkd.runtime.cluster import Unavailable
from jaxkd.train import checkpoint_errors, manifest, orbax_io
from jaxkd.train.checkpoint_errors import KINDS, Damaged, kind, passes, reason
from jaxkd.train.retention import Keep, aside, check_room, place
from jaxkd.train.state import BEGIN, TrainState, begun, present, restorable

T = TypeVar("T")
PATIENCE = 3600  # seconds that processes wait for the slowest of them while checkpoints are read
COMMITTED = "commit_success.txt"  # the file that Orbax writes last


class Found(NamedTuple):
    """What a run goes on from."""

    step: int
    state: TrainState
    progress: dict[str, Any]
    said: tuple[str, ...]  # what was wrong with later steps, a sentence each


class Checkpoints:
    """Steps of one run, written in the background, each with train state, mixture and the manifest of both.

    A step exists once its commit file does, so a killed writer leaves nothing that looks whole. What is read is held
    against the manifest before anybody sees it. With several processes all of them make the same calls, on a
    directory that they share; only `steps`, `latest` and `check` wait for no other.
    """

    def __init__(self, directory: os.PathLike | str, keep: Keep | None = None, read_only: bool = False):
        """Open or make `directory`; what an earlier process left half-written is swept.

        Args:
            directory: on a disk, or gs://BUCKET/PATH.
            keep: which steps stay, `Keep()` for None.
            read_only: write and sweep nothing.

        Raises:
            ValueError: a place that cannot be used.
        """
        self.directory = place(directory)
        self._arrays = orbax_io.handler()
        self._metrics: dict[int, float] = {}
        self._writing = self._told = False
        self._manager = None if read_only else self._writer(keep or Keep())

    def _writer(self, keep: Keep) -> Any:
        if multihost.is_main():
            self.directory.mkdir(parents=True, exist_ok=True)
        multihost.barrier("the directory of checkpoints", PATIENCE)
        self._metrics = self._measured()
        return orbax_io.manager(self.directory, keep, self._metrics)

    # ------------------------------------------------------------------------------------ what is there

    def steps(self) -> list[int]:
        """Steps that are whole on disk, whatever this process believes to have written, in their order.

        Raises:
            Unavailable, OSError: nobody knows, since the directory cannot be listed.
        """
        try:  # not `is_dir`, which is false too where a bucket does not answer
            names = [path.name for path in self.directory.iterdir() if path.name.isdigit()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            known = Unavailable if passes(error) else OSError
            raise known(f"{self.directory} cannot be listed: {reason(error)}") from error
        return sorted(int(name) for name in names if (self.directory / name / COMMITTED).exists())

    def latest(self) -> int | None:
        """The newest of them."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """That with the lowest metric, the later one of equals; None when none was saved with one."""
        lowest = lambda found: min(found, key=lambda step: (found[step], -step), default=None)
        return multihost.broadcast("the best of the checkpoints", lambda: lowest(self._measured()), PATIENCE)

    def _measured(self) -> dict[int, float]:
        found = {}
        for step in self.steps():
            try:
                metric = self._manifest(step).metric
            except (ValueError, OSError):  # whoever reads it will be told
                continue
            if metric is not None:
                found[step] = metric
        return found

    # ---------------------------------------------------------------------------------------- writing

    def save(self, step: int, state: TrainState, progress: dict[str, Any], metric: float | None = None) -> None:
        """Copy the state off the device and write it in the background; a step already there stays.

        Args:
            step: updates made.
            state: may be donated as soon as this returns.
            progress: JSON values: the mixture and the run's counters.
            metric: what `best` compares, lower is better; one that is not finite counts as none.

        Raises:
            ValueError: when later steps are there: `rollback` comes first.
            Unavailable: when storage does not answer, or shows this process other steps than process 0.
            OSError: when there is no room for it, or a background write failed.
        """
        assert self._manager is not None, "opened to read"
        self.wait()
        mine = list(self._manager.all_steps())
        there = multihost.broadcast("the steps before a save", lambda: mine, PATIENCE)
        if (step in there) != (step in mine):
            raise Unavailable(f"hosts see different checkpoints under {self.directory}: {there} and {mine}")
        if step in there:
            return
        if later := max((s for s in there if s > step), default=None):
            raise ValueError(f"{self.directory} already holds step {later}, so step {step} cannot follow: roll back")
        if multihost.is_main():
            check_room(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        progress = json.loads(json.dumps(progress))  # as it is now: it is written later, by a thread
        body = manifest.make(step, state, progress, metric)
        if body["metric"] is not None:
            self._metrics[step] = body["metric"]
        items = orbax_io.items(present(state), progress, body)
        try:
            self._manager.save(step, args=items, force=True)  # without it Orbax may pass a step over in silence
        except Exception as error:
            raise self._failed(error) from error
        self._writing = True

    def check(self) -> None:
        """Notice a background write that has failed; waits for none that is under way.

        Raises:
            OSError: one did.
        """
        if not self._writing or self._manager is None:
            return
        try:  # of this process's part; until the others have given up on it, the save is in progress
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Block until what was saved is on disk.

        Raises:
            OSError: when a background write failed.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error
        self._writing = False

    def _failed(self, error: Exception) -> OSError:
        self._told = True
        try:
            latest = self.latest()
            whole = "no step is whole" if latest is None else f"step {latest} is the last that is whole"
        except OSError:  # nor does it answer to this
            whole = "what is whole cannot be seen just now"
        said = f"writing a checkpoint under {self.directory} failed: {reason(error)} ({whole})"
        return Unavailable(f"{said}; it may pass: the same command goes on") if passes(error) else OSError(said)

    def rollback(self, step: int) -> dict[int, str]:
        """Go back to a step: later ones get names that nothing takes for checkpoints, and can be saved again.

        Returns:
            The new names of those, by step.

        Raises:
            ValueError: when there is no such step.
        """
        assert self._manager is not None, "opened to read"
        self.wait()
        there = self._agreed()
        if step not in there:
            raise ValueError(self._missing(step, there))
        names = aside(self.directory, [later for later in there if later > step])
        multihost.barrier("names for later checkpoints", PATIENCE)  # all have looked before one renames
        if multihost.is_main():
            for later in sorted(names, reverse=True):  # what a kill leaves is a rollback that went less far
                (self.directory / str(later)).rename(self.directory / names[later])
        for later in names:
            self._metrics.pop(later, None)
        multihost.barrier("later checkpoints to be set aside", PATIENCE)
        self._manager.reload()
        return names

    def close(self) -> None:
        """Finish writing and let go of the directory.

        Raises:
            OSError: when a background write failed and nobody has been told.
        """
        try:
            if self._manager is not None:
                self._manager.close()
        except Exception as error:
            if not self._told:
                raise self._failed(error) from error

    # ---------------------------------------------------------------------------------------- reading

    def recover(self, abstract: TrainState) -> Found | None:
        """The newest step that is what was saved, None where there is none; damaged later ones are set aside.

        Args:
            abstract: ShapeDtypeStruct leaves with shardings.

        Raises:
            ValueError: when no step can be read, or they are of another state than `abstract`.
            OSError: when reading fails for reasons outside the checkpoint.
        """
        if (found := self.newest(lambda step: self.restore(step, abstract))) is None:
            return None
        step, (state, progress), wrong = found
        names = self.rollback(step) if wrong else {}
        said = [f"{why}; it is kept as {names[later]}, and step {step} is used" for later, why in wrong.items()]
        return Found(step, state, progress, tuple(said))

    def newest(self, read: Callable[[int], T]) -> tuple[int, T, dict[int, str]] | None:
        """The newest step that can be read, what was read, and what is wrong with each later one.

        Args:
            read: of a step; raises `Damaged`.

        Raises:
            ValueError: when there are steps and none can be read.
        """
        wrong: dict[int, str] = {}
        for step in reversed(self._agreed()):
            try:
                return step, read(step), wrong
            except Damaged as error:
                wrong[step] = str(error)
        if wrong:
            raise ValueError(
                f"none of the checkpoints can be read, and all are left as they are: {'; '.join(wrong.values())}. "
                "Put one back from a copy, or begin anew in another --workdir"
            )
        return None

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and progress of a step, placed as `abstract` says; a part of `BEGIN` need not be there, or wanted.

        Args:
            step: one that exists.
            abstract: ShapeDtypeStruct leaves with shardings.

        Raises:
            Damaged: it is not what was saved; the message names the step.
            ValueError: there is no such step, or it is of another state.
            OSError: reading fails for reasons outside the checkpoint.
        """
        wanted = present(abstract)
        read, progress = self._read(step, wanted, whole=True)
        return TrainState(**begun(wanted, read)), progress

    def restore_student(self, step: int, abstract: PyTree) -> PyTree:
        """The student's parameters alone, as for evaluation and export.

        Raises:
            Damaged, ValueError, OSError: as `restore`.
        """
        return self._read(step, {"params": {"student": abstract}})[0]["params"]["student"]

    def restore_average(self, step: int, abstract: PyTree) -> PyTree:
        """The running average of the student's parameters alone.

        Raises:
            Damaged, ValueError, OSError: as `restore`.
        """
        return self._read(step, {"ema": abstract})[0]["ema"]

    def restore_objective(self, step: int, abstract: PyTree) -> PyTree:
        """What the objective learned, of those terms of `abstract` that are there; the others are left out.

        Raises:
            Damaged, ValueError, OSError: as `restore`; ValueError too when there are none.
        """

        def common() -> PyTree:
            there = manifest.within(self._manifest(step).leaves, "params", "objective")
            terms = {name: term for name, term in abstract.items() if name in there}
            if not terms:
                named = lambda names: ", ".join(f"'{name}'" for name in sorted(names)) or "none"
                raise ValueError(f"its terms with parameters are {named(there)}, asked for were {named(abstract)}")
            return terms

        target = {"params": {"objective": self._local(step, common)}}
        return self._read(step, target)[0]["params"]["objective"]

    def verify(self, step: int) -> None:
        """Read all of a step on this host, some arrays at a time, and forget it: for any machine, by one process.

        Raises:
            Damaged, ValueError, OSError: as `restore`.
        """

        def read() -> None:
            recorded = self._manifest(step)
            manifest.progress(recorded, self._text(step, "mixture"))
            for part in orbax_io.portions(self._arrays, self.directory / str(step) / "train", recorded.leaves):
                manifest.compare(recorded.leaves, part)
                manifest.verify(recorded.leaves, part)

        self._local(step, read)

    def _read(self, step: int, target: dict[str, PyTree], whole: bool = False) -> tuple[dict[str, PyTree], Any]:
        """Parts of a train state, or all of it and the progress, bit for bit what was saved."""

        def read() -> tuple[dict[str, PyTree], Any, manifest.Manifest]:
            recorded = self._manifest(step)
            kept = manifest.within(recorded.leaves)
            asked = restorable(kept, target) if whole else target
            vain = {name for name in BEGIN if name in kept and name not in asked}
            there = {name: leaf for name, leaf in recorded.leaves.items() if name.split(".")[0] not in vain}
            manifest.compare(there, manifest.named(asked), whole)
            progress = manifest.progress(recorded, self._text(step, "mixture")) if whole else None
            arrays = self.directory / str(step) / "train"
            return orbax_io.read(self._arrays, arrays, asked, whole and not vain), progress, recorded

        found, progress, recorded = self._local(step, read)
        try:
            manifest.verify(recorded.leaves, manifest.named(found))
        except Damaged as error:
            raise Damaged(self._cannot(step, error)) from None
        return found, progress

    def _manifest(self, step: int) -> manifest.Manifest:
        return manifest.read(self._text(step, "manifest"), step)

    def _text(self, step: int, item: str) -> str:
        return manifest.text(self.directory / str(step), item)

    def _local(self, step: int, read: Callable[[], T]) -> T:
        """What this process reads of a step; where one process fails, all do, for the same reason."""
        found: list[T] = []
        error: Exception | None = None
        cause: Exception | None = None
        if not (self.directory / str(step) / COMMITTED).exists():
            error = ValueError(self._missing(step, self.steps()))
        else:
            try:
                found.append(read())
            except (ValueError, OSError) as caught:
                error, cause = KINDS[kind(caught)](self._cannot(step, caught)), caught
        mine = None if error is None else [kind(error), str(error)]
        if (
            wrong := checkpoint_errors.shared(multihost.all_gather("a checkpoint that all read", mine, PATIENCE))
        ) is not None:
            raise wrong from cause
        return found[0]

    def _cannot(self, step: int, error: Exception) -> str:
        return f"checkpoint {self.directory / str(step)} cannot be restored: {reason(error)}"

    def _missing(self, step: int, there: Sequence[int]) -> str:
        names = ", ".join(map(str, there)) or "none"
        hint = "; all hosts must see one directory" if not multihost.is_main() else ""
        return f"there is no checkpoint {self.directory / str(step)}; steps that are there: {names}{hint}"

    def _agreed(self) -> list[int]:
        """The steps as process 0 sees them: a listing may differ between hosts."""
        return multihost.broadcast("the list of checkpoints", self.steps, PATIENCE)
