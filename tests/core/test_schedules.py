"""Schedules and metrics."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkd.core import metrics, schedules


def at(schedule, step):
    return float(schedules.value(schedule, step))


@pytest.mark.parametrize("kind", schedules.__all__)
def test_warm_up_then_peak(kind):
    schedule = getattr(schedules, kind)(2.0, steps=100, warmup=10, end=0.5)
    assert at(schedule, 0) == pytest.approx(0.2)  # not 0, which would waste the first step
    assert at(schedule, 4) == pytest.approx(1.0)
    assert at(schedule, 9) == pytest.approx(2.0)
    assert at(schedule, 10) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_end_is_reached_and_held(kind):
    schedule = getattr(schedules, kind)(2.0, steps=100, warmup=10, end=0.5)
    assert at(schedule, 55) == pytest.approx(1.25)
    assert at(schedule, 100) == pytest.approx(0.5)
    assert at(schedule, 1000) == pytest.approx(0.5)
    assert at(getattr(schedules, kind)(2.0, steps=100), 0) == pytest.approx(2.0)


def test_constant_stays_a_number():
    assert schedules.constant(0.3, steps=10) == 0.3
    assert at(schedules.constant(0.3, steps=10, warmup=2), 50) == pytest.approx(0.3)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 3), st.integers(0, 2)), min_size=1, max_size=12))
def test_domain_metrics_add_up_to_the_total(rows):
    sums, weights, domain = (jnp.asarray(column) for column in zip(*rows, strict=True))
    by_name = metrics.per_domain("kd", sums, weights, domain.astype(jnp.int32), ("a", "b", "c"))
    for part in (0, 1):
        total = sum(by_name[f"kd/{name}"][part] for name in "abc")
        np.testing.assert_allclose(total, by_name["kd"][part], atol=1e-4)
    assert all(
        f"kd/{name}" not in metrics.read(by_name) for i, name in enumerate("abc") if not (weights[domain == i]).sum()
    )
