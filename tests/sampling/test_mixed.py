"""Drawing from a student and a teacher together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of, random_params

from jaxkd.kernels.reference import logits
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.sampling.mixed import mixed, mixture, speculative
from jaxkd.sampling.sampler import Sampler, decoder, sample

VOCAB = 40
STUDENT = Config(vocab=48, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32)
TEACHER = Config(vocab=48, embed=24, layers=2, heads=3, kv_heads=3, head_dim=8, mlp=48)
PARAMS = (random_params(STUDENT, 0, 0.6), random_params(TEACHER, 1, 0.6))


def probabilities(tokens):
    """q and p [B L V] of the next token at every position, by whole forward passes."""
    batch = batch_of(tokens)
    heads = (transformer.forward(c, p, batch).head for c, p in zip((STUDENT, TEACHER), PARAMS))
    return (np.asarray(jax.nn.softmax(logits(head)[..., :VOCAB], -1), np.float64) for head in heads)


def by_hand(q, p, distribution):
    if distribution == "mixture":
        return 0.2 * p + 0.8 * q
    inside = p >= np.sort(p, -1)[..., -5:][..., :1]
    return q * inside + (q * ~inside).sum(-1, keepdims=True) * p


@pytest.mark.parametrize(
    ("distribution", "combine"),
    [pytest.param("mixture", mixture(0.2), marks=pytest.mark.slow), ("speculative", speculative(5))],
)
def test_a_token_is_drawn_from_the_distribution_of_both(distribution, combine):
    sampler = Sampler(mixed(decoder(STUDENT), decoder(TEACHER), combine, VOCAB), VOCAB, 6, n=4)
    prompts, lengths = jax.random.randint(jax.random.key(2), (3, 5), 0, VOCAB), jnp.asarray([5, 2, 3])
    text = jax.jit(lambda params, keys: sample(sampler, params, prompts, lengths, keys))(
        PARAMS, jax.random.split(jax.random.key(3), 3)
    )
    rows, tokens = np.zeros((12, 11), np.int32), np.asarray(text.tokens)
    for m, row in enumerate(rows):  # what follows a text changes nothing before it
        length = lengths[m // 4]
        row[: length + 6] = np.concatenate([prompts[m // 4, :length], tokens[m]])
    expected = np.log(by_hand(*probabilities(rows), distribution))
    for m in range(12):
        length = int(lengths[m // 4])
        drawn = np.take_along_axis(expected[m, length - 1 : length + 5], tokens[m][:, None], 1)[:, 0]
        np.testing.assert_allclose(text.drawn_logprobs[m], drawn, atol=1e-4)


def test_what_the_student_proposes_and_the_teacher_refuses_is_the_teachers():
    q, p = jnp.asarray([[0.7, 0.2, 0.1, 0.0]]), jnp.asarray([[0.05, 0.55, 0.3, 0.1]])
    distribution = jnp.exp(speculative(2)(jnp.log(q), jnp.log(p)))
    np.testing.assert_allclose(distribution, [[0.035, 0.2 + 0.7 * 0.55, 0.1 + 0.7 * 0.3, 0.07]], rtol=1e-5)
    np.testing.assert_allclose(distribution.sum(), 1, rtol=1e-6)
