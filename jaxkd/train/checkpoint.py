"""Checkpoints of the whole training state."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from jaxkd.core.types import PyTree
from jaxkd.runtime import multihost
from jaxkd.runtime.cluster import Unavailable
from jaxkd.train import checkpoint_errors, manifest, orbax_io
from jaxkd.train.checkpoint_errors import BY_PRIORITY, DamagedCheckpoint, first_line, is_transient, priority
from jaxkd.train.retention import Keep, check_free_space, checkpoint_directory, set_aside_names
from jaxkd.train.state import OPTIONAL, TrainState, parts, parts_to_read, with_defaults

T = TypeVar("T")
PATIENCE = 3600  # timeout in seconds of collective operations
COMMITTED = "commit_success.txt"  # written last by Orbax


class Recovered(NamedTuple):
    """The checkpoint that a run resumes from."""

    step: int
    state: TrainState
    progress: dict[str, Any]
    warnings: tuple[str, ...]  # a sentence per damaged later step


class Checkpoints:
    """The steps of one run, each with train state, mixture and the manifest of both, written in the background.

    A step exists once its commit file does, so an interrupted write leaves no step. All reads are verified against the
    manifest. With several processes, all of them make the same calls on one shared directory; `steps`, `latest` and
    `check` do not wait for other processes.
    """

    def __init__(self, directory: os.PathLike | str, keep: Keep | None = None, read_only: bool = False):
        """Open or create `directory` (local or gs://BUCKET/PATH) and delete unfinished writes, unless `read_only`.

        Raises ValueError: the directory cannot be used.
        """
        self.directory = checkpoint_directory(directory)
        self._arrays = orbax_io.handler()
        self._writing = self._reported = False
        self._manager: Any = None
        if not read_only:
            if multihost.is_main():
                self.directory.mkdir(parents=True, exist_ok=True)
            multihost.barrier("the directory of checkpoints", PATIENCE)
            self._manager = orbax_io.manager(self.directory, keep or Keep(), self._metric)

    def steps(self) -> list[int]:
        """Committed steps in ascending order, listed from disk; Unavailable or OSError if that fails."""
        try:  # not `is_dir`, which is also False if a bucket does not answer
            names = [path.name for path in self.directory.iterdir() if path.name.isdigit()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            kind = Unavailable if is_transient(error) else OSError
            raise kind(f"{self.directory} cannot be listed: {first_line(error)}") from error
        return sorted(int(name) for name in names if (self.directory / name / COMMITTED).exists())

    def latest(self) -> int | None:
        """The newest committed step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest metric, the latest among equals; None if no step has a metric."""

        def lowest() -> int | None:
            metrics = [(metric, -step) for step in self.steps() if (metric := self._metric(step)) is not None]
            return -min(metrics)[1] if metrics else None

        return multihost.broadcast("the best of the checkpoints", lowest, PATIENCE)

    def _metric(self, step: int) -> float | None:
        try:
            return self._manifest(step).metric
        except (ValueError, OSError):  # reported when the step itself is read
            return None

    def save(self, step: int, state: TrainState, progress: dict[str, Any], metric: float | None = None) -> None:
        """Copy the state to the host and write it in the background; an existing step is not overwritten.

        Args:
            state: may be donated as soon as this returns.
            progress: JSON values: the mixture and the run's counters.
            metric: compared by `best`, lower is better; ignored if it is not finite.

        Raises:
            ValueError: later steps exist; `rollback` first.
            Unavailable: storage does not answer, or processes see different steps.
            OSError: the disk is full, or a background write failed.
        """
        assert self._manager is not None, "opened with read_only"
        self.wait()
        local = list(self._manager.all_steps())
        existing = multihost.broadcast("the steps before a save", lambda: local, PATIENCE)
        if (step in existing) != (step in local):
            raise Unavailable(f"hosts see different checkpoints under {self.directory}: {existing} and {local}")
        if step in existing:
            return
        if later := max((s for s in existing if s > step), default=None):
            raise ValueError(f"{self.directory} already holds step {later}, so step {step} cannot follow: roll back")
        if multihost.is_main():
            check_free_space(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        progress = json.loads(json.dumps(progress))  # a copy: a thread writes it later
        body = manifest.build(step, state, progress, metric)
        items = orbax_io.items(parts(state), progress, body)
        with self._write_errors():  # without force Orbax may skip a step silently
            self._manager.save(step, args=items, metrics=body["metric"], force=True)
        self._writing = True

    def check(self) -> None:
        """Raise OSError if a background write has failed, without waiting for one in progress."""
        if not self._writing or self._manager is None:
            return
        with self._write_errors():  # before `is_saving_in_progress`, which stays true until all processes give up
            self._manager.check_for_errors()
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for background writes; OSError if one failed."""
        if self._manager is None:
            return
        with self._write_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._writing = False

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._reported = True
            try:
                latest = self.latest()
                intact = "no step is complete" if latest is None else f"step {latest} is the last complete one"
            except OSError:
                intact = "the directory cannot be listed now"
            message = f"writing a checkpoint under {self.directory} failed: {first_line(error)} ({intact})"
            if is_transient(error):
                raise Unavailable(f"{message}; run the same command again") from error
            raise OSError(message) from error

    def rollback(self, step: int) -> dict[int, str]:
        """Make `step` the newest by renaming later ones to `STEP.aside`; returns the new names by step.

        Raises ValueError: there is no such step.
        """
        assert self._manager is not None, "opened with read_only"
        self.wait()
        existing = self._steps_of_main()
        if step not in existing:
            raise ValueError(self._missing(step, existing))
        names = set_aside_names(self.directory, [later for later in existing if later > step])
        multihost.barrier("names for later checkpoints", PATIENCE)  # process 0 renames after all have listed
        if multihost.is_main():
            for later in sorted(names, reverse=True):  # newest first, so an interruption leaves a valid prefix
                (self.directory / str(later)).rename(self.directory / names[later])
        multihost.barrier("later checkpoints to be set aside", PATIENCE)
        self._manager.reload()
        return names

    def close(self) -> None:
        """Finish writing and release the directory; OSError for a failed write that was not reported yet."""
        if self._manager is not None:
            with contextlib.suppress(Exception) if self._reported else self._write_errors():
                self._manager.close()

    def recover(self, abstract: TrainState) -> Recovered | None:
        """The newest intact step, None if there are no steps; damaged later ones are renamed to `STEP.aside`.

        Raises:
            ValueError: no step is intact, or they do not match `abstract`.
            OSError: reading fails for reasons outside the checkpoint.
        """
        if (newest := self.newest(lambda step: self.restore(step, abstract))) is None:
            return None
        step, (state, progress), damaged = newest
        names = self.rollback(step) if damaged else {}
        warnings = [f"{why}; it is kept as {names[later]}, and step {step} is used" for later, why in damaged.items()]
        return Recovered(step, state, progress, tuple(warnings))

    def newest(self, read: Callable[[int], T]) -> tuple[int, T, dict[int, str]] | None:
        """The newest step that `read` does not find damaged: (step, read(step), error messages of later steps).

        Raises ValueError: there are steps and none is intact.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self._steps_of_main()):
            try:
                return step, read(step), damaged
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
        if damaged:
            raise ValueError(
                f"none of the checkpoints can be read, and all are left as they are: {'; '.join(damaged.values())}. "
                "Put one back from a copy, or start over in another --workdir"
            )
        return None

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and progress of a step, sharded as `abstract`; `state.OPTIONAL` parts may differ.

        Raises:
            DamagedCheckpoint: it differs from what was saved; the message names the step.
            ValueError: there is no such step, or it does not match `abstract`.
            OSError: reading fails for reasons outside the checkpoint.
        """
        wanted = parts(abstract)
        read, progress = self._read(step, wanted, complete=True)
        return abstract._replace(**with_defaults(wanted, read)), progress

    def restore_student(self, step: int, abstract: PyTree) -> PyTree:
        """`params["student"]` alone, for evaluation and export. Raises as `restore`."""
        return self._read(step, {"params": {"student": abstract}})[0]["params"]["student"]

    def restore_average(self, step: int, abstract: PyTree) -> PyTree:
        """`ema` alone. Raises as `restore`."""
        return self._read(step, {"ema": abstract})[0]["ema"]

    def restore_objective(self, step: int, abstract: PyTree) -> PyTree:
        """The objective's parameters, of the terms of `abstract` that the step has. Raises as `restore`, or if none."""

        def common_terms() -> PyTree:
            saved = manifest.children(self._manifest(step).leaves, "params", "objective")
            terms = {name: term for name, term in abstract.items() if name in saved}
            if not terms:
                quoted = lambda names: ", ".join(f"'{name}'" for name in sorted(names)) or "none"
                raise ValueError(f"its terms with parameters are {quoted(saved)}, asked for were {quoted(abstract)}")
            return terms

        target = {"params": {"objective": self._on_all(step, common_terms)}}
        return self._read(step, target)[0]["params"]["objective"]

    def verify(self, step: int) -> None:
        """Verify a whole step in portions, in one process without an accelerator. Raises as `restore`."""

        def read() -> None:
            saved = self._manifest(step)
            manifest.parse_progress(saved, self._item_text(step, "mixture"))
            for portion in orbax_io.portions(self._arrays, self.directory / str(step) / "train", saved.leaves):
                manifest.check_shapes(saved.leaves, portion)
                manifest.verify_checksums(saved.leaves, portion)

        self._on_all(step, read)

    def _read(self, step: int, target: dict[str, PyTree], complete: bool = False) -> tuple[dict[str, PyTree], Any]:
        """Verified parts of a train state; with `complete`, all of it and the progress."""

        def read() -> tuple[dict[str, PyTree], Any, manifest.Manifest]:
            saved = self._manifest(step)
            names = manifest.children(saved.leaves)
            wanted = parts_to_read(names, target) if complete else target
            unused = {name for name in OPTIONAL if name in names and name not in wanted}
            leaves = {name: leaf for name, leaf in saved.leaves.items() if name.split(".")[0] not in unused}
            manifest.check_shapes(leaves, manifest.arrays_by_path(wanted), complete)
            progress = manifest.parse_progress(saved, self._item_text(step, "mixture")) if complete else None
            path = self.directory / str(step) / "train"
            return orbax_io.read(self._arrays, path, wanted, complete and not unused), progress, saved

        values, progress, saved = self._on_all(step, read)
        try:
            manifest.verify_checksums(saved.leaves, manifest.arrays_by_path(values))
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(self._not_restored(step, error)) from None
        return values, progress

    def _manifest(self, step: int) -> manifest.Manifest:
        return manifest.parse(self._item_text(step, "manifest"), step)

    def _item_text(self, step: int, item: str) -> str:
        return manifest.item_text(self.directory / str(step), item)

    def _on_all(self, step: int, read: Callable[[], T]) -> T:
        """`read()` in this process; an error of one process is raised in all."""
        values: list[T] = []
        error: Exception | None = None
        cause: Exception | None = None
        if not (self.directory / str(step) / COMMITTED).exists():
            error = ValueError(self._missing(step, self.steps()))
        else:
            try:
                values.append(read())
            except (ValueError, OSError) as caught:
                error, cause = BY_PRIORITY[priority(caught)](self._not_restored(step, caught)), caught
        report = None if error is None else [priority(error), str(error)]
        reports = multihost.all_gather("a checkpoint that all read", report, PATIENCE)
        if (failure := checkpoint_errors.combine(reports)) is not None:
            raise failure from cause
        return values[0]

    def _not_restored(self, step: int, error: Exception) -> str:
        return f"checkpoint {self.directory / str(step)} cannot be restored: {first_line(error)}"

    def _missing(self, step: int, existing: Sequence[int]) -> str:
        names = ", ".join(map(str, existing)) or "none"
        hint = "; all hosts must see one directory" if not multihost.is_main() else ""
        return f"there is no checkpoint {self.directory / str(step)}; existing steps: {names}{hint}"

    def _steps_of_main(self) -> list[int]:
        """`steps` of process 0 in all processes, since listings may differ between hosts."""
        return multihost.broadcast("the list of checkpoints", self.steps, PATIENCE)
