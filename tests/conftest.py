"""Eight fake devices for every test, warnings as errors, and what several test files share."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# LLVM's optimiser is left out: compiling is most of what these tests would wait for, and XLA's own passes, which
# decide memory and collectives, run all the same.
FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Every annotated shape and type of jaxkd is checked while tests run; users pay nothing for it.
install_import_hook("jaxkd", "beartype.beartype")

settings.register_profile("shared", deadline=None)  # machines that run tests are shared: time says nothing
settings.load_profile("shared")

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = [
    "the",
    "teacher",
    "tells",
    "a",
    "student",
    "what",
    "it",
    "knows",
    "and",
    "every",
    "token",
    "has",
    "a",
    "price",
    "in",
    "nats",
]


def write_domain(path: Path, seed: int, documents: int = 60) -> Path:
    """A JSONL file of short made-up documents: enough text for a few dozen rows."""
    rng = random.Random(seed)
    lines = [
        json.dumps({"text": f"{seed} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(20, 120)))})
        for i in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def two_domains(tmp_path_factory) -> dict[str, Path]:
    """Two domains of unequal size."""
    folder = tmp_path_factory.mktemp("text")
    return {
        "alpha": write_domain(folder / "alpha.jsonl", 1, 90),
        "beta": write_domain(folder / "beta.jsonl", 2, 40),
    }


def random_params(config, seed: int, spread: float = 0.05):
    """A decoder's parameters from numpy: nothing to compile. Norms and biases are off their resting place too."""
    import jax
    import numpy as np

    from jaxkd.models import transformer

    rng = np.random.default_rng(seed)
    shapes, axes = transformer.abstract(config)

    def draw(leaf, names):
        centre = 1.0 if set(names) <= {"layers", "embed"} or names == ("layers", "head_dim") else 0.0  # a norm's scale
        return jax.numpy.asarray((centre + spread * rng.normal(size=leaf.shape)).astype(np.float32))

    return jax.tree.map(draw, shapes, axes)


def tiny_arguments(domains: dict[str, Path], rows: Path, *more: str) -> list[str]:
    """`--config...` arguments: the tiny recipe on these domains instead of its own."""
    return [
        "--config=" + str(REPOSITORY / "configs" / "tiny.py"),
        *[
            "--config.data.domains.code=",
            "--config.data.domains.manual=",
        ],  # read the interpreter's whole library
        *[f"--config.data.domains.{name}={path}" for name, path in domains.items()],
        f"--config.data.directory={rows}",
        *more,
    ]


def jaxkd(*arguments: str, devices: int = 1, **options) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "jaxkd", *arguments],
        env=process_environment(devices),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )


def process_environment(devices: int = 1, cache: bool = True) -> dict[str, str]:
    """The environment of a user's shell, with this many fake devices.

    Processes share compiled programs through JAX's cache, which saves each of them ten seconds; `cache=False` is for
    tests that must see every process compile for itself.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
    if cache:
        environment |= {"JAX_COMPILATION_CACHE_DIR": _CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return environment


_CACHE = tempfile.TemporaryDirectory(prefix="jaxkd-tests-")
