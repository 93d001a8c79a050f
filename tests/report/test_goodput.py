"""The account of a run's wall clock, against sums made by hand."""

import pytest

from jaxkd.models import flops
from jaxkd.report import goodput
from jaxkd.runtime import compile_cache


class Clock:
    """Lines as a process writes them, one phase behind the other."""

    def __init__(self):
        self.now, self.rows = 1000.0, []

    def add(self, phase, seconds, first=0, step=None, **more):
        self.now += seconds
        step = first if step is None else step
        self.rows.append({"time": self.now, "seconds": seconds, "phase": phase, "first": first, "step": step, **more})

    def begin(self, step=0, seconds=1):
        self.add("start", 1)
        self.add("load", seconds, step)


def test_steps_that_are_made_again_count_once():
    clock = Clock()
    clock.add("start", 10)
    clock.add("load", 5)
    clock.add("compile", 20, programs=3, compile_s=18.0)
    clock.add("steps", 100, 0, 50)
    clock.add("checkpoint", 2, 50)
    clock.add("steps", 60, 50, 80)  # and killed, 7 s later
    clock.now += 7 + 30  # until it is started again
    clock.add("start", 10)
    clock.add("load", 6, 50)
    clock.add("compile", 4, 50, programs=3, cached=2, compile_s=1.0)
    clock.add("steps", 40, 50, 70)
    clock.add("end", 0, 70)
    account = goodput.account(clock.rows)
    assert account.seconds["again"] == pytest.approx(60)  # all of the steps 51 to 80
    assert account.seconds["steps"] == pytest.approx(100 + 40)
    assert account.seconds["down"] == pytest.approx(37)
    assert account.wall == pytest.approx(clock.now - 1000)
    assert account.share("steps") == pytest.approx(140 / account.wall)
    assert (account.starts, account.programs, account.cached, account.compile_s) == (2, 6, 2, 19.0)
    assert " in 2 starts;" in goodput.sentence(clock.rows)
    clock = Clock()
    for reached, back in ((30, 0), (25, 20), (40, 10)):  # restored at 0, at 20, and at 10
        clock.begin(back)
        clock.add("steps", reached - back, back, reached)  # a second each
    account = goodput.account(clock.rows)
    assert account.seconds["steps"] == pytest.approx(40)
    assert account.seconds["again"] == pytest.approx(30 + 5 + 30 - 40)
    clock = Clock()
    clock.begin()
    clock.add("steps", 100, 0, 100)
    clock.begin(seconds=3)  # a weight's file was missing: it never knew from which step to go on
    clock.add("end", 0, finished=False)
    clock.begin(100)
    clock.add("steps", 50, 100, 150)
    account = goodput.account(clock.rows)
    assert account.seconds["steps"] == pytest.approx(150)
    assert "again" not in account.seconds
    assert account.seconds["load"] == pytest.approx(5)
    clock = Clock()
    clock.begin()
    clock.add("steps", 20, 0, 10, skipped=3)
    account = goodput.account(clock.rows)
    assert account.seconds["skipped"] == pytest.approx(6)
    assert account.seconds["steps"] == pytest.approx(14)


def test_what_a_finished_run_is_asked_later_costs_it_nothing():
    clock = Clock()
    clock.begin()
    clock.add("steps", 8, 0, 4)
    clock.add("end", 0, 4, finished=True)
    before = goodput.account(clock.rows)
    clock.now += 86400
    clock.begin(4)
    clock.add("end", 0, 4, finished=True)
    assert goodput.account(clock.rows) == before
    clock.now += 86400  # then it is made longer
    clock.begin(4)
    clock.add("steps", 2, 4, 5)
    after = goodput.account(clock.rows)
    assert after.wall == pytest.approx(before.wall + 4)


def test_no_lines_rates_and_kept_programs(tmp_path, monkeypatch):
    """Eight v5e chips of 197 TFLOP/s that share 788 TFLOPs for a second are half busy."""
    assert goodput.account([]) is None
    assert goodput.sentence([]) == goodput.page([]) == ""
    assert flops.rates(788e12, 1.0, 8, "TPU v5 lite") == pytest.approx({"tflops": 98.5, "mfu": 0.5})
    assert flops.rates(8e12, 2.0, 4, "cpu") == {"tflops": 1.0}
    import jax

    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert compile_cache.configure(tmp_path / "programs", "cpu") is None
        assert compile_cache.configure(tmp_path / "programs", "tpu") == tmp_path / "programs"
        assert compile_cache.configure(tmp_path / "others", "tpu") == tmp_path / "programs"  # as JAX is set
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compile_cache.compilation_cache.reset_cache()
