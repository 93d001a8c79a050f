"""Compile the Pallas loss for a TPU that is not here, and print as JSON what came out: a process of its own.

Usage: compile_kernels.py TOPOLOGY CASE ... Each line is a case; sizes are those of one device, in bytes.
"""

import json
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from dense import FAMILY
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.core.types import Head
from jaxkd.kernels import pallas_tpu, recompute, tiling
from jaxkd.kernels.api import linear_divergence

_EVERYWHERE = P()
TOKENS, VOCAB, WIDTHS = 1920, 128256, (2048, 4096)
CASES = {
    # name: (devices along data and model, tokens, columns, (D, E), hidden states' dtype, names of the terms)
    "one device": ((1, 1), TOKENS, VOCAB, WIDTHS, "bfloat16", ("forward_kl", "next_token")),
    "sharded": ((2, 2), TOKENS, VOCAB, WIDTHS, "bfloat16", ("forward_kl", "next_token")),
    "no tile divides": ((1, 1), 1111, 50048, (768, 0), "float32", ("next_token",)),
    "every term": ((1, 1), 640, 4000, (256, 512), "bfloat16", tuple(n for n, t in FAMILY.items() if t.head is None)),
}


def lower(mesh, tokens, columns, widths, dtype, names):
    """The lowered value and gradients, and the plan."""
    terms, (data, model) = tuple(FAMILY[n] for n in names), mesh.devices.shape
    sizes = tiling.Sizes(
        tokens // data, columns // model, *widths, jnp.dtype(dtype).itemsize, split=model > 1, terms=len(terms)
    )
    tiles = tiling.tiling(sizes, tiling.current_chip())
    more = {}
    if len(terms) > 2:
        # Whether everything that a head or a term may have compiles is all we ask: small tiles do so quickly.
        tiles = tiles._replace(rows=(128, 128), columns=(128, 128))
        more = {"bias": np.ones(columns, np.float32), "scale": 0.5, "softcap": 30.0}
    plan = pallas_tpu.Plan(terms, (0,) * len(terms), columns, *tiles)

    def shape(*dims, dtype=dtype, spec=_EVERYWHERE):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    per_token, head = P("data", None), P(None, "model")
    student, teacher = (
        Head(shape(tokens, width, spec=per_token), shape(width, columns, dtype=stored, spec=head)) if width else None
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
    return run.lower(student.hidden, student.unembed, teacher, targets, weights), plan


def chosen(device) -> dict:
    """Which form `linear_divergence` takes by itself, for a narrow pair of heads and for a wide one."""
    mesh = Mesh(np.array([[device]]), ("data", "model"))
    found = {"case": "chosen"}
    for student, teacher in ((512, 1024), (2048, 4096)):
        heads = [
            Head(jax.ShapeDtypeStruct((8192, width), "bfloat16"), jax.ShapeDtypeStruct((width, VOCAB), "bfloat16"))
            for width in (student, teacher)
        ]

        def value(student, teacher):
            arrays = jnp.zeros(8192, jnp.int32), jnp.ones((1, 8192)), (1.0,)
            return linear_divergence((FAMILY["forward_kl"],), student, teacher, *arrays, vocab=VOCAB)[0]

        with jax.set_mesh(mesh):
            text = jax.jit(jax.grad(value)).lower(*heads).as_text()
        found[f"{student}"] = "pallas_tpu" if "tpu_custom_call" in text else "xla"
    return found


def xla_form(device) -> dict:
    """Memory of the form that scans over chunks, for the widths of Llama-3.2-1B and Llama-3.1-8B."""
    mesh, tokens, (width, teacher_width) = Mesh(np.array([[device]]), ("data", "model")), 8192, WIDTHS
    shape = lambda *s, dtype="bfloat16": jax.ShapeDtypeStruct(s, dtype)

    def value(hidden, unembed, teacher):
        arrays = jnp.zeros(tokens, jnp.int32), jnp.ones((2, tokens)), (1.0, 1.0)
        terms = (FAMILY["forward_kl"], FAMILY["next_token"])
        return linear_divergence(terms, Head(hidden, unembed), teacher, *arrays, vocab=VOCAB, implementation="xla")[0]

    teacher = Head(shape(tokens, teacher_width), shape(teacher_width, VOCAB))
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(value, (0, 1))).lower(
            shape(tokens, width), shape(width, VOCAB, dtype="float32"), teacher
        )
        memory = lowered.compile().memory_analysis()
    return {"case": "xla", "local": [tokens, VOCAB, width], "temp": memory.temp_size_in_bytes}


def main(topology: str, *names: str) -> None:
    more = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    devices = get_topology_desc(topology_name=topology, platform="tpu", **more).devices
    for name in names:
        if name in ("chosen", "xla"):
            print(json.dumps((chosen if name == "chosen" else xla_form)(devices[0])), flush=True)
            continue
        (data, model), *case = CASES[name]
        mesh = Mesh(np.array(devices[: data * model]).reshape(data, model), ("data", "model"))
        start = time.monotonic()
        with jax.set_mesh(mesh):
            lowered, plan = lower(mesh, *case)
            compiled = lowered.compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        calls = re.findall(r'custom_call_target="tpu_custom_call".*?op_name="[^"]*?(\w+)\)*/pallas_call"', text)
        reductions = re.findall(r"= \(?(\S+?)\)? all-reduce(?:-start)?\(", text)
        others = re.findall(r" (all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)
        found = {
            "case": name,
            "local": [case[0] // data, case[1] // model, case[2][0]],  # tokens, columns, width
            "kind": devices[0].device_kind,
            "tiles": [plan.rows, plan.columns],
            "calls": sorted(calls),
            "temp": memory.temp_size_in_bytes,
            "whole_logits": f"[{case[0] // data},{case[1] // model}]" in text,
            "reductions": reductions,
            "others": others,
            "seconds": round(time.monotonic() - start, 1),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
