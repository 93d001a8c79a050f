"""The buffer of the student's earlier text, and the share of rows that it gets."""

import jax
import jax.numpy as jnp
import numpy as np
from test_step import make_batch

from jaxkd.train import replay
from jaxkd.train.rollout import STUDENT, unwritten


def written(number):
    """Eight rows that say which they are."""
    batch = make_batch()
    numbers = jnp.arange(8, dtype=jnp.int32) + 8 * number
    batch = batch._replace(tokens=jnp.broadcast_to(numbers[:, None], (8, 24)), row=numbers)
    return batch._replace(aux=unwritten(batch) | {"author": jnp.full(8, STUDENT, jnp.int32)})


def test_the_oldest_rows_go_and_the_others_are_drawn_whole():
    buffer, fresh = replay.init(5, make_batch(), 0.0), jnp.arange(8) % 2 == 0
    for number in range(3):  # rows 0 2 4 6, 8 10 12 14, 16 18 20 22
        buffer = jax.jit(replay.add)(buffer, written(number), fresh)
    assert sorted(buffer.rows.row.tolist()) == [14, 16, 18, 20, 22]
    assert int(buffer.added) == 12
    batch, chosen = make_batch(), jnp.arange(8) < 6
    seen = set()
    for seed in range(20):
        drawn = replay.draw(buffer, batch, chosen, jax.random.split(jax.random.key(seed), 8))
        assert (drawn.tokens[:6] == drawn.row[:6, None]).all()
        assert drawn.aux["author"].tolist() == [STUDENT] * 6 + [0] * 2
        np.testing.assert_array_equal(drawn.tokens[6:], batch.tokens[6:])
        seen |= set(drawn.row[:6].tolist())
    assert seen == {14, 16, 18, 20, 22}


def test_of_more_rows_than_places_the_last_stay():
    buffer = jax.jit(replay.add)(replay.init(3, make_batch(), 0.0), written(0), jnp.ones(8, bool))
    assert sorted(buffer.rows.row.tolist()) == [5, 6, 7]
    assert (buffer.rows.tokens == buffer.rows.row[:, None]).all()


def test_only_what_was_added_is_drawn():
    buffer = replay.add(replay.init(50, make_batch(), 0.0), written(1), jnp.arange(8) == 3)
    drawn = replay.draw(buffer, make_batch(), jnp.ones(8, bool), jax.random.split(jax.random.key(0), 8))
    assert set(drawn.row.tolist()) == {11}


def test_the_share_grows_where_the_held_out_loss_rises():
    """By the rule of DistiLLM: 0.1 nats above the lowest since it last grew."""
    buffer, shares = replay.init(4, make_batch(), 0.0), []
    for step, loss in enumerate((3.0, 2.5, 2.59, 2.61, 2.65, 2.72, 2.0, 5.0, 9.0)):
        buffer = replay.adapt(buffer, step, loss, 0.4)
        assert replay.adapt(buffer, step, 100.0, 0.4) is buffer  # an evaluation counts once
        shares.append(round(float(buffer.share), 3))
    assert shares == [0.0, 0.0, 0.0, 0.4, 0.4, 0.8, 0.8, 1.0, 1.0]
