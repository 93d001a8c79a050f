"""Our decoder on the real teacher's GGUF file against transformers on the same weights."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

TOLERANCE = 2e-3


def test_logits(teacher, reference, our_logits, their_logits):
    assert len(teacher.tokens) == 512
    ours = our_logits(teacher.config, teacher.params, teacher.tokens)[0]
    theirs = their_logits(reference, teacher.tokens)[0]
    difference = np.abs(ours - theirs).max()
    print(f"largest difference {difference:.2e}")
    assert difference <= TOLERANCE
    second, first = np.sort(theirs, -1)[:, -2:].T
    clear = first - second > TOLERANCE
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


def test_packed_documents_equal_separate_ones(teacher, reference, our_logits, their_logits):
    lengths = (60, 41, 19)
    documents = [teacher.tokens[start : start + n] for start, n in zip((0, 100, 200), lengths)]
    row = np.concatenate([*documents, np.zeros(8, np.int32)])
    segments = np.repeat([1, 2, 3, 0], [*lengths, 8])
    positions = np.concatenate([np.arange(n) for n in (*lengths, 8)])
    packed = our_logits(teacher.config, teacher.params, row, segments, positions)[0]
    for number, document in enumerate(documents, 1):
        theirs = their_logits(reference, document)[0]
        assert np.abs(packed[segments == number] - theirs).max() <= TOLERANCE


def test_greedy_continuation(teacher, our_logits):
    [(ids, _)] = teacher.tokenizer.encode(["The capital of France is"])
    row = np.zeros(16, np.int32)
    row[1 : len(ids) + 1] = ids  # row[0] is the start token, 0
    assert teacher.tokenizer.start == 0
    for at in range(len(ids) + 1, len(ids) + 3):
        row[at] = our_logits(teacher.config, teacher.params, row)[0, at - 1].argmax()
    assert teacher.tokenizer.decode(row[len(ids) + 1 : len(ids) + 3]) == " Paris."
