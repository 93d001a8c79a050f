"""What several test files share: small texts, small models, runs in processes of their own."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""The type checker that tests switch on: an int will do for a float."""

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
