"""Pallas kernels compiled for every TPU generation by the real compiler, without a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import REPOSITORY

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="compiling for TPUs needs libtpu: bash launch/setup.sh tpu, or pip install 'jax[tpu]'",
    ),
]
KERNELS = ["normalise", "pull_hidden", "pull_unembed", "sum"]
EVERYWHERE = ("one device", "every term")


def compiled(topology: str, *cases: str) -> dict[str, dict]:
    """What `compile_kernels.py` says of each case, compiled in a process of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "kernels")]),
        # No TPU is looked for, and several processes may compile at once.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), topology, *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["case"] for line in lines] == list(cases)
    print("\n".join(map(str, lines)))
    return {line["case"]: line for line in lines}


def assert_lean(found: dict) -> None:
    """All four kernels are there, the logits are not, and memory is the head's gradient and a little per token.

    A small program's arrays may be copied to faster memory, which counts as temporary: no limit for that one.
    """
    tokens, columns, width = found["local"]
    assert found["calls"] == KERNELS
    assert not found["whole_logits"]
    per_token = 4 * width + 4 * 128
    assert found["case"] == "every term" or found["temp"] <= 4 * width * columns + tokens * per_token, found


@pytest.mark.parametrize(
    ("topology", "kind"),
    [
        ("v4:2x2x1", "TPU v4"),
        ("v5e:2x2", "TPU v5 lite"),
        ("v5p:2x2x1", "TPU v5"),
        ("v6e:2x2", "TPU v6 lite"),
        ("tpu7x:2x2x1", "TPU7x"),
    ],
)
def test_kernels_compile_and_stay_within_memory(topology, kind):
    for found in compiled(topology, *EVERYWHERE).values():
        assert found["kind"] == kind
        assert_lean(found)


def test_sharded_program_exchanges_each_thing_once():
    found = compiled("v5e:2x2", "sharded")["sharded"]
    assert_lean(found)
    assert not found["others"]
    tokens, columns, width = found["local"]
    # Shapes of all reductions: the head's gradient and the hidden states' once each, else a few numbers per token.
    shapes = [reduction[reduction.index("[") + 1 : reduction.index("]")] for reduction in found["reductions"]]
    assert shapes.count(f"{width},{columns}") == 1
    assert shapes.count(f"{tokens},{width}") == 1
    rest = [s.split(",") for s in shapes if str(width) not in s.split(",")]
    assert len(shapes) == len(rest) + 2
    assert all(s == [""] or (s[1:] == [str(tokens)] and int(s[0]) < 16) for s in rest), shapes


def test_sizes_that_no_tile_divides_compile():
    assert_lean(compiled("v6e:2x2", "no tile divides")["no tile divides"])


@pytest.mark.parametrize(("topology", "narrow"), [("v6e:2x2", "pallas_tpu"), ("v5p:2x2x1", "xla")])
def test_the_form_is_chosen_by_what_it_moves(topology, narrow):
    """On v6e memory is dear beside products, so narrow heads take the form that makes logits four times."""
    found = compiled(topology, "chosen")["chosen"]
    assert (found["512"], found["2048"]) == (narrow, "xla")


def test_the_xla_form_stays_within_memory_on_a_tpu():
    """The head's gradient twice, its operand, and a twentieth of what [tokens, vocabulary] would take four times."""
    found = compiled("v5e:2x2", "xla")["xla"]
    tokens, columns, width = found["local"]
    dense = 4 * 4 * tokens * columns
    assert found["temp"] < (4 + 4 + 2) * width * columns + dense / 20, found
