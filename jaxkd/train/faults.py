"""Steps that were left out: how many a run may have, and what it says when there are too many."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

FORGIVEN = 100
"""Good steps that make up for one whose numbers were not finite."""
_SHOWN = 8  # rows of a step in a message; all of them are in metrics.jsonl


class Left(NamedTuple):
    """A step that was left out because a number was not finite."""

    step: int
    name: str
    value: float
    rows: Mapping[str, Sequence[int]]  # by domain


def suspects(values: Mapping[str, float], rows: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The rows that may be to blame, by domain: of those domains that have a number which is not finite.

    Where every domain's are finite, as when only the gradient is broken, they are the rows of all.

    Args:
        values: a step's metrics, those of a domain under `name/domain`.
        rows: the step's, by domain.
    """
    broken = {name.partition("/")[2] for name, value in values.items() if "/" in name and not math.isfinite(value)}
    return {domain: list(found) for domain, found in rows.items() if domain in broken or not broken & set(rows)}


class Faults:
    """Decides when a run has left out too much."""

    def __init__(self, limit: int, total: int):
        """Nothing has gone wrong in this process.

        Args:
            limit: steps with a number that is not finite; one more stops the run.
            total: steps that earlier processes left out, for whatever reason.
        """
        self.total, self._limit, self._debt = total, limit, 0.0
        self._left: deque[Left] = deque(maxlen=limit + 1)

    def see(
        self,
        step: int,
        values: Mapping[str, float],
        skipped: bool,
        rows: Mapping[str, Sequence[int]],
        saved: Callable[[], int | None],
    ) -> None:
        """Count a step.

        Args:
            step: its number.
            values: its metrics, divided.
            skipped: whether its update was left out.
            rows: its suspects, where it was.
            saved: gives the last checkpoint's step.

        Raises:
            FloatingPointError: when the parameters are not finite, or too many steps were not.
        """
        self.total += skipped
        numbers = {name: values.get(name, math.nan) for name in ("loss", "grad_norm", "param_norm")}
        name = next((name for name, value in numbers.items() if not math.isfinite(value)), None)
        if name is None:
            self._debt = max(0.0, self._debt - 1 / FORGIVEN)
            return
        self._left.append(Left(step, name, numbers[name], rows))
        self._debt += 1.0
        if name == "param_norm" or not skipped or self._debt > self._limit:
            raise FloatingPointError(self._sentence(saved()))

    def _sentence(self, saved: int | None) -> str:
        last, several = self._left[-1], len(self._left) > 1
        said = f"{last.name} is {last.value} at step {last.step}"
        if several:
            steps = ", ".join(str(left.step) for left in list(self._left)[:-1])
            said += f", and the updates of steps {steps} were left out already (optim.skip_limit={self._limit})"
        rows = "; ".join(f"step {left.step}: {_rows(left.rows)}" for left in self._left if left.rows)
        said += f". Rows, all of which are in metrics.jsonl: {rows}" if rows else ""
        checkpoint = f"step {saved}" if saved is not None else "none yet"
        return (
            f"{said}. The last checkpoint is {checkpoint}. Look at those rows, or lower optim.lr.peak or optim.clip "
            "and go on with --accept-changes, from an earlier step after `jaxkd rollback`"
        )


def _rows(rows: Mapping[str, Sequence[int]]) -> str:
    named = []
    for domain, found in rows.items():
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        named.append(f"{domain} {', '.join(map(str, found[:_SHOWN]))}{more}")
    return ", ".join(named)
