"""What is measured: the inputs, the kernel's forms, their dense twins, and the products that no form can avoid."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import Divergence, Head, Sampled, TopK
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses import divergences

TOP = 64
DRAWS = 50


class Shape(NamedTuple):
    """One size of problem."""

    tokens: int
    vocab: int
    width: int = 512
    teacher_width: int = 1024


class Form(NamedTuple):
    """One row of a table: the terms, and how the same loss is written without the kernel."""

    terms: tuple[Divergence, ...]
    dense: Callable[..., jax.Array] | None = None  # (z, teacher's logits or entries, targets) -> [N]; None: reference
    signal: type = Head
    temperature: float = 1.0
    standardized: bool = False
    softcap: float | None = None


# ------------------------------------------------------------------------------------- dense twins


def _both(z: jax.Array, z_teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.nn.log_softmax(z_teacher), jax.nn.log_softmax(z)


def _forward_kl(z, z_teacher, targets):
    lp, lq = _both(z, z_teacher)
    return jnp.sum(jnp.exp(lp) * (lp - lq), -1)


def _reverse_kl(z, z_teacher, targets):
    lp, lq = _both(z, z_teacher)
    return jnp.sum(jnp.exp(lq) * (lq - lp), -1)


def _jsd(z, z_teacher, targets):
    lp, lq = _both(z, z_teacher)
    lm = jnp.logaddexp(lp, lq) - np.log(2)
    return 0.5 * jnp.sum(jnp.exp(lp) * (lp - lm) + jnp.exp(lq) * (lq - lm), -1)


def _forward_kl_and_ce(z, z_teacher, targets):
    lp, lq = _both(z, z_teacher)
    return jnp.sum(jnp.exp(lp) * (lp - lq), -1) - jnp.take_along_axis(lq, targets[:, None], -1)[:, 0]


def _entries(z, stored: TopK, targets, *, bucket=False, teacher=False, student=False):
    """The four losses that go by the name of top-k; `teacher` and `student` renormalise that side's entries."""
    lp, lq = stored.logprobs, jnp.take_along_axis(jax.nn.log_softmax(z), stored.ids, -1)
    tail_q = jnp.log1p(-jnp.sum(jnp.exp(lq), -1))
    lp = jax.nn.log_softmax(lp) if teacher else lp
    lq = jax.nn.log_softmax(lq) if student else lq
    tail = jnp.exp(stored.tail[:, 0]) * (stored.tail[:, 0] - tail_q) if bucket else 0.0
    return jnp.sum(jnp.exp(lp) * (lp - lq), -1) + tail


def _drawn(z, draws: Sampled, targets):
    share = draws.counts / jnp.sum(draws.counts, -1, keepdims=True)
    return -jnp.sum(share * jnp.take_along_axis(jax.nn.log_softmax(z), draws.ids, -1), -1)


# --------------------------------------------------------------------------------------- the forms

FORMS = {
    "forward_kl": Form((divergences.forward_kl(),), _forward_kl),
    "reverse_kl": Form((divergences.reverse_kl(),), _reverse_kl),
    "jsd_0.5": Form((divergences.generalized_jsd(0.5),), _jsd),
    f"bucket_top{TOP}": Form((divergences.forward_kl(),), partial(_entries, bucket=True), TopK),
    "forward_kl+ce": Form((divergences.forward_kl(), divergences.next_token()), _forward_kl_and_ce),
}

_STORED = {
    "partial_kl": partial(_entries),
    "conditional_kl": partial(_entries, teacher=True, student=True),
    "renormalized_kl": partial(_entries, teacher=True),
}


def family() -> dict[str, Form]:
    """Every divergence with its defaults, then the transforms of the logits and the teacher that is drawn from."""
    forms = {}
    for name in divergences.__all__:
        term = getattr(divergences, name)()
        signal = TopK if name in _STORED else Head if term.uses_teacher else type(None)
        forms[name] = Form((term,), _STORED.get(name), signal)
    forward, ce = (divergences.forward_kl(),), (divergences.cross_entropy(),)
    return forms | {
        "forward_kl temperature 2": Form(forward, temperature=2.0),
        "forward_kl standardized": Form(forward, standardized=True),
        "forward_kl softcap 30": Form(forward, softcap=30.0),
        f"cross_entropy {DRAWS} draws": Form(ce, _drawn, Sampled),
    }


def _heads(form: Form, hidden, unembed, signal) -> tuple[Head, Any]:
    teacher = signal._replace(softcap=form.softcap) if isinstance(signal, Head) else signal
    return Head(hidden, unembed, softcap=form.softcap), teacher


def _fused(form: Form, vocab: int, implementation: str | None, hidden, unembed, signal, targets, weights):
    student, teacher = _heads(form, hidden, unembed, signal)
    count = len(form.terms)
    return linear_divergence(
        form.terms,
        student,
        teacher,
        targets,
        jnp.broadcast_to(weights, (count, *weights.shape)),
        (form.temperature,) * count,
        standardized=(form.standardized,) * count,
        vocab=vocab,
        implementation=implementation,
    )[0]


def _logits(head: Head) -> jax.Array:
    """Of a product in the activations' dtype; what follows is float32, or float64 where that is asked for."""
    z = head.hidden @ head.unembed.astype(head.hidden.dtype)
    return z.astype(jnp.promote_types(z.dtype, jnp.float32))


def _dense(form: Form, hidden, unembed, signal, targets, weights):
    student, teacher = _heads(form, hidden, unembed, signal)
    entries = _logits(teacher) if isinstance(teacher, Head) else teacher
    return jnp.sum(weights * form.dense(_logits(student), entries, targets))


def fused(form: Form, vocab: int, implementation: str | None = None) -> Callable:
    """(hidden, unembed, signal, targets, weights) -> (value, (d hidden, d unembed)) through the kernel."""
    return jax.value_and_grad(partial(_fused, form, vocab, implementation), argnums=(0, 1))


def dense(form: Form, vocab: int) -> Callable:
    """The same written plainly: all logits, `log_softmax`, autodiff."""
    plain = partial(_dense, form) if form.dense else partial(_fused, form, vocab, "reference")
    return jax.value_and_grad(plain, argnums=(0, 1))


def bare(hidden, unembed, signal, targets, weights):
    """The matrix products of any exact form, each fed by another one so that none can be left out."""
    del targets, weights
    z = hidden @ unembed
    z_teacher = signal.hidden @ signal.unembed if isinstance(signal, Head) else z
    across = (((1,), (1,)), ((), ()))
    down = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(z_teacher, unembed, across), jax.lax.dot_general(hidden, z, down)


# -------------------------------------------------------------------------------------- the inputs


def make(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Random heads whose logits spread by about 2 nats, and next tokens; the same for everyone."""
    rng = np.random.default_rng(seed)
    normal = partial(rng.standard_normal, dtype=np.float32)
    spread = [np.float32(2 / np.sqrt(width)) for width in (shape.width, shape.teacher_width)]
    return {
        "hidden": normal((shape.tokens, shape.width)),
        "unembed": normal((shape.width, shape.vocab)) * spread[0],
        "teacher_hidden": normal((shape.tokens, shape.teacher_width)),
        "teacher_unembed": normal((shape.teacher_width, shape.vocab)) * spread[1],
        "targets": rng.integers(0, shape.vocab, shape.tokens, dtype=np.int32),
    }


@jax.jit
def _stored(hidden: jax.Array, unembed: jax.Array) -> TopK:
    lp = jax.nn.log_softmax(hidden @ unembed)
    logprobs, ids = jax.lax.top_k(lp, TOP)
    others = jnp.put_along_axis(lp, ids, -jnp.inf, -1, inplace=False)
    return TopK(ids, logprobs, jax.nn.logsumexp(others, -1, keepdims=True))


def arguments(shape: Shape, signals: set[type], seed: int = 0) -> dict[type, tuple]:
    """What the programs are called with, for each kind of teacher signal that is asked for."""
    arrays = make(shape, seed)
    hidden, unembed, targets = (jnp.asarray(arrays[name]) for name in ("hidden", "unembed", "targets"))
    teacher = Head(jnp.asarray(arrays["teacher_hidden"]), jnp.asarray(arrays["teacher_unembed"]))
    weights = jnp.full(shape.tokens, 1 / shape.tokens, jnp.float32)
    found: dict[type, Any] = {Head: teacher, type(None): None}
    if signals & {TopK, Sampled}:
        starts = range(0, shape.tokens, 128)
        stored = [_stored(teacher.hidden[start : start + 128], teacher.unembed) for start in starts]
        found[TopK] = jax.tree.map(lambda *x: jnp.concatenate(x), *stored)
        # How the draws fell is the same to the clock: once each on the first entries, and on the likeliest the rest.
        counts = jnp.ones((shape.tokens, DRAWS // 4), jnp.int32).at[:, 0].add(DRAWS - DRAWS // 4)
        found[Sampled] = Sampled(found[TopK].ids[:, : DRAWS // 4], counts)
    return {signal: (hidden, unembed, found[signal], targets, weights) for signal in signals}


def abstract(shape: Shape, signal: type = Head, dtype=jnp.float32) -> tuple:
    """The same as shapes and dtypes only: enough to compile. `dtype` is that of all but the student's parameter."""
    struct = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
    count, wide = shape.tokens, shape.teacher_width
    teacher: Any = Head(struct(count, wide, dtype=dtype), struct(wide, shape.vocab, dtype=dtype))
    if signal is TopK:
        teacher = TopK(struct(count, TOP, dtype=jnp.int32), struct(count, TOP), struct(count, 1))
    student = struct(count, shape.width, dtype=dtype), struct(shape.width, shape.vocab)
    return *student, teacher, struct(count, dtype=jnp.int32), struct(count)


# ----------------------------------------------------------------------------------- what is exact


def gradient_error(program: Callable, form: Form, vocab: int, inputs: tuple, tokens: int = 64) -> float:
    """Largest relative L2 error of a compiled program's gradients, against the dense form in float64.

    All other tokens get weight zero, so that the program is the one that is timed and the dense form stays small.
    """
    hidden, unembed, signal, targets, _ = inputs
    count = targets.shape[0]
    pick = np.linspace(0, count - 1, min(tokens, count)).astype(int)
    masked = np.zeros(count, np.float32)
    masked[pick] = 1 / len(pick)
    _, (dhidden, dunembed) = program(hidden, unembed, signal, targets, jnp.asarray(masked))
    found = np.asarray(dhidden)[pick], np.asarray(dunembed)
    whole = isinstance(signal, Head)
    rows = signal._replace(hidden=signal.hidden[pick]) if whole else jax.tree.map(lambda x: x[pick], signal)
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, np.float64) if np.issubdtype(x.dtype, np.floating) else np.asarray(x)
        few = jax.tree.map(lambda x: jnp.asarray(wide(x)), (hidden[pick], unembed, rows, targets[pick], masked[pick]))
        _, true = jax.jit(dense(form, vocab))(*few)
    errors = [np.linalg.norm(got - np.asarray(want)) / np.linalg.norm(want) for got, want in zip(found, true)]
    return float(max(errors))
