"""Directories of checkpoints, and retention of steps."""

import errno
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from etils import epath


class Keep(NamedTuple):
    """Steps that are kept when a new one is committed: those that match any of the three rules."""

    latest: int = 2
    every: int = 0  # multiples of this; 0 for none
    best: int = 0  # those with the lowest metric, the later one of equals


def checkpoint_directory(directory: os.PathLike | str) -> epath.Path:
    """A local directory as an absolute path, or a gs:// path; ValueError for others, or without gcsfs."""
    text = os.fspath(directory)
    if "://" not in text:
        return epath.Path(Path(text).expanduser().absolute())
    scheme, _, rest = text.partition("://")
    if scheme != "gs" or not rest.partition("/")[0]:
        raise ValueError(f"checkpoints cannot be stored under {text}: give a local directory, or gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{text} is in a bucket of Google Cloud Storage, which needs gcsfs: install jaxkd[gcs]")
    return epath.Path(text)


def check_free_space(directory: epath.Path, size: int) -> None:
    """Raise OSError if arrays of `size` bytes do not fit on the disk of `directory`; a bucket's size is unknown."""
    if "://" in os.fspath(directory):
        return
    need, free = size * 1.05 + 2**20, shutil.disk_usage(directory).free
    if free < need:
        message = f"the disk is full: a checkpoint takes {need / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, message, os.fspath(directory))


def set_aside_names(directory: epath.Path, steps: Sequence[int]) -> dict[int, str]:
    """step -> an unused name (`STEP.aside`, `STEP.aside-2`, ...) that is not read as a checkpoint."""
    names: dict[int, str] = {}
    for step in steps:
        names[step], number = f"{step}.aside", 1
        while (directory / names[step]).exists():
            number += 1
            names[step] = f"{step}.aside-{number}"
    return names
