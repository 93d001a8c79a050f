"""run.json: a run's command, versions, devices, models and rows."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from jaxkd import __version__
from jaxkd.config.schema import TeacherBlock
from jaxkd.models.transformer import parameter_count
from jaxkd.run.job import Job
from jaxkd.run.load import Domains

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "tokenizers")


def facts(job: Job, rows: Domains, kept_layers, memory: dict[str, int], command: str) -> dict[str, Any]:
    """The content of `run.json`; `memory` is bytes per device of each teacher."""

    def side(model, path: str) -> dict[str, Any]:
        return {"path": path, "parameters": parameter_count(model.config), "layers": model.config.layers}

    e = job.experiment
    paths = {"teacher": e.teacher.path} | {name: member.path for name, member in e.teacher.models.items()}
    return {
        "command": command,
        "versions": versions(),
        "git": git_commit(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(job.mesh.shape),
        "sharding_notes": list(job.models.notes),
        "teachers": {
            name: side(model, paths[name]) | {"bytes_per_device": memory.get(name, 0)}
            for name, model in job.models.teachers.items()
        },
        "student": side(job.models.student, e.student.path) | {"kept_layers": kept_layers},
        "domains": [
            {
                "name": p.name,
                "train_rows": p.train_rows,
                "whole_rows": p.whole_rows,  # of the whole text, which natural shares are by
                "valid_rows": p.valid_rows,
                "documents": p.documents,
                "duplicates": p.duplicates,
                "fingerprint": p.fingerprint,
            }
            for p in rows.prepared
        ],
    }


def model_lines(t: TeacherBlock, facts: dict[str, Any], source_layers: int) -> list[str]:
    """A line for the console per model, from `facts`; `source_layers` has the model that the student is cut from."""
    lines = []
    for name, side in facts["teachers"].items():
        cache = "" if t.is_self else t.models[name].cache
        signal = "hidden" if t.members and cache else t.signal
        how = f"{signal} from {cache}" if cache else "online" if signal == "head" else f"online {signal}"
        path = "the student's own average" if t.is_self else side["path"]
        memory = f"{side['bytes_per_device'] / 2**20:,.0f} MiB a device" if not t.is_self else "in the train state"
        title = name if name == "teacher" else f"teacher {name}"
        lines.append(
            f"{title}: {path}, {side['layers']} layers, {side['parameters'] / 1e6:,.1f}M parameters, {how}, {memory}"
        )
    side = facts["student"]
    of = f" of {source_layers}" if side["kept_layers"] else ""
    size = f"{side['parameters'] / 1e6:,.1f}M parameters"
    return [*lines, f"student: {side['path']}, {side['layers']}{of} layers, {size}"]


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
