"""A profiler trace of some steps, for the asking."""

import re
from pathlib import Path
from typing import Any

import jax


def asked(text: str) -> tuple[int, int]:
    """First step and number of steps of "START:COUNT"; 0 and 0 of nothing.

    Raises:
        ValueError: when it is anything else.
    """
    if not text:
        return 0, 0
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        raise ValueError(f"--profile {text} must be START:COUNT, such as 10:3 for the steps 10, 11 and 12")
    return int(match[1]), int(match[2])


class Profile:
    """Traces `count` steps from `first` on; a run that begins after `first` traces nothing."""

    def __init__(self, directory: Path, first: int = 0, count: int = 0):
        """Nothing is traced yet.

        Args:
            directory: of the traces.
            first: step, counted from 1; 0 for none.
            count: of steps.
        """
        self._directory, self._first, self._last, self._tracing = directory, first, first + count - 1, False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """A context for what a step does on the host; any profiler that listens learns the step's number."""
        if number == self._first:
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def dispatched(self, number: int, result: Any) -> bool:
        """Whether the trace is now written: after its last step, which is waited for."""
        if not self._tracing or number < self._last:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Write what was traced, if the steps ended too early."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
