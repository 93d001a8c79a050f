"""Whole runs that meet numbers which are not finite, and what a run leaves behind of its time."""

import itertools
import json

import numpy as np
import pytest
from harness import final_state, here, lines, tiny_arguments

from jaxkd.core import schedules
from jaxkd.data import loader
from jaxkd.runtime import files

STEPS = ("--config.run.steps=12", "--config.run.checkpoint_every=6", "--config.data.interval=6", "--no-check")
STEPS += ("--config.run.mesh.data=1",)


def poisoned(read, chosen):
    """`read_rows` with two weights in every row that is `chosen` that overflow the loss, and add up to nothing."""

    def rows(domains, domain, row):
        values = read(domains, domain, row)
        for index, (d, r) in enumerate(zip(domain.tolist(), row.tolist(), strict=True)):
            if len(domains) > 1 and chosen(d, r):
                values["weights"][index, :2] = 1e38, -1e38
        return values

    return rows


def strict(path) -> list[dict]:
    """The lines of a file, as a reader takes them that knows JSON and nothing more."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def survived(two_domains, tmp_path_factory):
    """A run in which one row breaks every step that it is in; two of its steps are traced."""
    root = tmp_path_factory.mktemp("survived")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "read_rows", poisoned(loader.read_rows, lambda d, r: (d, r) == (0, 5)))
        arguments = tiny_arguments(two_domains, root / "rows", *STEPS)
        result = here("train", "--workdir", str(root / "run"), *arguments, "--profile", "3:2")
    assert result.returncode == 0, result.stderr
    return root / "run", result


def test_a_row_that_breaks_a_step_is_named_and_the_run_goes_on_and_accounts_for_its_time(survived):
    """An update that was not updates is none to the optimiser: the next one has its learning rate."""
    workdir, _ = survived
    rows = strict(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    broken = [row for row in rows if "skipped" in row]
    assert 1 <= len(broken) <= 3
    assert [row["skipped"] for row in broken] == list(range(1, len(broken) + 1))
    for row in broken:
        assert row["loss"] is None
        assert list(row["rows"]) == ["alpha"]  # the other domain's numbers are finite
        assert 5 in row["rows"]["alpha"]
    assert all(row["loss"] is not None for row in rows if "skipped" not in row)
    state, _ = final_state(workdir)
    assert all(np.isfinite(np.frombuffer(b, np.float32)).all() for key, b in state.items() if "student" in key)
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert f"{len(broken)} updates were skipped, first at step {broken[0]['step']}" in page
    schedule, updates = schedules.cosine(1e-2, steps=12, warmup=2, end=1e-3), 0
    for row in rows:
        assert row["lr"] == pytest.approx(float(schedule(updates)), rel=1e-5)
        updates += "skipped" not in row
    assert updates < len(rows)
    # The wall clock is accounted for.
    workdir, result = survived
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert f"profile: steps up to 4 are traced in {workdir / 'profile'}" in result.stdout
    rows = files.read_jsonl(workdir / "goodput.jsonl")
    phases = [row["phase"] for row in rows]
    assert phases[:2] == ["start", "load"]
    assert phases[-1] == "end"
    assert rows[-1]["finished"]
    assert {"compile", "evaluation", "mixture", "checkpoint", "steps"} <= set(phases)
    for before, after in itertools.pairwise(rows):  # one phase begins where another ends
        assert after["time"] - after["seconds"] == pytest.approx(before["time"], abs=0.05)
    assert sum(row["step"] - row["first"] for row in rows if row["phase"] == "steps") == 12
    assert sum(row.get("programs", 0) for row in rows) > 0  # what other runs of this process compiled is not again
    assert "goodput: " in result.stdout
    assert "<h2>Wall clock</h2>" in (workdir / "report.html").read_text(encoding="utf-8")
    assert json.loads((workdir / "heartbeat.json").read_text())["phase"] == "end"
    # Speed, of devices whose peak is unknown.
    rows = lines(survived[0] / "metrics.jsonl")
    assert all(row["tflops"] > 0 for row in rows)
    assert not any("mfu" in row for row in rows)  # a CPU


@pytest.fixture(scope="module")
def stopped(survived, two_domains, tmp_path_factory):
    """The same run, of which every step is broken."""
    root = tmp_path_factory.mktemp("stopped")
    more = ("--config.optim.skip_limit=2", "--config.data.mixture=uniform", "--config.run.log_every=5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "read_rows", poisoned(loader.read_rows, lambda d, r: d == 1))
        arguments = tiny_arguments(two_domains, survived[0].parent / "rows", *STEPS, *more)
        result = here("train", "--workdir", str(root / "run"), *arguments)
    return root / "run", result


def test_numbers_that_stay_broken_stop_the_run_early_and_save_nothing_more(stopped):
    workdir, result = stopped
    assert result.returncode == 1
    assert "loss is nan at step 3" in result.stderr
    assert "The last checkpoint is none yet" in result.stderr
    assert "Traceback" not in result.stderr
    assert [row["step"] for row in strict(workdir / "metrics.jsonl")] == [1, 2, 3]
    assert not list((workdir / "checkpoints").glob("[0-9]*"))
    assert sum(row.get("cached", 0) for row in files.read_jsonl(workdir / "goodput.jsonl")) > 0
    assert "compiled programs: " in result.stdout
