"""Where checkpoints are, and which of them stay."""

import errno
import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath


class Keep(NamedTuple):
    """Which steps stay when a new one is whole: all that one of the three names."""

    latest: int = 2
    every: int = 0  # steps that this divides, 0 for none
    best: int = 0  # those with the lowest metric

    def of(self, steps: Sequence[int], metrics: Mapping[int, float]) -> set[int]:
        """The steps that stay.

        Args:
            steps: all there are.
            metrics: of those that were measured; of equals the later is the better.
        """
        steps = sorted(steps)
        measured = sorted((s for s in steps if s in metrics), key=lambda s: (metrics[s], -s))
        multiples = [s for s in steps if self.every and s % self.every == 0]
        return {*steps[-self.latest :], *multiples, *measured[: self.best]}


class Retention:
    """`Keep` as Orbax asks for it."""

    def __init__(self, keep: Keep, metrics: Mapping[int, float]):
        """`metrics` is looked at whenever a step has been saved."""
        self._keep, self._metrics = keep, metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Of each checkpoint, which have a `step`, whether it stays."""
        stay = self._keep.of([checkpoint.step for checkpoint in checkpoints], self._metrics)
        return [checkpoint.step in stay for checkpoint in checkpoints]


def place(directory: os.PathLike | str) -> epath.Path:
    """A directory on a disk or in a bucket, absolute.

    Raises:
        ValueError: it is neither, or what a bucket needs is not installed.
    """
    text = os.fspath(directory)
    if "://" not in text:
        return epath.Path(Path(text).expanduser().absolute())
    scheme, _, rest = text.partition("://")
    if scheme != "gs" or not rest.partition("/")[0]:
        raise ValueError(f"{text} is no place for checkpoints: give a directory on a disk, or gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{text} is in a bucket of Google Cloud Storage, which needs gcsfs: install jaxkd[gcs]")
    return epath.Path(text)


def check_room(directory: epath.Path, size: int) -> None:
    """See that a checkpoint fits, before anything is written; of a bucket nobody knows.

    Args:
        directory: one that exists.
        size: bytes of its arrays.

    Raises:
        OSError: it does not.
    """
    if "://" in os.fspath(directory):
        return
    need, free = size * 1.05 + 2**20, shutil.disk_usage(directory).free
    if free < need:
        said = f"the disk is full: a checkpoint takes {need / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, said, os.fspath(directory))


def aside(directory: epath.Path, steps: Sequence[int]) -> dict[int, str]:
    """Names, by step, that nothing takes for checkpoints and nothing has yet."""
    names: dict[int, str] = {}
    for step in steps:
        names[step], number = f"{step}.aside", 1
        while (directory / names[step]).exists():
            number += 1
            names[step] = f"{step}.aside-{number}"
    return names
