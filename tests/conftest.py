"""Eight fake devices and type checks for all tests."""

import os
from pathlib import Path

import pytest
from harness import SMALL, here, tiny_arguments, write_domain
from hypothesis import settings
from jaxtyping import install_import_hook

# LLVM's optimiser is off, since most of the tests' time is compilation; XLA's own passes, which decide memory and
# collectives, still run.
FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Shape and type annotations of jaxkd are checked in tests only.
install_import_hook("jaxkd", "harness.checked")

# Before the first use of devices, as on the command line: `harness.here` runs whole commands in this process.
from jaxkd.runtime import cluster  # noqa: E402

cluster.join()

settings.register_profile("shared", deadline=None)  # on shared machines a test's time means nothing
settings.load_profile("shared")


@pytest.fixture(scope="session")
def two_domains(tmp_path_factory) -> dict[str, Path]:
    """Two domains of unequal size."""
    folder = tmp_path_factory.mktemp("text")
    return {
        "alpha": write_domain(folder / "alpha.jsonl", 3, 90),
        "beta": write_domain(folder / "beta.jsonl", 4, 40),
    }


@pytest.fixture(scope="session")
def arguments(two_domains, tmp_path_factory) -> list[str]:
    """A run of twelve steps of milliseconds, on one device."""
    return tiny_arguments(two_domains, tmp_path_factory.mktemp("rows"), *SMALL, "--config.run.mesh.data=1")


@pytest.fixture(scope="session")
def undisturbed(arguments, tmp_path_factory) -> Path:
    """The workdir of that run, never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    result = here("train", "--workdir", str(workdir), *arguments)
    assert result.returncode == 0, result.stderr
    assert "report.html" in result.stdout
    return workdir
