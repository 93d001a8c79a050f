"""Kernel arguments of a wrong kind: errors name the given and the expected one."""

import inspect

import jax.numpy as jnp
import pytest

from jaxkd.core.types import Divergence, Head
from jaxkd.kernels.api import _check_kinds
from jaxkd.losses import divergences as d
from jaxkd.losses.distill import distill

# Calls the check itself, since in tests its callers' type annotations reject some of these first.
HEAD = Head(jnp.zeros((6, 4)), jnp.zeros((4, 9)))


@pytest.mark.parametrize(
    ("terms", "student", "teacher", "error", "names"),
    [
        ((d.forward_kl(),), HEAD._replace(unembed=jnp.zeros((9, 4))), HEAD, ValueError, r"student\.unembed.*V D"),
        ((d.forward_kl(),), HEAD, HEAD._replace(unembed=jnp.zeros((9, 4))), ValueError, r"teacher\.unembed.*V D"),
        ((d.forward_kl(),), HEAD, HEAD._replace(unembed=jnp.zeros((5, 9))), ValueError, r"teacher\.unembed"),
        ((d.forward_kl(),), jnp.zeros((6, 9)), HEAD, TypeError, "student.*Head"),
        ((d.forward_kl(),), HEAD, jnp.zeros((6, 9)), TypeError, "teacher.*Head"),
        ((d.forward_kl(),), HEAD, {"hidden": 0}, TypeError, "teacher.*dict"),
        ((d.forward_kl,), HEAD, HEAD, TypeError, r"forward_kl\(\)"),
        (("forward_kl",), HEAD, HEAD, TypeError, "Divergence"),
        ((Divergence(lambda lp, lq, side: lp - lq),), HEAD, HEAD, ValueError, "phi.*tuple"),
        ((Divergence(lambda lp, lq, side: (lp.sum(-1),)),), HEAD, HEAD, ValueError, r"phi.*\[2\]"),
        ((Divergence(lambda lp, lq, side: (lp,), lambda s: s.sum()),), HEAD, HEAD, ValueError, r"combine.*\[\]"),
    ],
)
def test_wrong_arguments_raise(terms, student, teacher, error, names):
    with pytest.raises(error, match=names):
        _check_kinds(terms, student, teacher)


def test_every_divergence_passes():
    _check_kinds(tuple(getattr(d, name)() for name in ("forward_kl", "next_token", "z_loss")), HEAD, HEAD)


def test_logits_in_the_place_of_heads():
    logits, weights = jnp.zeros((2, 9)), jnp.ones(2)
    with pytest.raises(TypeError, match="student"):
        inspect.unwrap(distill)(logits, logits, weights)
