"""Eight fake devices for every test, warnings as errors, and what several test files share."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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


def process_environment(devices: int = 1) -> dict[str, str]:
    """The environment of a user's shell, with this many fake devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
