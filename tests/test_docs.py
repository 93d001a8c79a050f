"""What the documentation shows runs, and does what the text beside it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.config import resolve
from jaxkd.core.types import LOG_FLOOR, Head
from jaxkd.data import rules
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences

DOCS = Path(__file__).parent.parent / "docs"
LOSSES = DOCS / "losses.md"


@pytest.fixture(scope="module")
def triangular():
    [block] = re.findall(r"^```python\n(.*?)^```", LOSSES.read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    exec(block, names)
    return names["triangular"]()


def _value(loss, arrays):
    hidden, unembed, teacher = arrays
    run = lambda hidden, unembed: loss(hidden @ unembed, teacher)
    return jax.value_and_grad(run, argnums=(0, 1))(hidden, unembed)


def _quotient(z, z_teacher):
    p, q = jax.nn.softmax(z_teacher), jax.nn.softmax(z)
    return jnp.sum(0.5 * jnp.square(p - q) / (p + q)) / z.shape[0]


def test_worked_example(triangular):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(20, 8)), rng.normal(size=(8, 50)), 2 * rng.normal(size=(20, 50))
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, _value(_quotient, [jnp.asarray(x) for x in arrays]))
    hidden, unembed, z_teacher = (jnp.asarray(x, jnp.float32) for x in arrays)
    # The teacher's logits are its hidden states, through a head that is the identity.
    teacher, weights = Head(z_teacher, jnp.eye(50)), jnp.full((1, 20), 1 / 20)

    def loss(hidden, unembed):
        targets = jnp.zeros(20, jnp.int32)
        return linear_divergence(
            (triangular,), Head(hidden, unembed), teacher, targets, weights, (1.0,), vocab=50, chunk=8
        )[0]

    value, gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, unembed)
    np.testing.assert_allclose(value, exact[0], rtol=1e-5)
    for got, want in zip(gradient, exact[1], strict=True):
        assert np.linalg.norm(got - want) < 2e-6 * np.linalg.norm(want)
    # Where the quotient is 0/0 in float32; the bound of 1 is reached.
    corner = jnp.array([[0.0, LOG_FLOOR]])
    slope = jax.grad(lambda lq: triangular.phi(corner[:, ::-1], lq, None)[0].sum())(corner)
    assert jnp.isfinite(slope).all()
    assert triangular.phi(corner[:, ::-1], corner, None)[0].sum() == pytest.approx(1.0)


def test_every_divergence_is_listed():
    text = LOSSES.read_text(encoding="utf-8")
    missing = [name for name in divergences.__all__ if f"`{name}(" not in text]
    assert not missing, f"docs/losses.md does not list {', '.join(missing)}"


def test_worked_rule(monkeypatch):
    [block] = re.findall(r"^```python\n(.*?)^```", (DOCS / "ddk.md").read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    exec(block, names)
    monkeypatch.setattr(rules, "by_excess", names["by_excess"], raising=False)
    monkeypatch.setattr(rules, "__all__", [*rules.__all__, "by_excess"])
    rule = resolve.call("by_excess(power=2.0)", rules, "data.mixture")
    assert rule.measures
    sampling, state = rule.init([10, 30, 60], None)
    np.testing.assert_allclose(sampling, [0.1, 0.3, 0.6])
    nats = np.asarray([4.0, 5.0, 2.0])
    gaps = rules.Gaps(nats, np.full(3, 3.0), nats, nats)
    sampling, _ = rule.update(state, gaps, 1)
    np.testing.assert_allclose(sampling, [0.2, 0.8, 0.0], atol=1e-12)


def test_numbers_of_the_ddk_page():
    """What it says of small gaps, and of one domain that is far behind."""

    def settled(ratios, **options):
        nats = np.log(ratios)
        gaps, rule = rules.Gaps(nats, 0 * nats, nats, nats), rules.ddk(**options)
        sampling, state = rule.init([1] * len(ratios), gaps)
        for interval in range(1, 50):
            sampling, state = rule.update(state, gaps, interval)
        return sampling

    text = " ".join((DOCS / "ddk.md").read_text(encoding="utf-8").split())
    small = np.linspace(1.2, 1.8, 10)
    for given, name in (({"smooth": False}, "Eq. 1 gives shares of"), ({}, "Eq. 2 settles at")):
        shares = settled(small, **given)
        assert f"{name} {shares.min():.3f} to {shares.max():.3f}" in text
    outliers = [np.r_[ratio, np.full(9, 1.2)] for ratio in (3.0, 6.0, 50.0)]
    eq1, eq2 = ([settled(ratios, **given)[0] for ratios in outliers] for given in ({"smooth": False}, {}))
    assert "Eq. 1 gives that one {:.2f}, {:.2f} or {:.2f}".format(*eq1) in text
    assert "Eq. 2 settles at {:.2f}, {:.2f} and {:.2f}".format(*eq2) in text
