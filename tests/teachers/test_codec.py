"""What is stored of a teacher comes back: exactly where it is said to, within the stated bound where not."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signal_rows import hidden_row, log_softmax, rising, sampled_row, text_row, top_k_row

from jaxkd.core.types import LOG_FLOOR, Head, Hidden, Sampled, TopK
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences
from jaxkd.teachers.codec import Layout, Text, decode_rows, encode


def decode(layout, payload):
    return jax.tree.map(lambda x: x[0], decode_rows(layout, [payload]))


SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.integers(1, 40)
SHARES = st.sampled_from([0.0, 0.3, 1.0])


def of(seed: int, length: int, share: float) -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng, rng.random(length) < share


def same(decoded, wanted, live):
    for got, want in zip(decoded, wanted, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got[live], want[live])


@settings(max_examples=60)
@given(SEEDS, LENGTHS, SHARES, st.integers(1, 300), st.integers(1, 12), st.sampled_from([(1.0,), (1.0, 2.0, 4.0)]))
def test_top_k_exact(seed, length, share, vocab, entries, temperatures):
    rng, live = of(seed, length, share)
    entries = min(entries, vocab)
    row = top_k_row(rng, length, vocab, entries, temperatures)
    layout = Layout("top_k", length, vocab, entries, temperatures, dtype="float32")
    decoded = decode(layout, encode(layout, row, live))
    same(decoded, rising(row), live)
    assert (decoded.ids[~live] == -1).all()
    assert (decoded.logprobs[~live] == -np.inf).all()
    assert (decoded.tail[~live] == 0).all()


@settings(max_examples=60)
@given(SEEDS, LENGTHS, SHARES, st.integers(1, 300), st.integers(1, 64), st.sampled_from([0.01, 1.0, 8.0, 100.0]))
def test_top_k_within_bound(seed, length, share, vocab, entries, sharpness):
    """lp is off by at most spread (c + 1/4) / 255^2, c its code; the tail by half a unit of float16."""
    rng, live = of(seed, length, share)
    entries = min(entries, vocab)
    row = rising(top_k_row(rng, length, vocab, entries, sharpness=sharpness))
    layout = Layout("top_k", length, vocab, entries, (1.0,), dtype="uint8")
    decoded = decode(layout, encode(layout, row, live))
    np.testing.assert_array_equal(decoded.ids[live], row.ids[live])
    true = np.maximum(row.logprobs[live], LOG_FLOOR)
    top = true.max(-1, keepdims=True, initial=LOG_FLOOR)
    room = 2.0**-10 * np.abs(top) + 1e-7  # top and spread are rounded up to float16
    spread = (top - true.min(-1, keepdims=True, initial=0) + room) * (1 + 2.0**-10) + 1e-7
    code = 255 * np.sqrt((top + room - true) / spread) + 1
    assert (np.abs(decoded.logprobs[live] - true) <= spread * (code + 0.25) / 255**2 + 1e-5).all()
    assert (decoded.tail <= 0).all()
    np.testing.assert_allclose(decoded.tail[live], np.maximum(row.tail[live], LOG_FLOOR), rtol=2.0**-11, atol=2.0**-25)


@settings(max_examples=60)
@given(SEEDS, LENGTHS, SHARES, st.integers(1, 400), st.integers(1, 60))
def test_sampled(seed, length, share, vocab, draws):
    rng, live = of(seed, length, share)
    row = sampled_row(rng, length, vocab, draws)
    layout = Layout("sampled", length, vocab, draws)
    decoded = decode(layout, encode(layout, row, live))
    same(decoded, row, live)
    assert (decoded.ids[~live] == -1).all()
    assert (decoded.counts[~live] == 0).all()


@settings(max_examples=30)
@given(SEEDS, LENGTHS, SHARES, st.integers(1, 40), st.sampled_from(["float32", "bfloat16", "int8"]))
def test_hidden(seed, length, share, width, dtype):
    rng, live = of(seed, length, share)
    row = hidden_row(rng, length, width, scale=10.0 ** rng.integers(-6, 7))  # 10^6 is beyond float16
    row.hidden[:1] = 0.0  # a token of zeros has no scale
    layout = Layout("hidden", length, width=width, dtype=dtype)
    [decoded] = decode(layout, encode(layout, row, live))
    kept = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    assert decoded.dtype == kept
    assert (decoded[~live] == 0).all()
    if dtype == "int8":
        largest = np.abs(row.hidden[live]).max(-1, keepdims=True, initial=0)
        assert (np.abs(decoded[live] - row.hidden[live]) <= largest / 254 * (1 + 1e-4)).all()
    else:
        np.testing.assert_array_equal(decoded[live], row.hidden[live].astype(kept))


@settings(max_examples=60)
@given(SEEDS, LENGTHS, st.integers(1, 200_000))
def test_token(seed, length, vocab):
    """All fields of the batch come back, of tokens without weight too: those are context."""
    row, live = text_row(np.random.default_rng(seed), length, vocab)
    layout = Layout("token", length, vocab)
    same(decode(layout, encode(layout, row, live)), row, np.ones(length, bool))


def test_sizes_stacks_and_the_floor():
    rng, live = np.random.default_rng(0), np.arange(256) % 2 == 0
    row = sampled_row(rng, 256, 49_152, 50)
    assert (row.counts > 0).sum() > 14 * 256
    size = lambda layout, row: len(encode(layout, row, live)) - 256 // 8
    assert size(Layout("sampled", 256, 49_152, 50), row) <= 40 * 128
    states = hidden_row(rng, 256, 48)
    sizes = {
        name: size(Layout("hidden", 256, width=48, dtype=name), states) for name in ("float32", "bfloat16", "int8")
    }
    assert sizes == {"float32": 128 * 192, "bfloat16": 128 * 96, "int8": 128 * 52}
    for vocab, bound in ((49_152, 163), (151_936, 176)):
        apart = vocab // 64
        ids = np.arange(64) * apart + np.random.default_rng(0).integers(0, apart, (128, 64))
        row = TopK(ids.astype(np.int32), np.full((128, 64), -5.0, np.float32), np.full((128, 1), -3.0, np.float32))
        layout = Layout("top_k", 128, vocab, 64, (1.0,), dtype="uint8")
        assert len(encode(layout, row, np.ones(128, bool))) <= bound * 128
    # Rows are stacked.
    rng = np.random.default_rng(0)
    layout = Layout("top_k", 9, 50, 4, (1.0, 2.0), dtype="uint8")
    rows = [encode(layout, top_k_row(rng, 9, 50, 4, (1.0, 2.0)), rng.random(9) < 0.5) for _ in range(3)]
    stacked = decode_rows(layout, rows)
    assert [x.shape for x in stacked] == [(3, 9, 4), (3, 9, 4), (3, 9, 2)]
    for b, payload in enumerate(rows):
        for got, want in zip(stacked, decode(layout, payload), strict=True):
            np.testing.assert_array_equal(got[b], want)
    # What `LOG_FLOOR` calls nothing does not widen the grid for the others.
    lp = np.array([[-0.5, -1.0, -np.inf, -1e30]], np.float32)
    row = TopK(np.arange(4, dtype=np.int32)[None], lp, np.full((1, 1), -1e30, np.float32))
    layout = Layout("top_k", 1, 9, 4, (1.0,), dtype="uint8")
    decoded = decode(layout, encode(layout, row, np.ones(1, bool)))
    np.testing.assert_allclose(decoded.logprobs[0], [-0.5, -1.0, LOG_FLOOR, LOG_FLOOR], atol=0.02)
    assert decoded.tail[0, 0] == LOG_FLOOR


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("uint8", 2e-3)])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_whole_vocabulary_is_the_teacher(divergence, dtype, tolerance):
    """With K = V nothing is left for the tail: what is stored teaches as the teacher does. Filling adds nothing."""
    rng, live = np.random.default_rng(0), np.arange(12) % 3 > 0
    z = 2 * rng.normal(size=(12, 30))
    lp = log_softmax(z).astype(np.float32)
    row = TopK(np.tile(np.arange(30, dtype=np.int32), (12, 1)), lp, np.full((12, 1), -np.inf, np.float32))
    layout = Layout("top_k", 12, 30, 30, (1.0,), dtype=dtype)
    stored = jax.tree.map(jnp.asarray, decode(layout, encode(layout, row, live)))
    student = Head(
        jnp.asarray(rng.normal(size=(12, 8)), jnp.float32), jnp.asarray(rng.normal(size=(8, 30)), jnp.float32)
    )
    weights = jnp.asarray(live, jnp.float32)[None] / live.sum()

    def value(hidden, teacher):
        terms, targets = (getattr(divergences, divergence)(),), jnp.zeros(12, jnp.int32)
        return linear_divergence(terms, student._replace(hidden=hidden), teacher, targets, weights, (1.0,), vocab=30)[0]

    live_teacher = Head(jnp.asarray(z, jnp.float32), jnp.eye(30))
    want, want_slope = jax.value_and_grad(value)(student.hidden, live_teacher)
    got, slope = jax.value_and_grad(value)(student.hidden, stored)
    np.testing.assert_allclose(got, want, rtol=tolerance)
    np.testing.assert_allclose(slope, want_slope, atol=tolerance)


@pytest.mark.parametrize("signal", ["hidden", "top_k", "sampled", "token"])
def test_wrong_payload(signal):
    rng, live = np.random.default_rng(0), np.arange(10) < 7
    layout, row = {
        "hidden": lambda: (Layout("hidden", 10, width=4, dtype="int8"), hidden_row(rng, 10, 4)),
        "top_k": lambda: (Layout("top_k", 10, 90, 4, (1.0,), dtype="uint8"), top_k_row(rng, 10, 90, 4)),
        "sampled": lambda: (Layout("sampled", 10, 90, 7), sampled_row(rng, 10, 90, 7)),
        "token": lambda: (Layout("token", 10, 90), text_row(rng, 10, 90)),
    }[signal]()
    if signal == "token":
        row, live = row
    payload = encode(layout, row, live)
    for wrong in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(ValueError, match="payload"):
            decode(layout, wrong)


def test_damaged_ids_counts_and_masks():
    layout = Layout("sampled", 10, 90, 7)
    payload = bytearray(encode(layout, sampled_row(np.random.default_rng(0), 10, 90, 7), np.ones(10, bool)))
    for offset in (2, 5, len(payload) - 12, len(payload) - 2):
        wrong = payload.copy()
        wrong[offset] ^= 64
        with pytest.raises(ValueError, match=r"damaged|too short"):
            decode(layout, bytes(wrong))
    layout, ids = Layout("sampled", 2, 9, 3), np.array([[4, -1, -1]] * 2)
    payload = encode(layout, Sampled(ids, np.array([[3, 0, 0]] * 2)), np.ones(2, bool))
    assert payload[-1] == 0b100100
    with pytest.raises(ValueError, match="draws"):
        decode(layout, payload[:-1] + bytes([0b100001]))
    with pytest.raises(ValueError, match="live"):
        encode(TOP_K, _top_k(), np.ones(2))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (("logits", 8), "'logits'"),
        (("hidden", 8, 0, 0, (), 4, "float16"), "'float16'"),
        (("hidden", 8, 0, 0, (), 0, "int8"), "width"),
        (("top_k", 8, 50, 0, (1.0,), 0, "uint8"), "entries"),
        (("top_k", 8, 50, 51, (1.0,), 0, "uint8"), "entries=51"),
        (("top_k", 8, 50, 5, (), 0, "uint8"), "temperature"),
        (("token", 0, 50), "length"),
        (("top_k", 2**40, 2**31, 5, (1.0,), 0, "uint8"), "code of ids"),
        (("sampled", 2**20, 50, 2**12), "code of ids"),
    ],
)
def test_impossible_layout(facts, message):
    with pytest.raises(ValueError, match=message):
        Layout(*facts)


def _top_k(ids=((1, 2), (3, 4)), lp=((-1.0, -2.0), (-1.0, -2.0)), tail=((-1.0,), (-1.0,))):
    return TopK(np.array(ids, np.int32), np.array(lp, np.float32), np.array(tail, np.float32))


def _text(**changed):
    fields = {"tokens": [1, 2], "targets": [2, 0], "weights": [1.0, 0.0], "segments": [1, 1], "positions": [0, 1]}
    return Text(**{name: np.array(values) for name, values in (fields | changed).items()})


TOP_K = Layout("top_k", 2, 9, 2, (1.0,), dtype="uint8")
DRAWS = Layout("sampled", 2, 9, 3)


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        (TOP_K, _top_k(ids=((1, 2), (3, 3))), "token 1"),
        (TOP_K, _top_k(ids=((1, 2), (3, 9))), "token 1"),
        (TOP_K, _top_k(ids=((-1, 2), (3, 4))), "token 0"),
        (TOP_K, _top_k(lp=((-1.0, -2.0), (3.0, 2.0))), "token 1"),
        (TOP_K, _top_k(tail=((np.nan,), (-1.0,))), "token 0"),
        (TOP_K, _top_k(ids=((1, 2, 3), (3, 4, 5))), r"ids.*\[2, 3\]"),
        (TOP_K, Hidden(np.zeros((2, 3), np.float32)), "Hidden"),
        (DRAWS, Sampled(np.array([[1, 2, -1]] * 2), np.array([[2, 1, 0], [1, 1, 0]])), "token 1 .*draws"),
        (DRAWS, Sampled(np.array([[1, 9, -1]] * 2), np.array([[2, 1, 0]] * 2)), "token 0"),
        (DRAWS, Sampled(np.array([[1, 2, -1], [4, 4, -1]]), np.array([[2, 1, 0]] * 2)), "token 1"),
        (Layout("hidden", 2, width=1, dtype="int8"), Hidden(np.array([[1.0], [np.inf]])), "token 1"),
        (Layout("hidden", 2, width=1, dtype="bfloat16"), Hidden(np.array([[1.0], [3.4e38]])), "token 1 .*bfloat16"),
        (Layout("token", 2, 9), _text(tokens=[1, 9]), "token 1"),
        (Layout("token", 2, 9), _text(weights=[0.5, 0.0]), "token 0 .*weights"),
        (Layout("token", 2, 9), _text(targets=[1, 0]), "token 0 .*targets"),
        (Layout("token", 2, 9), _text(positions=[0, 2]), "token 1 .*positions"),
    ],
)  # fmt: skip
def test_refused_rows(layout, row, message):
    live = np.array([True, layout.signal != "token"])
    with pytest.raises(ValueError, match=message):
        encode(layout, row, live)
