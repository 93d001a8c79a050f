"""The record of a run, run.json: its command, versions, devices, models and rows; and console lines on its models."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jaxkd import __version__
from jaxkd.config.schema import TeacherBlock, changed
from jaxkd.models.transformer import parameter_count
from jaxkd.report.records import DomainInfo, ModelInfo, RunInfo
from jaxkd.report.text import amount, number
from jaxkd.run.job import Job
from jaxkd.run.load import Domains

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "tokenizers")


def info(job: Job, rows: Domains, kept_layers: Sequence[int], memory: Mapping[str, int], command: str) -> RunInfo:
    """The record of a run; `memory` has the bytes per device of each teacher's weights."""

    def model(side, path: str, **more) -> ModelInfo:
        return ModelInfo(path, parameter_count(side.config), side.config.layers, **more)

    e = job.experiment
    paths = {"teacher": e.teacher.path} | {name: member.path for name, member in e.teacher.models.items()}
    teachers = {
        name: model(side, paths[name], bytes_per_device=memory.get(name, 0))
        for name, side in job.models.teachers.items()
    }
    return RunInfo(
        command,
        versions(),
        git_commit(),
        f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        jax.process_count(),
        dict(job.mesh.shape),
        tuple(job.models.notes),
        teachers,
        model(job.models.student, e.student.path, kept_layers=tuple(kept_layers or ())),
        tuple(DomainInfo(**{name: getattr(p, name) for name in DomainInfo._fields}) for p in rows.prepared),
        tuple(changed(e)),
    )


def model_lines(t: TeacherBlock, record: RunInfo, source_layers: int) -> list[str]:
    """A console line per model: its size, for teachers their signal and memory, for the student of how many layers."""
    lines = []
    for name, model in record.teachers.items():
        cache = "" if t.is_self else t.models[name].cache
        signal = "hidden" if t.members and cache else t.signal
        source = f"{signal} from {cache}" if cache else "online" if signal == "head" else f"online {signal}"
        path = "the student's own average" if t.is_self else model.path
        memory = "in the train state" if t.is_self else f"{amount(model.bytes_per_device / 2**20)} MiB a device"
        label = name if name == "teacher" else f"teacher {name}"
        lines.append(
            f"{label}: {path}, {model.layers} layers, {number(model.parameters)} parameters, {source}, {memory}"
        )
    s = record.student
    of = f" of {source_layers}" if s.kept_layers else ""
    return [*lines, f"student: {s.path}, {s.layers}{of} layers, {number(s.parameters)} parameters"]


def versions() -> dict[str, str]:
    """Of Python, jaxkd and the packages that its results depend on."""
    own = {"python": platform.python_version(), "jaxkd": __version__}
    return own | {name: importlib.metadata.version(name) for name in _PACKAGES}


def git_commit() -> str | None:
    """The git commit of the checkout that this code runs from; None without git, or in another repository."""
    root = Path(__file__).resolve().parents[2]
    git = lambda *words: subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    try:
        if Path(git("rev-parse", "--show-toplevel").stdout.strip()).resolve() != root:
            return None
        return git("rev-parse", "HEAD").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
