"""What student and teacher say of the student's own text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of, random_params

from jaxkd.evals import own_text
from jaxkd.kernels.reference import logits
from jaxkd.models import transformer
from jaxkd.models.transformer import Config

VOCAB = 40
CONFIG = Config(vocab=48, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32)
STUDENT, TEACHER = random_params(CONFIG, 0, 0.6), random_params(CONFIG, 1, 0.6)


def forward(params, batch, *, taps=()):
    return transformer.forward(CONFIG, params, batch)


@pytest.mark.parametrize("block", [12, 5])
def test_figures_are_those_of_the_dense_distributions(monkeypatch, block):
    monkeypatch.setattr(own_text, "_LOGITS", 3 * block * VOCAB)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (3, 12))
    weights = jnp.asarray((np.arange(12) >= 4) & (np.arange(12) < [[11], [8], [4]]), jnp.float32)
    batch = batch_of(tokens, weights=weights)
    old = jnp.asarray(rng.normal(-3, 1, (3, 12)), jnp.float32)
    batch = batch._replace(aux={"old_logprob": old})
    diagnose = own_text.make_diagnostics(forward, lambda state, batch: forward(state, batch), VOCAB)
    measured = {k: float(a) / float(b) for k, (a, b) in jax.jit(diagnose)(STUDENT, TEACHER, batch).items()}

    q, p = (
        np.asarray(jax.nn.softmax(logits(forward(side, batch).head)[..., :VOCAB], -1), np.float64)
        for side in (STUDENT, TEACHER)
    )
    mean = lambda field: float((field * weights).sum() / weights.sum())
    top = lambda x: np.argsort(-x, -1)[..., : own_text.ENTRIES]
    common = np.asarray([[len(set(a) & set(b)) for a, b in zip(*rows)] for rows in zip(top(q), top(p))])
    of_target = np.take_along_axis(q, np.asarray(batch.targets)[..., None], -1)[..., 0]
    expected = {
        "student_entropy": mean(-(q * np.log(q)).sum(-1)),
        "teacher_entropy": mean(-(p * np.log(p)).sum(-1)),
        "forward_kl": mean((p * np.log(p / q)).sum(-1)),
        "reverse_kl": mean((q * np.log(q / p)).sum(-1)),
        "overlap": mean(common / own_text.ENTRIES),
        "teacher_mass": mean(np.take_along_axis(p, top(q), -1).sum(-1)),
        "importance_ratio": mean(of_target / np.exp(np.asarray(old, np.float64))),
    }
    assert measured == pytest.approx(expected, rel=1e-4)
    alone = own_text.make_diagnostics(forward, lambda state, batch: None, VOCAB)(STUDENT, None, batch)
    assert set(alone) == {"student_entropy", "importance_ratio"}


def test_repetition_and_empty_texts_are_degenerate():
    assert own_text.is_degenerate([5])
    assert own_text.is_degenerate([1, 2] * 20)
    assert not own_text.is_degenerate(list(range(40)))
    assert not own_text.is_degenerate([1, 2, 1, 2])
