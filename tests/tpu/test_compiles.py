"""Loss kernels compiled for every TPU generation by the real compiler, without a TPU."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import REPOSITORY
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.core.types import Head
from jaxkd.kernels import pallas_tpu, recompute, tiling
from jaxkd.kernels.api import linear_divergence
from jaxkd.planning.plan import devices
from jaxkd.planning.topology import topology

sys.path.append(str(REPOSITORY / "tests" / "kernels"))
from dense import FAMILY

TOKENS, VOCAB, WIDTHS = 1920, 128256, (2048, 4096)
PAIR = ("forward_kl", "next_token")
EVERY = tuple(name for name, term in FAMILY.items() if term.top_set is None)
KERNELS = ["normalise", "pull_hidden", "pull_unembed", "sum"]


def mesh_of(name: str, data: int = 1, model: int = 1) -> Mesh:
    grid = np.array(devices(topology(name))[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"))


def pallas_step(mesh, tokens, columns, widths, dtype, names):
    """Value and gradients of the Pallas form, compiled, with sizes on one device."""
    terms, (data, model) = tuple(FAMILY[n] for n in names), mesh.devices.shape
    itemsize = jnp.dtype(dtype).itemsize
    sizes = tiling.Sizes(tokens // data, columns // model, *widths, itemsize, split=model > 1, terms=len(terms))
    tiles = tiling.tiling(sizes, tiling.current_chip())
    more = {}
    if len(terms) > 2:  # small tiles compile quickly; these heads have everything that a head may have
        tiles = tiles._replace(rows=(128, 128), columns=(128, 128))
        more = {"bias": np.ones(columns, np.float32), "scale": 0.5, "softcap": 30.0}
    plan = pallas_tpu.Plan(terms, (0,) * len(terms), columns, *tiles)
    shape = lambda *dims, dtype=dtype, spec=P(): jax.ShapeDtypeStruct(  # noqa: B008
        dims, dtype, sharding=NamedSharding(mesh, spec)
    )
    student, teacher = (
        Head(shape(tokens, width, spec=P("data", None)), shape(width, columns, dtype=stored, spec=P(None, "model")))
        if width
        else None
        for width, stored in zip(widths, ("float32", dtype), strict=True)
    )
    assert (reason := tiling.supports(plan, student, teacher)) is None, reason
    targets = shape(tokens, dtype=jnp.int32, spec=P("data"))
    weights = shape(len(terms), tokens, dtype=jnp.float32, spec=P(None, "data"))
    divergence = recompute.differentiable(pallas_tpu.forward, pallas_tpu.backward)

    def loss(hidden, unembed, teacher, targets, weights):
        teacher = None if teacher is None else teacher._replace(**more)
        return divergence(plan, Head(hidden, unembed, **more), teacher, targets, weights, jnp.full(1, 2.0))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return run.lower(student.hidden, student.unembed, teacher, targets, weights).compile()


def assert_lean(compiled, tokens: int, columns: int, width: int, limit: int = 4) -> None:
    """All four kernels, no logits, and as memory `limit` bytes per weight of the head and a little per token.

    Four are its gradient, or its cast operand where the gradient is written to the result; 0 is no limit.
    """
    text = compiled.as_text()
    calls = re.findall(r'custom_call_target="tpu_custom_call".*?op_name="[^"]*?(\w+)\)*/pallas_call"', text)
    assert sorted(calls) == KERNELS
    assert f"[{tokens},{columns}]" not in text
    if limit:
        most = limit * width * columns + tokens * (4 * width + 4 * 128)
        assert compiled.memory_analysis().temp_size_in_bytes <= most


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v4:2x2x1", "TPU v4"),
        ("v5e:2x2", "TPU v5 lite"),
        ("v5p:2x2x1", "TPU v5"),
        ("v6e:2x2", "TPU v6 lite"),
        ("tpu7x:2x2x1", "TPU7x"),
    ],
)
def test_kernels_compile_and_stay_within_memory(name, kind):
    mesh = mesh_of(name)
    assert mesh.devices.item().device_kind == kind
    with jax.set_mesh(mesh):
        assert_lean(pallas_step(mesh, TOKENS, VOCAB, WIDTHS, "bfloat16", PAIR), TOKENS, VOCAB, WIDTHS[0])
        # A small program's arrays may be copied to faster memory, which counts as temporary: no limit.
        assert_lean(pallas_step(mesh, 640, 4000, (256, 512), "bfloat16", EVERY), 640, 4000, 256, limit=0)
        if name == "v6e:2x2":  # sizes that no tile divides
            assert_lean(pallas_step(mesh, 1111, 50048, (768, 0), "float32", PAIR[1:]), 1111, 50048, 768)


def test_sharded_program_exchanges_each_thing_once():
    mesh = mesh_of("v5e:2x2", 2, 2)
    with jax.set_mesh(mesh):
        compiled = pallas_step(mesh, TOKENS, VOCAB, WIDTHS, "bfloat16", PAIR)
    tokens, columns, width = TOKENS // 2, VOCAB // 2, WIDTHS[0]
    assert_lean(compiled, tokens, columns, width)
    text = compiled.as_text()
    assert not re.search(r" (all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)
    # Shapes of all reductions: the head's gradient and the hidden states' once each, else a few numbers per token.
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\]\S*?\)? all-reduce(?:-start)?\(", text)
    assert shapes.count(f"{width},{columns}") == 1
    assert shapes.count(f"{tokens},{width}") == 1
    rest = [s.split(",") for s in shapes if str(width) not in s.split(",")]
    assert len(shapes) == len(rest) + 2
    assert all(s == [""] or (s[1:] == [str(tokens)] and int(s[0]) < 16) for s in rest), shapes


def test_the_automatic_form_is_xla_and_stays_within_memory():
    """The head's gradient twice, its operand, and a twentieth of what [tokens, vocabulary] would take four times."""
    tokens, (width, teacher_width) = 8192, WIDTHS
    shape = lambda *s, dtype="bfloat16": jax.ShapeDtypeStruct(s, dtype)

    def value(hidden, unembed, teacher):
        arrays = jnp.zeros(tokens, jnp.int32), jnp.ones((2, tokens)), (1.0, 1.0)
        terms = tuple(FAMILY[name] for name in PAIR)
        return linear_divergence(terms, Head(hidden, unembed), teacher, *arrays, vocab=VOCAB)[0]

    teacher = Head(shape(tokens, teacher_width), shape(teacher_width, VOCAB))
    with jax.set_mesh(mesh_of("v5e:2x2")):
        student = shape(tokens, width), shape(width, VOCAB, dtype="float32")
        compiled = jax.jit(jax.grad(value, (0, 1))).lower(*student, teacher).compile()
    assert "tpu_custom_call" not in compiled.as_text()
    dense = 4 * 4 * tokens * VOCAB
    assert compiled.memory_analysis().temp_size_in_bytes < (4 + 4 + 2) * width * VOCAB + dense / 20
