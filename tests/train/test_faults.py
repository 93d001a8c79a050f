"""How many steps a run may leave out, and what it says when there are more."""

import math

import pytest

from jaxkd.train.faults import Faults, suspects

GOOD = {"loss": 2.0, "grad_norm": 1.0, "param_norm": 9.0}
BAD = GOOD | {"loss": math.nan, "ce": math.nan}
ROWS = {"code": list(range(20)), "law": [3]}


def record(faults, step, values, rows=None):
    faults.record(step, values, values is not GOOD and math.isfinite(values["param_norm"]), rows or {}, lambda: 40)


def test_limits_of_faults():
    faults = Faults(limit=2, total=5)
    for step in (41, 42):
        record(faults, step, BAD, ROWS)
    with pytest.raises(FloatingPointError) as stop:
        record(faults, 43, BAD, {"law": [7]})
    message = str(stop.value)
    assert message.startswith("loss is nan at step 43")
    for part in ("41, 42", "step 41: code 0, 1, 2, 3, 4, 5, 6, 7 and 12 more, law 3", "step 43: law 7", "step 40"):
        assert part in message
    assert faults.total == 8
    faults = Faults(limit=2, total=0)
    for step in range(1, 2001):
        record(faults, step, BAD if step % 150 == 0 else GOOD)
    often = lambda: [record(faults, step, BAD if step % 10 == 0 else GOOD) for step in range(2001, 2101)]
    with pytest.raises(FloatingPointError):
        often()


def test_what_stops_at_once_what_a_spike_counts_as_and_suspects():
    with pytest.raises(FloatingPointError, match="grad_norm is inf at step 1"):
        record(Faults(limit=0, total=0), 1, GOOD | {"grad_norm": math.inf})
    with pytest.raises(FloatingPointError, match="param_norm is inf at step 1"):
        record(Faults(limit=9, total=0), 1, GOOD | {"param_norm": math.inf})
    faults = Faults(limit=0, total=0)
    for step in range(1, 9):
        faults.record(step, GOOD, True, ROWS, lambda: None)
    assert faults.total == 8
    assert suspects({"loss": math.nan, "ce/code": 1.0, "ce/law": math.inf}, ROWS) == {"law": [3]}
    assert suspects({"loss": 1.0, "grad_norm": math.inf, "ce/code": 1.0}, ROWS) == ROWS
