"""Packing loses no token, scores each once and keeps documents apart."""

import numpy as np
from corpus import quick
from hypothesis import given
from hypothesis import strategies as st

from jaxkd.data.pack import Tokens, pack, pieces

lengths = st.lists(st.integers(0, 70), max_size=40)


def corpus(sizes):
    """Documents whose tokens are all different, and as many bytes per token as its number modulo 5."""
    starts = np.cumsum([0, *sizes])
    return [Tokens(np.arange(a, a + n), np.arange(a, a + n) % 5) for a, n in zip(starts, sizes)]


@quick
@given(st.integers(0, 200), st.integers(2, 40))
def test_pieces_cover_a_document(size, length):
    cuts = pieces(np.arange(size), length)
    assert all(2 <= cut.stop - cut.start <= length for cut in cuts)
    targets = [t for cut in cuts for t in range(cut.start + 1, cut.stop)]
    assert targets == list(range(1, size))


@quick
@given(lengths, st.integers(2, 32), st.integers(1, 8))
def test_every_token_is_a_target_once(sizes, length, open_rows):
    documents = corpus(sizes)
    targets, scored_bytes = [], 0
    for row in pack(documents, length, open_rows):
        tokens, segments, positions = row["tokens"], row["segments"], row["positions"]
        assert tokens.shape == segments.shape == positions.shape == (length,)
        assert tokens.dtype == segments.dtype == positions.dtype == np.int32
        assert row["bytes"].dtype == np.int64
        scored = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        assert row["weights"].dtype == np.float32
        np.testing.assert_array_equal(row["weights"], np.append(scored, False))
        new = tokens[1:][scored]
        np.testing.assert_array_equal(new, tokens[:-1][scored] + 1)  # the token after it, of the same document
        assert row["bytes"] == (new % 5).sum()
        targets.extend(new)
        scored_bytes += row["bytes"]
        for segment in range(1, segments.max() + 1):
            inside = np.nonzero(segments == segment)[0]
            assert len(inside) >= 2
            np.testing.assert_array_equal(inside, np.arange(inside[0], inside[-1] + 1))
            np.testing.assert_array_equal(positions[inside], np.arange(len(inside)))
        assert (segments[np.count_nonzero(segments) :] == 0).all()
        assert (tokens[segments == 0] == 0).all()
    expected = [token for document in documents for token in document.ids[1:]]
    assert sorted(targets) == expected
    assert scored_bytes == sum(document.sizes[1:].sum() for document in documents)


def test_weights_follow_their_targets_over_a_cut():
    """Such as a prompt's: its tokens are context, and their bytes are not counted."""
    weights = np.asarray([9, 0, 0, 1, 0.5, 0, 1], np.float32)
    document = Tokens(np.arange(7), np.full(7, 10), weights)
    first, second = sorted(pack([document], 4), key=lambda row: int(row["tokens"][0]))
    assert (first["tokens"].tolist(), first["weights"].tolist()) == ([0, 1, 2, 3], [0, 0, 1, 0])
    assert (second["tokens"].tolist(), second["weights"].tolist()) == ([3, 4, 5, 6], [0.5, 0, 1, 0])
    assert (first["bytes"], second["bytes"]) == (10, 20)


def test_rows_come_while_documents_are_read_and_are_well_filled():
    """A limit on rows must not read the whole corpus."""
    read = []

    def documents():
        for i in range(1000):
            read.append(i)
            yield Tokens(np.arange(10), np.ones(10, np.int64))

    next(pack(documents(), 20, open_rows=4))
    assert len(read) < 20
    sizes = np.random.default_rng(0).integers(2, 60, 500).tolist()
    assert len(list(pack(corpus(sizes), 64))) <= 1.1 * sum(sizes) / 64
