"""Host-side count of skipped steps, and the error when there are too many non-finite ones."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

FORGIVE_AFTER = 100
"""Finite steps that compensate one non-finite step."""
_SHOWN = 8  # rows of a step in the error message


class SkippedStep(NamedTuple):
    """A step whose update was skipped because a value was not finite."""

    step: int
    name: str
    value: float
    rows: Mapping[str, Sequence[int]]  # by domain


def suspects(values: Mapping[str, float], rows: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Rows by domain of a non-finite step: of domains with a non-finite metric `name/domain`, else of all."""
    broken = {name.partition("/")[2] for name, value in values.items() if "/" in name and not math.isfinite(value)}
    return {domain: list(ids) for domain, ids in rows.items() if domain in broken or not broken & set(rows)}


class Faults:
    """Counts skipped steps and raises if too many were not finite."""

    def __init__(self, limit: int, total: int):
        # `limit`: tolerated non-finite steps; `total`: steps skipped by earlier processes of the run, for any reason.
        self.total, self._limit, self._debt = total, limit, 0.0
        self._skipped: deque[SkippedStep] = deque(maxlen=limit + 1)

    def record(
        self,
        step: int,
        values: Mapping[str, float],
        skipped: bool,
        rows: Mapping[str, Sequence[int]],
        latest_checkpoint: Callable[[], int | None],
    ) -> None:
        """Count a step with its metrics (divided by their weights) and, if it was skipped, its suspect rows.

        Raises FloatingPointError: the parameters are not finite, or too many steps were not.
        """
        self.total += skipped
        numbers = {name: values.get(name, math.nan) for name in ("loss", "grad_norm", "param_norm")}
        name = next((name for name, value in numbers.items() if not math.isfinite(value)), None)
        if name is None:
            self._debt = max(0.0, self._debt - 1 / FORGIVE_AFTER)
            return
        self._skipped.append(SkippedStep(step, name, numbers[name], rows))
        self._debt += 1.0
        if name == "param_norm" or not skipped or self._debt > self._limit:
            raise FloatingPointError(self._message(latest_checkpoint()))

    def _message(self, checkpoint: int | None) -> str:
        *earlier, last = self._skipped
        message = f"{last.name} is {last.value} at step {last.step}"
        if earlier:
            steps = ", ".join(str(skipped.step) for skipped in earlier)
            message += f", after the skipped steps {steps} (optim.skip_limit={self._limit})"
        if rows := "; ".join(f"step {s.step}: {_format_rows(s.rows)}" for s in self._skipped if s.rows):
            message += f". Rows of these steps (all of them are in metrics.jsonl): {rows}"
        return (
            f"{message}. The last checkpoint is {'none yet' if checkpoint is None else f'step {checkpoint}'}. Look at "
            "those rows, or lower optim.lr.peak or optim.clip and resume with --accept-changes, from an earlier step "
            "after `jaxkd rollback`"
        )


def _format_rows(rows: Mapping[str, Sequence[int]]) -> str:
    parts = []
    for domain, ids in rows.items():
        more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
        parts.append(f"{domain} {', '.join(map(str, ids[:_SHOWN]))}{more}")
    return ", ".join(parts)
