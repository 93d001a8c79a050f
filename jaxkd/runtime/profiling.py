"""Profiler traces of a range of steps (`--profile`)."""

import re
from pathlib import Path
from typing import Any

import jax


def parse_steps(text: str) -> tuple[int, int]:
    """First step and number of steps in "START:COUNT"; (0, 0) for ""."""
    if not text:
        return 0, 0
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        raise ValueError(f"--profile {text} must be START:COUNT, such as 10:3 for the steps 10, 11 and 12")
    return int(match[1]), int(match[2])


class Profile:
    """Traces `count` steps from step `first` (counted from 1; 0: none); a run that starts later traces nothing."""

    def __init__(self, directory: Path, first: int = 0, count: int = 0):
        self._directory, self._first, self._last, self._tracing = directory, first, first + count - 1, False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """Context for the host's part of a step; gives its number to any profiler that is attached."""
        if number == self._first:
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def dispatched(self, number: int, result: Any) -> bool:
        """Write the trace after its last step, once `result` is computed; returns whether it was written."""
        if not self._tracing or number < self._last:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Write the trace if the run ended within it."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
