"""What the documentation shows runs, and does what the text beside it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import divergences
from jaxkd.kernels.api import linear_divergence
from jaxkd.types import LOG_FLOOR, Head

LOSSES = Path(__file__).parent.parent / "docs/losses.md"


@pytest.fixture(scope="module")
def triangular():
    """The divergence that docs/losses.md adds as an example."""
    [block] = re.findall(r"^```python\n(.*?)^```", LOSSES.read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    exec(block, names)
    return names["triangular"]()


def _value(loss, arrays):
    """(value, gradients in hidden and unembed) of a loss of logits."""
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


def test_worked_example_is_finite_at_the_floor(triangular):
    """Where the quotient is 0/0 in float32; the bound of 1 is reached."""
    corner = jnp.array([[0.0, LOG_FLOOR]])
    slope = jax.grad(lambda lq: triangular.phi(corner[:, ::-1], lq, None)[0].sum())(corner)
    assert jnp.isfinite(slope).all()
    assert triangular.phi(corner[:, ::-1], corner, None)[0].sum() == pytest.approx(1.0)


def test_every_divergence_is_listed():
    text = LOSSES.read_text(encoding="utf-8")
    missing = [name for name in divergences.__all__ if f"`{name}(" not in text]
    assert not missing, f"docs/losses.md does not list {', '.join(missing)}"
