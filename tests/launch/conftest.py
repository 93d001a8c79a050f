"""Launchers beside a run that is no jaxkd, but ends as one does."""

import shlex
import shutil
import sys

import pytest
from launching import LAUNCH, RUN


@pytest.fixture
def copy(tmp_path):
    """A copy of the launchers beside a jaxkd that saves when it is told to stop, and SLURM's two commands."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    # A shebang can name no interpreter whose path has a space.
    interpreted = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / "run.py"))} "$@"\n'
    programs = {
        "run.py": RUN,
        ".venv/bin/jaxkd": interpreted,
        "srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
        "scontrol": '#!/bin/sh\necho "scontrol $*"\n',
    }
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path
