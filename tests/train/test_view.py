"""The teacher's own view of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of, random_params
from test_step import make_batch

from jaxkd.kernels.reference import logits
from jaxkd.losses import divergences
from jaxkd.losses.objective import match, objective
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.teachers.online import online, self_teacher
from jaxkd.train.view import first_documents, in_context, with_prompts

CONFIG = Config(vocab=250, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64)
CONTEXT, OPENING = np.asarray([11, 12, 13, 14, 15], np.int32), np.asarray([3, 4], np.int32)


def forward(params, batch, *, taps=()):
    return transformer.forward(CONFIG, params, batch, taps=taps)


def rows():
    """Rows of one document each; those of even number begin with the opening."""
    batch = first_documents(make_batch())
    begins = (jnp.arange(8) % 2 == 0)[:, None] & (jnp.arange(24) < 2)
    return batch._replace(tokens=jnp.where(begins, jnp.asarray([3, 4])[jnp.arange(24) % 2], batch.tokens))


def heads(b):
    """Tokens of a row that the view leaves out, and that it begins with instead."""
    return (2, len(CONTEXT)) if b % 2 == 0 else (0, 0)


def seen(batch):
    """The teacher's text of every row."""
    parts = ((CONTEXT[: heads(b)[1]], row[heads(b)[0] :]) for b, row in enumerate(np.asarray(batch.tokens)))
    return [np.concatenate(part) for part in parts]


def alone(params, texts):
    """What the model says of each text by itself; what is behind a text changes nothing before it."""
    padded = np.zeros((len(texts), 40), np.int32)
    for row, text in zip(padded, texts):
        row[: len(text)] = text
    return forward(params, batch_of(padded), taps=("layer_1",))


@pytest.mark.parametrize("kind", [pytest.param("online", marks=pytest.mark.slow), "self"])
def test_the_teacher_reads_its_context_before_the_same_text(kind):
    params, batch = random_params(CONFIG, 0, 0.3), rows()
    viewed = in_context(batch, jnp.asarray(CONTEXT), jnp.asarray(OPENING))
    if kind == "online":
        output = online(params, forward).signal(params, viewed, taps=("layer_1",))
    else:
        output = self_teacher(forward).signal({}, viewed, own=params, taps=("layer_1",))
    assert output.head.hidden.shape == (8, 24, 32)
    by_itself = alone(params, seen(batch))
    for b in range(8):
        length, (skipped, context) = int(batch.segments[b].sum()), heads(b)
        of_text = slice(context, context + length - skipped)
        for one, all_ in (
            (by_itself.head.hidden, output.head.hidden),
            (by_itself.taps["layer_1"], output.taps["layer_1"]),
        ):
            np.testing.assert_allclose(all_[b, skipped:length], one[b, of_text], atol=2e-5)


def test_the_loss_is_that_of_scoring_by_hand():
    teacher, student, batch = random_params(CONFIG, 0, 0.3), random_params(CONFIG, 1, 0.3), rows()
    loss = objective({"kd": (1.0, match(divergences.forward_kl()))}, vocab=250, domains=("a", "b")).loss
    viewed = in_context(batch, jnp.asarray(CONTEXT), jnp.asarray(OPENING))
    p, q = (
        jax.nn.log_softmax(logits(alone(params, texts).head)[..., :250], -1)
        for params, texts in ((teacher, seen(batch)), (student, [np.asarray(row) for row in batch.tokens]))
    )
    total = 0.0
    for b in range(8):
        length, (skipped, context) = int(batch.segments[b].sum()), heads(b)
        lp, lq = p[b, context : context + length - skipped], q[b, skipped:length]
        total += float(((jnp.exp(lp) * (lp - lq)).sum(-1) * batch.weights[b, skipped:length]).sum())
    # Tokens of the opening have no place in the view; they are in a prompt, whose weight is 0.
    inside = jnp.arange(24) >= jnp.where(jnp.arange(8) % 2 == 0, 2, 0)[:, None]
    value, _ = loss(
        {},
        forward(student, viewed),
        online(teacher, forward).signal(teacher, viewed),
        viewed._replace(weights=batch.weights * inside),
        jnp.int32(0),
    )
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_no_view_is_the_rows_own_forward_pass():
    params, batch = random_params(CONFIG, 0, 0.3), rows()
    plain = jax.jit(forward).lower(params, batch).as_text()
    compiled = jax.jit(online(params, forward).signal).lower(params, batch).as_text()
    assert compiled.count("dot_general") == plain.count("dot_general")
    assert compiled.count("gather") == plain.count("gather")


@pytest.mark.slow
def test_a_prompt_of_the_teacher_stands_in_the_place_of_the_rows_own():
    params, batch = random_params(CONFIG, 0, 0.3), rows()
    starts, lengths = jnp.arange(8) % 5 + 1, jnp.asarray([4, 9, 2, 7, 1, 3, 9, 5])
    batch = batch._replace(weights=batch.weights * (jnp.arange(24) >= starts[:, None] - 1))
    prompts = jax.random.randint(jax.random.key(1), (8, 9), 0, 250)
    viewed = with_prompts(batch, prompts, lengths)
    output = online(params, forward).signal(params, viewed)
    for b in range(8):
        live = np.flatnonzero(batch.weights[b])
        if not len(live):
            continue
        length, start = int(batch.segments[b].sum()), int(live[0]) + 1
        text = np.concatenate([prompts[b, : lengths[b]], batch.tokens[b, start:length]])
        alone = forward(params, batch_of(text[None])).head.hidden[0, int(lengths[b]) - 1 :]
        np.testing.assert_allclose(output.head.hidden[b, start - 1 : length], alone, atol=2e-5)
