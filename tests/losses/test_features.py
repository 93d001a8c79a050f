"""Terms over features against dense float64 formulas: value and gradient, on packed rows with NaN in the padding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.core.types import Batch, Head, Output
from jaxkd.losses import features

ROWS, LENGTH, VOCAB = 4, 12, 11
STUDENT = {"layers": 2, "D": 12, "H": 4, "K": 2, "d": 8}
TEACHER = {"layers": 3, "D": 20, "H": 6, "K": 2, "d": 8}


def make_batch() -> Batch:
    """Two documents and padding; one document with a prompt and an odd weight; all padding; one weighted token."""
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12, [0] * 12, [1] * 3 + [0] * 9], np.int32)
    weights = np.zeros((ROWS, LENGTH), np.float32)
    weights[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    weights[1, :4], weights[1, 6] = 0, 0.5
    weights[3, 1:] = 0
    tokens = np.random.default_rng(5).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    index = np.arange(ROWS, dtype=np.int32)
    arrays = (tokens, np.roll(tokens, -1, 1), weights, segments, np.zeros_like(tokens), index, index)
    return Batch(*map(jnp.asarray, arrays))


BATCH = make_batch()
LIVE = np.asarray(BATCH.weights) != 0
PADDING = np.asarray(BATCH.segments) == 0


def arrays(shape: dict, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"layer": (shape["D"],)} | {n: (shape[k], shape["d"]) for n, k in zip(("query", "key", "value"), "HKK")}
    names = [(f"{kind}_{n}", size) for n in range(1, shape["layers"] + 1) for kind, size in sizes.items()]
    return {name: rng.normal(size=(ROWS, LENGTH, *size)).astype(np.float32) for name, size in names}


def output(taps: dict, junk: float = 0.0, seed: int = 7) -> Output:
    """With `junk` wherever there is padding."""
    rng = np.random.default_rng(seed)
    dirty = {name: jnp.where(PADDING.reshape(ROWS, LENGTH, *[1] * (x.ndim - 2)), junk, x) for name, x in taps.items()}
    d = taps["layer_1"].shape[-1]
    head = rng.normal(size=(ROWS, LENGTH, d)).astype(np.float32)
    head = jnp.where(PADDING[..., None], junk, head)
    return Output(Head(head, jnp.asarray(rng.normal(size=(d, 16)).astype(np.float32))), dirty)


@functools.lru_cache
def student_and_teacher():
    return arrays(STUDENT, 1), arrays(TEACHER, 2)


def random_params(field, seed=3):
    student, teacher = (output(taps) for taps in student_and_teacher())
    params = field.init(jax.random.key(0), student, teacher)
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=x.shape).astype(np.float32) / math.sqrt(x.shape[0]) for name, x in params.items()}


def measure(field, params, student: dict, teacher: Output, junk=0.0, batch=BATCH):
    """FeatureTerm, value, and the value's gradient in the parameters and the student's taps."""

    def value(params, taps):
        return field.fn(params, output(taps, junk), teacher, batch, 2.0 * batch.weights, VOCAB)

    program = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    (total, each), gradient = program(params, jax.tree.map(jnp.asarray, student))
    return np.asarray(each), float(total), jax.tree.map(np.asarray, gradient)


def dense_hidden(kind, pairs):
    def formula(params, s, t):
        field = np.zeros((ROWS, LENGTH))
        for i, j in pairs:
            a, b = s[f"layer_{i}"], t[f"layer_{j}"]
            a = a @ params[f"layer_{i}"] if f"layer_{i}" in params else a
            if kind == "mse":
                field += ((a - b) ** 2).mean(-1) / len(pairs)
            else:
                norms = np.sqrt((a * a).sum(-1) + 1e-6) * np.sqrt((b * b).sum(-1) + 1e-6)
                field += (1 - (a * b).sum(-1) / norms) / len(pairs)
        return field

    return formula


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def attention_rows(a, b):
    """softmax(a[t] . b[u] / sqrt(width)) over the earlier u of t's segment, a list of [heads, u] per (row, t)."""
    segments = np.asarray(BATCH.segments)
    for row in range(ROWS):
        for t in np.flatnonzero(LIVE[row]):
            seen = [u for u in range(t + 1) if segments[row, u] == segments[row, t]]
            yield (row, t), softmax(np.einsum("hd,uhd->hu", a[row, t], b[row, seen]) / math.sqrt(a.shape[-1]))


def dense_relations(pairs, heads, kinds):
    names = {"q": "query", "k": "key", "v": "value"}

    def split(taps, layer, kind):
        a, b = (taps[f"{names[letter]}_{layer}"] for letter in kind)
        if a.shape != b.shape:
            b = np.stack([b[:, :, h // (a.shape[2] // b.shape[2])] for h in range(a.shape[2])], 2)
        return [x.reshape(ROWS, LENGTH, heads, -1) for x in (a, b)]

    def formula(params, s, t):
        field = np.zeros((ROWS, LENGTH))
        for i, j in pairs:
            for kind in kinds:
                both = zip(attention_rows(*split(s, i, kind)), attention_rows(*split(t, j, kind)))
                for (where, q), (_, p) in both:
                    field[where] += (p * np.log(p / q)).sum(-1).mean() / len(pairs) / len(kinds)
        return field

    return formula


def dense_attention(pairs):
    def maps(taps, layer):
        q, k = taps[f"query_{layer}"], taps[f"key_{layer}"]
        k = np.stack([k[:, :, h // (q.shape[2] // k.shape[2])] for h in range(q.shape[2])], 2)
        for where, row in attention_rows(q, k):
            mean = row.mean(0)
            yield where, mean / np.linalg.norm(mean)

    def formula(params, s, t):
        field = np.zeros((ROWS, LENGTH))
        for i, j in pairs:
            for (where, a), (_, b) in zip(maps(s, i), maps(t, j)):
                field[where] += ((a - b) ** 2).sum() / len(pairs)
        return field

    return formula


def dense_cka(pairs):
    def formula(params, s, t):
        field = np.zeros((ROWS, LENGTH))
        for i, j in pairs:
            for row in range(ROWS):
                live = LIVE[row]
                if live.sum() < 2:
                    continue
                w = np.asarray(BATCH.weights[row][live], np.float64)[:, None]
                x, y = (
                    np.sqrt(w) * (a - (w * a).sum(0) / w.sum())
                    for a in (s[f"layer_{i}"][row][live], t[f"layer_{j}"][row][live])
                )
                cka = np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
                field[row, live] += (1 - cka) / len(pairs)
        return field

    return formula


def dense_filters(params, s, t):
    head = output(student_and_teacher()[1]).head
    last, unembed = (np.asarray(x, np.float64) for x in (head.hidden, head.unembed))
    field = np.zeros((ROWS, LENGTH))
    for name, weight in params.items():
        side, tap = name.split("_", 1)
        y = (s if side == "student" else t)[tap] @ weight
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * np.sqrt((last**2).mean(-1, keepdims=True))
        q = softmax(y @ unembed[:, :VOCAB])
        field -= np.log(np.take_along_axis(q, np.asarray(BATCH.targets)[..., None], -1)[..., 0]) / len(params)
    return field


def dense_match(params, s, t):
    pairs = ((1, 2), (2, 3))
    differ = (
        s[f"layer_{i}"] @ params[f"student_layer_{i}"] - t[f"layer_{j}"] @ params[f"teacher_layer_{j}"]
        for i, j in pairs
    )
    return sum((x**2).mean(-1) for x in differ) / 2


MAP = {1: 2, 2: 3}
BOTH = tuple(MAP.items())
CASES = {
    "hidden_mse": (features.hidden_mse(MAP), dense_hidden("mse", BOTH)),
    "hidden_cosine": (features.hidden_cosine(MAP), dense_hidden("cosine", BOTH)),
    "linear_cka": (features.linear_cka(MAP), dense_cka(BOTH)),
    "minilm_v2": (features.relations(MAP, heads=8), dense_relations(BOTH, 8, ("qq", "kk", "vv"))),
    "minilm_v1": (features.relations({2: 3}, 2, ("qk", "vv")), dense_relations(((2, 3),), 2, ("qk", "vv"))),
    "attention": (features.attention_transfer(MAP), dense_attention(BOTH)),
    "ted_filters": (features.ted_filters(MAP), dense_filters),
    "ted_match": (features.ted_match(MAP), dense_match),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_match_the_formula(name):
    field, formula = CASES[name]
    student, teacher = student_and_teacher()
    params = random_params(field)
    each, value, (in_params, in_taps) = measure(field, params, student, output(teacher, math.nan), math.nan)
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    params, student, teacher = wide(params), wide(student), wide(teacher)
    weights = 2.0 * np.asarray(BATCH.weights, np.float64)
    sum_of = lambda params, taps: (weights * np.where(LIVE, formula(params, taps, teacher), 0.0)).sum()
    np.testing.assert_allclose(each[LIVE], formula(params, student, teacher)[LIVE], rtol=2e-5, atol=2e-6)
    assert value == pytest.approx(sum_of(params, student), rel=1e-5)

    # Directional derivative in what is trained: filters only in TED's first stage, not the teacher's in its second.
    rng, step = np.random.default_rng(0), 1e-5
    direction = lambda tree: {k: rng.normal(size=x.shape) for k, x in tree.items()}
    d_params, d_taps = direction(params), direction(student)
    if name == "ted_filters":
        d_taps = {k: 0 * x for k, x in d_taps.items()}
    if name == "ted_match":
        d_params |= {k: 0 * x for k, x in d_params.items() if k.startswith("teacher")}
    move = lambda tree, d, sign: {k: x + sign * step * d[k] for k, x in tree.items()}
    ends = [sum_of(move(params, d_params, sign), move(student, d_taps, sign)) for sign in (1, -1)]
    slope = sum((in_params[k] * d).sum() for k, d in d_params.items()) + sum(
        (in_taps[k] * d).sum() for k, d in d_taps.items()
    )
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-4, abs=1e-4)
    for leaf in in_taps.values():
        assert not leaf[PADDING].any()  # and so not NaN
    for key, leaf in in_params.items():
        assert np.isfinite(leaf).all()
        assert leaf.any() != (name == "ted_match" and key.startswith("teacher"))
    if name == "ted_filters":
        assert not any(leaf.any() for leaf in in_taps.values())


@pytest.mark.parametrize(
    "field",
    [
        features.hidden_mse({1: 1, 2: 2}),
        features.hidden_cosine({1: 1}, projector=True),
        features.linear_cka({2: 2}),
        features.relations({1: 1}, 4),
        features.relations({1: 1}, 4, ("qk", "kq", "qv")),
        features.attention_transfer({2: 2}),
        features.ted_match({1: 1}),
    ],
)
def test_equal_features_have_distance_zero(field):
    student = student_and_teacher()[0]
    params = field.init(jax.random.key(0), output(student), output(student))  # projectors start as the identity
    each, _, _ = measure(field, params, student, output(student))
    assert np.abs(each[LIVE]).max() < 2e-6


def test_projector_exists_where_widths_differ_or_if_requested():
    student, teacher = (output(taps) for taps in student_and_teacher())
    params = features.hidden_mse(MAP).init(jax.random.key(0), student, teacher)
    assert {name: x.shape for name, x in params.items()} == {"layer_1": (12, 20), "layer_2": (12, 20)}
    assert np.std(params["layer_1"]) == pytest.approx(1 / math.sqrt(12), rel=0.15)
    assert (params["layer_1"] != params["layer_2"]).any()
    assert features.hidden_mse({1: 2}).init(jax.random.key(0), student, student) == {}
    np.testing.assert_array_equal(
        features.hidden_cosine({1: 2}, projector=True).init(jax.random.key(0), student, student)["layer_1"], np.eye(12)
    )


def test_cka_is_invariant_to_rotation_scale_and_shift():
    student, _ = student_and_teacher()
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))
    rotated = {"layer_1": (30.0 * student["layer_1"] @ rotation + 1.0).astype(np.float32)}
    field = features.linear_cka({1: 1})
    each, _, _ = measure(field, {}, student, output(rotated))
    assert np.abs(each).max() < 1e-5
    anisotropic = {"layer_1": student["layer_1"] * np.linspace(0.1, 3, 12, dtype=np.float32)}
    assert measure(field, {}, student, output(anisotropic))[0][LIVE].max() > 0.02


def test_cka_of_rows_without_variance_is_zero():
    student, teacher = student_and_teacher()
    constant = {**student, "layer_1": np.ones_like(student["layer_1"]) * np.linspace(1, 100, 12, dtype=np.float32)}
    for taps, rows in (
        (constant, range(ROWS)),
        ({**student, "layer_1": 0 * student["layer_1"]}, range(ROWS)),
        (student, (2, 3)),
    ):
        each, value, (_, gradient) = measure(features.linear_cka({1: 2}), {}, taps, output(teacher))
        assert math.isfinite(value)
        assert not each[list(rows)].any()
        assert not gradient["layer_1"][list(rows)].any()


def test_the_cosine_of_a_zero_vector_has_a_finite_gradient():
    student, teacher = student_and_teacher()
    student = {**student, "layer_1": 0 * student["layer_1"]}
    field = features.hidden_cosine({1: 2})
    each, _, (in_params, gradient) = measure(field, random_params(field), student, output(teacher))
    np.testing.assert_allclose(each[LIVE], 1.0)
    assert np.isfinite(gradient["layer_1"]).all()
    assert np.isfinite(in_params["layer_1"]).all()
    assert np.abs(gradient["layer_1"]).max() < 1e4


def test_memory_of_relations_does_not_grow_with_heads():
    length = 256
    wide = jnp.zeros((1, length), jnp.int32)
    batch = Batch(wide, wide, jnp.ones((1, length)), wide + 1, wide, wide[0, :1], wide[0, :1])
    taps = {"value_1": jax.ShapeDtypeStruct((1, length, 8, 8), jnp.float32)}

    def used(heads):
        field = features.relations({1: 1}, heads, ("vv",))
        value = lambda s, t: field.fn({}, Output(None, s), Output(None, t), batch, batch.weights, VOCAB)[0]
        return jax.jit(jax.grad(value)).lower(taps, taps).compile().memory_analysis().temp_size_in_bytes

    assert used(16) < 1.2 * used(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: features.hidden_mse({}), r"layers must map .* got \{\}"),
        (lambda: features.linear_cka({0: 1}), r"from 1, -1 being what the head sees, such as \{2: 4\}, got \{0: 1\}"),
        (lambda: features.ted_match({1: -2}), r"-1 being what the head sees, .* got \{1: -2\}"),
        (lambda: features.relations({1: -1}, 4), r"from 1, such as \{2: 4\}, got \{1: -1\}"),
        (lambda: features.relations({1: 1}, 0), "heads must be at least 1, got 0"),
        (lambda: features.relations({1: 1}, 4, ("qx",)), r"of the letters q, k and v, got \('qx',\)"),
        (lambda: features.relations({1: 1}, 4, ()), r"pairs must be such as"),
        (
            lambda: features.relations({1: 3}, 3).init(jax.random.key(0), *map(output, student_and_teacher())),
            r"heads=3 must divide the student's qq of layer 1: 4 heads x 8 = 32",
        ),
        (
            lambda: features.relations({1: 3}, 32, ("qk",)).init(
                jax.random.key(0), *map(output, student_and_teacher())
            ),
            r"heads=32 must divide the teacher's qk of layer 3: 6 heads x 8 = 48",
        ),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
