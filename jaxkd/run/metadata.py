"""What a run says of itself: its command, versions, devices, models and rows."""

from typing import Any

import jax

from jaxkd.config.schema import TeacherBlock
from jaxkd.models.transformer import parameter_count
from jaxkd.run.job import Job
from jaxkd.run.load import Domains
from jaxkd.run.workdir import commit, versions


def facts(job: Job, rows: Domains, kept_layers, memory: dict[str, int], command: str) -> dict[str, Any]:
    """What `run.json` holds: how the run was started, on what, of which models and rows."""

    def side(model, path: str) -> dict[str, Any]:
        return {"path": path, "parameters": parameter_count(model.config), "layers": model.config.layers}

    e = job.experiment
    named = {"teacher": e.teacher.path} | {name: member.path for name, member in e.teacher.models.items()}
    return {
        "command": command,
        "versions": versions(),
        "git": commit(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(job.mesh.shape),
        "sharding_notes": list(job.models.notes),
        "teachers": {
            name: side(model, named[name]) | {"bytes_per_device": memory.get(name, 0)}
            for name, model in job.models.teachers.items()
        },
        "student": side(job.models.student, e.student.path) | {"kept_layers": kept_layers},
        "domains": [
            {
                "name": p.name,
                "train_rows": p.train_rows,
                "whole_rows": p.whole_rows,  # of the whole text, which natural shares follow
                "valid_rows": p.valid_rows,
                "documents": p.documents,
                "duplicates": p.duplicates,
                "fingerprint": p.fingerprint,
            }
            for p in rows.prepared
        ],
    }


def models(t: TeacherBlock, found: dict[str, Any], source_layers: int, kept) -> list[str]:
    """A line per model of what `facts` found: what it is, and what it takes."""
    lines = []
    for name, side in found["teachers"].items():
        cache = "" if t.is_self else t.models[name].cache
        signal = "hidden" if t.members and cache else t.signal
        how = f"{signal} from {cache}" if cache else "live" if signal == "head" else f"live {signal}"
        path = "the student's own average" if t.is_self else side["path"]
        held = f"{side['bytes_per_device'] / 2**20:,.0f} MiB a device" if not t.is_self else "in the train state"
        called = name if name == "teacher" else f"teacher {name}"
        lines.append(
            f"{called}: {path}, {side['layers']} layers, {side['parameters'] / 1e6:,.1f}M parameters, {how}, {held}"
        )
    side = found["student"]
    of = f" of {source_layers}" if kept else ""
    size = f"{side['parameters'] / 1e6:,.1f}M parameters"
    return [*lines, f"student: {side['path']}, {side['layers']}{of} layers, {size}"]
