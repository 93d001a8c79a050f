"""A run whose teacher writes its text before every step: killed, it goes on to the same bits."""

import pytest
from harness import Background, assert_same_run, here, lines

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
    assert here("train", "--no-check", "--workdir", str(whole), *arguments).returncode == 0
    rows = lines(whole / "metrics.jsonl")
    # A random teacher writes any byte as likely as any other; on the data's text the loss falls below 5 by now.
    assert rows[-1]["loss"] > 5.4
    assert rows[0]["tokens"] < 8 * 63 - 20  # prompts have no weight
    run = Background(killed, arguments)
    run.wait_for_step(8)  # behind a checkpoint, before the last step
    run.process.kill()
    run.finish()
    result = here("train", "--workdir", str(killed), *arguments)
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stdout
    assert_same_run(killed, whole)
