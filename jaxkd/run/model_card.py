"""What an export's model card says of the run."""

import re
from pathlib import Path
from typing import Any

from jaxkd.config.schema import SELF, Experiment, Schedule
from jaxkd.models import weights
from jaxkd.report import records
from jaxkd.run.metadata import versions
from jaxkd.run.workdir import saved_info


def facts(e: Experiment, workdir: Path, step: int) -> dict[str, Any]:
    """The card's facts by name, for `models.export`; what is unknown is left out."""
    info, o = saved_info(workdir), e.optim
    teachers = [e.teacher.path] if e.teacher.path else [member.path for member in e.teacher.members.values()]
    origin = teachers[0] if e.student.path == "teacher" else e.student.path
    if origin in ("random", SELF):
        origin = ""
    elif origin in weights.KNOWN:
        origin = weights.KNOWN[origin].hub
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", origin):
        origin = Path(origin).name  # without the directories of this machine
    layers = info.student.kept_layers or e.student.layers
    card = {
        "name": workdir.name,
        "base_model": origin,
        "teacher": " and ".join(teachers),
        "parameters": f"{info.student.parameters:,}" if info.student.parameters else None,
        "kept layers": f"{', '.join(map(str, layers))} of the base model, counted from 0" if layers else None,
        "optimiser": f"AdamW, learning rate {_scalar(o.lr)}, b1 {o.b1:g}, b2 {o.b2:g}, "
        f"weight decay {o.weight_decay:g}, gradient norm clipped to {o.clip:g}",
        "batch": f"{e.data.batch} rows of {e.data.length} tokens",
        "steps": step,
        "objective": {name: _term(term) for name, term in e.objective.items()},
        "data": {name: domain.source for name, domain in e.data.sources.items()},
        "evaluation": [row for row in records.rows(workdir, records.EVALS) if row["step"] == step],
        "versions": dict(info.versions) or versions(),
        "command": info.command,
    }
    return {name: value for name, value in card.items() if value not in (None, [], "")}


def _scalar(value: float | Schedule) -> str:
    if not isinstance(value, Schedule):
        return f"{value:g}"
    end = "" if value.schedule == "constant" else f" to {value.end:g}"
    return f"{value.schedule} from {value.peak:g}{end}, {value.warmup} warm-up steps"


def _term(term: Any) -> str:
    temperature = f", temperature {_scalar(term.temperature)}" if term.divergence else ""
    return f"{term.divergence or term.feature}, weight {_scalar(term.weight)}{temperature}"
