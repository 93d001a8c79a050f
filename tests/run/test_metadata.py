"""A run's console lines on its models."""

import pytest

from jaxkd.config.schema import TeacherBlock
from jaxkd.report.records import ModelInfo, RunInfo
from jaxkd.run.metadata import model_lines


@pytest.mark.parametrize(
    ("size", "memory"), [(181_520, " 0.173 MiB"), (538_060_032, " 513 MiB"), (40 * 2**30, " 40,960 MiB")]
)
def test_no_memory_is_nothing(size, memory):
    record = RunInfo(teachers={"teacher": ModelInfo("random", 45_380, 4, size)}, student=ModelInfo("teacher", 9, 2))
    assert memory in model_lines(TeacherBlock(path="random"), record, 4)[0]
