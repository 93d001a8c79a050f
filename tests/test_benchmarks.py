"""The benchmark that README offers runs, and what it says of exactness and memory holds; times are not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIMES = ["time_over_matmul", "time_over_dense"]
KEYS = ["name", "tokens", "vocab", *TIMES, "temp_bytes", "dense_temp_bytes", "max_grad_error"]


def quick(name: str, *more: str, seconds: int = 600) -> list[dict]:
    """The rows that a benchmark prints, without the tests' own flags: eight devices and no optimiser are no user's."""
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--json", *more]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_quick():
    rows = quick("losses")
    assert [row["name"] for row in rows] == ["forward_kl", "reverse_kl", "jsd_0.5", "bucket_top64", "forward_kl+ce"]
    for row in rows:
        assert list(row) == KEYS
        assert row["max_grad_error"] < 1e-5, row
        assert row["temp_bytes"] < row["dense_temp_bytes"], row
        assert all(row[time] > 0 for time in TIMES), row


@pytest.mark.slow
def test_quick_teachers(tmp_path):
    rows = {row["signal"]: row for row in quick("teachers", "--directory", str(tmp_path), seconds=1200)}
    assert rows["sft"]["step_over_sft"] == 1.0
    assert rows["top-64"]["payload_bytes_per_token"] < 180
    assert rows["sampled 50"]["payload_bytes_per_token"] < 40
    kl = {name: row["kl_of_payload"] for name, row in rows.items()}
    assert kl["hidden bfloat16"] < 1e-3 < kl["hidden int8"] < 0.03 < kl["top-64"] < kl["top-8"]
    assert rows["top-64"]["teacher_gflop_a_step"] == 0 < rows["hidden int8"]["teacher_gflop_a_step"]


@pytest.mark.slow
def test_quick_loop():
    (row,) = quick("loop")
    assert (row["name"], row["tokens"]) == ("small", 256)
    assert min(row[f"{kind}_step_s"] for kind in ("bare", "loop", "silent")) > 0
    assert 0 < max(row[f"{part}_ms"] for part in ("input", "log", "rest")) < row["own_ms"]
    assert row["enough_step_s"] == pytest.approx(row["own_ms"] / 1e3 / 0.02, abs=1e-3)
    assert row["steps"] == 15  # of three turns of six, each but the first


@pytest.mark.slow
def test_quick_stored(tmp_path):
    half, wide, narrow = quick("stored", "--directory", str(tmp_path))
    # What int8 weights alone lose, and with bfloat16 activations, which lose about as much again.
    assert 0 < wide["kl"] < narrow["kl"] < 0.05
    assert 0 < half["kl"] < narrow["kl"]
    assert narrow["agreement"] > 0.9
    assert narrow["mib"] < 0.7 * half["mib"]


@pytest.mark.slow
def test_quick_sampling():
    """On two of the model's layers."""
    rows = quick("sampling", "--layers", "2", "--new", "2", "--rounds", "1")
    forms = ["decode", "decode batch", "mixed lengths", "queue", "prefill"]
    assert [row["name"] for row in rows] == [f"{form} float32" for form in forms]
    for row in rows:
        assert list(row) == ["name", "batch", "tokens_per_s", "over_limit", "over_transformers"]
        assert row["batch"] == (1 if row is rows[0] else 8)
        assert row["tokens_per_s"] > 0 < row["over_limit"]
        assert row["over_transformers"] is None
