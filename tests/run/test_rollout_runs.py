"""A run whose teacher writes its text before every step: killed, it goes on to the same bits."""

import pytest
from harness import Background, assert_same_run, jaxkd

TEXT = (
    "--config.teacher.signal=token",
    "--config.teacher.prompt=8",
    "--config.objective.kd.weight=0.0",
    "--config.objective.kd.divergence=next_token",
)


@pytest.mark.slow
def test_a_killed_run_writes_the_same_text_again(arguments, tmp_path):
    arguments = [*arguments, *TEXT]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert jaxkd("train", "--no-check", "--workdir", str(whole), *arguments).returncode == 0
    run = Background(killed, arguments, cache=False)
    run.wait_for_step(8)  # behind a checkpoint, before the last step
    run.process.kill()
    run.finish()
    result = jaxkd("train", "--workdir", str(killed), *arguments)
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stdout
    assert_same_run(killed, whole)
