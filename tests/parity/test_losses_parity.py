"""Values and gradients of our losses against torch, TRL 1.16 and tunix 0.1.7; conventions are in docs/losses.md.

The parity group installs torch only; install TRL and tunix to run their tests.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.core.types import Head
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses.divergences import cross_entropy, forward_kl, generalized_jsd, next_token, reverse_kl

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 48, 24, 40, 500
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(scope="module")
def arrays():
    """hidden, unembed, teacher's hidden and unembed, float32; targets; weights with some zeros."""
    rng = np.random.default_rng(0)
    shapes = (TOKENS, WIDTH), (WIDTH, VOCAB), (TOKENS, TEACHER_WIDTH), (TEACHER_WIDTH, VOCAB)
    heads = [np.float32(rng.normal(size=shape) * (0.5 if shape[1] == VOCAB else 1.0)) for shape in shapes]
    weights = np.ones(TOKENS, np.float32)
    weights[5::4] = 0.0
    return *heads, rng.integers(0, VOCAB, TOKENS), weights


def ours(arrays, *terms, temperature=1.0, scale=1.0, weights=None):
    """`scale` times the mean over weighted tokens: (value, d hidden, d unembed)."""
    hidden, unembed, teacher_hidden, teacher_unembed, targets, _ = map(jnp.asarray, arrays)
    weights = jnp.ones(TOKENS) if weights is None else jnp.asarray(weights)
    weights = jnp.broadcast_to(scale * weights / weights.sum(), (len(terms), TOKENS))

    def loss(hidden, unembed):
        head, teacher = Head(hidden, unembed), Head(teacher_hidden, teacher_unembed)
        temperatures = (temperature,) * len(terms)
        return linear_divergence(terms, head, teacher, targets, weights, temperatures, vocab=VOCAB, chunk=16)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, unembed)
    return value, *gradient


def theirs(arrays, loss, dtype="float64"):
    """The same for `loss(logits, teacher's logits)`, by torch's autograd."""
    hidden, unembed, *teacher = (torch.tensor(x, dtype=getattr(torch, dtype)) for x in arrays[:4])
    hidden.requires_grad_()
    unembed.requires_grad_()
    value = loss(hidden @ unembed, teacher[0] @ teacher[1])
    value.backward()
    return value.detach().numpy(), hidden.grad.numpy(), unembed.grad.numpy()


def same(got, want, tolerance=5e-6):
    for name, x, y in zip(("value", "d hidden", "d unembed"), got, want, strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
        print(f"{name}: relative difference {error:.1e}")
        assert error < tolerance, name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_torch_kl_div(arrays, direction, temperature):
    """`input` is the log of the *second* argument of KL; "batchmean" is our mean over tokens; T^2 is not included."""

    def loss(z, z_teacher):
        lq, lp = ((x / temperature).log_softmax(-1) for x in (z, z_teacher))
        side = (lq, lp) if direction == "forward" else (lp, lq)
        return temperature**2 * torch.nn.functional.kl_div(*side, reduction="batchmean", log_target=True)

    term = forward_kl() if direction == "forward" else reverse_kl()
    same(ours(arrays, term, temperature=temperature, scale=temperature**2), theirs(arrays, loss))


def test_torch_kl_div_with_probabilities_as_target(arrays):
    """Without `log_target` the target is p itself: the same value."""

    def loss(z, z_teacher):
        return torch.nn.functional.kl_div(z.log_softmax(-1), z_teacher.softmax(-1), reduction="batchmean")

    same(ours(arrays, forward_kl()), theirs(arrays, loss))


def test_torch_cross_entropy(arrays):
    """With labels it is `next_token`, with probabilities `cross_entropy`; -100 is a weight of zero."""
    weights = arrays[5]
    labels = torch.tensor(np.where(weights > 0, arrays[4], -100))
    hard = lambda z, _: torch.nn.functional.cross_entropy(z, labels)
    same(ours(arrays, next_token(), weights=weights), theirs(arrays, hard))
    soft = lambda z, z_teacher: torch.nn.functional.cross_entropy(z, z_teacher.softmax(-1))
    same(ours(arrays, cross_entropy()), theirs(arrays, soft))
    smooth = lambda z, _: torch.nn.functional.cross_entropy(z, labels, label_smoothing=0.1)
    same(ours(arrays, next_token(0.1), weights=weights), theirs(arrays, smooth))


def test_both_terms_together(arrays):
    def loss(z, z_teacher):
        kl = torch.nn.functional.kl_div(z.log_softmax(-1), z_teacher.softmax(-1), reduction="batchmean")
        return kl + torch.nn.functional.cross_entropy(z, torch.tensor(arrays[4]))

    same(ours(arrays, forward_kl(), next_token()), theirs(arrays, loss))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_trl_generalized_jsd(arrays, beta, temperature):
    """`beta` weighs the teacher, and 0 and 1 give the two KLs: our endpoint="kl". No T^2."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    weights = arrays[5]
    labels = torch.tensor(np.where(weights > 0, arrays[4], -100))[None]

    def loss(z, z_teacher):
        options = {"labels": labels, "beta": beta, "temperature": temperature, "reduction": "sum"}
        return gkd.GKDTrainer.generalized_jsd_loss(z[None], z_teacher[None], **options) / float(weights.sum())

    term = generalized_jsd(beta, endpoint="kl")
    same(ours(arrays, term, temperature=temperature, weights=weights), theirs(arrays, loss))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_trl_chunked_divergence(arrays, beta, temperature):
    """The same convention, with heads [V, D], in float32."""
    trainer = pytest.importorskip("trl.trainer.distillation_trainer")
    weights = arrays[5]
    hidden, unembed, teacher_hidden, teacher_unembed = (torch.tensor(x) for x in arrays[:4])
    hidden, unembed = hidden[None].requires_grad_(), unembed.T.contiguous().requires_grad_()
    value, _, count = trainer._chunked_divergence_loss(
        hidden,
        teacher_hidden[None],
        unembed,
        teacher_unembed.T.contiguous(),
        torch.tensor(weights)[None],
        beta,
        temperature=temperature,
    )
    value.backward()
    assert count == weights.sum()
    term = generalized_jsd(beta, endpoint="kl")
    want = value.detach().numpy(), hidden.grad[0].numpy(), unembed.grad.numpy().T
    same(ours(arrays, term, temperature=temperature, weights=weights), want, tolerance=2e-5)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)])
def test_tunix_logit_strategy(arrays, temperature, alpha):
    """alpha T^2 KL(p, q) + (1 - alpha) CE over all positions, padding included."""
    logit = pytest.importorskip("tunix.distillation.strategies.logit")
    nothing = lambda *_: None
    strategy = logit.LogitStrategy(nothing, nothing, nothing, temperature=temperature, alpha=alpha)
    hidden, unembed, teacher_hidden, teacher_unembed, targets, _ = map(jnp.asarray, arrays)

    def loss(hidden, unembed):
        labels = jax.nn.one_hot(targets, VOCAB)
        return strategy.compute_loss((hidden @ unembed)[None], (teacher_hidden @ teacher_unembed)[None], labels[None])[
            0
        ]

    value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(hidden, unembed)
    parts = [ours(arrays, forward_kl(), temperature=temperature, scale=alpha * temperature**2)]
    parts += [ours(arrays, next_token(), scale=1 - alpha)] if alpha < 1 else []
    same([sum(x) for x in zip(*parts)], (value, *gradient))


def test_tunix_counts_padding_and_ours_does_not(arrays):
    logit = pytest.importorskip("tunix.distillation.strategies.logit")
    nothing = lambda *_: None
    strategy = logit.LogitStrategy(nothing, nothing, nothing, temperature=1.0, alpha=1.0)
    weights = arrays[5]
    z, z_teacher = (jnp.asarray(arrays[i] @ arrays[i + 1]) * weights[:, None] for i in (0, 2))
    padded = strategy.compute_loss(z, z_teacher, jax.nn.one_hot(arrays[4], VOCAB))[0]
    clean = ours(arrays, forward_kl(), weights=weights)[0]
    assert float(padded) == pytest.approx(float(clean * weights.mean()), rel=1e-5)  # lower by the share of padding


def test_tunix_top_k_scores_a_student_without_mass_zero():
    """As `conditional_kl` warns; tests/kernels/test_peer_defects.py compares with a tail bucket."""
    logit = pytest.importorskip("tunix.distillation.strategies.logit")
    nothing = lambda *_: None
    strategy = logit.LogitStrategy(nothing, nothing, nothing, temperature=1.0, alpha=1.0, distill_top_k=4)
    teacher, student = np.zeros((2, 1, 32), np.float32)
    teacher[:, :4], student[:, :4] = 6.0, -14.0
    labels = jax.nn.one_hot(jnp.zeros(1, int), 32)
    assert float(strategy.compute_loss(student, teacher, labels)[0]) == pytest.approx(0, abs=1e-6)
