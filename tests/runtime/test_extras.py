"""The base installation has kernels, losses, models and the step; the command line names the extra it lacks."""

import subprocess
import sys
import tomllib

from harness import REPOSITORY, process_environment

from jaxkd.runtime import cluster, extras, multihost

# Flax itself requires the first three.
ABSENT = sorted({m for modules in extras._MODULES.values() for m in modules} - {"absl", "etils", "orbax", "libtpu"})
BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
LIBRARY = """
import jaxkd
assert not {"jax", "orbax", "tensorstore"} & set(sys.modules)
import jaxkd.kernels.api, jaxkd.losses.objective, jaxkd.models.transformer, jaxkd.train.step, jaxkd.teachers.online
import jax, jax.numpy as jnp
from jaxkd.core.types import Head
from jaxkd.kernels.api import linear_divergence
from jaxkd.losses.divergences import forward_kl
def loss(scale):
    head = lambda by: Head(jnp.ones((4, 8)) * by, jnp.arange(40.0).reshape(8, 5))
    targets, weights = jnp.zeros(4, int), jnp.ones((1, 4))
    return linear_divergence((forward_kl(),), head(scale), head(0.1), targets, weights, (1.0,), vocab=5)[0]
print(jax.grad(loss)(0.2))
"""
CONSOLE = "from jaxkd.__main__ import console\nconsole()"


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + program, *arguments], cwd=REPOSITORY, capture_output=True, text=True,
        env=process_environment() | {"JAX_PLATFORMS": "cpu"}, timeout=120,
    )  # fmt: skip


def test_the_base_installation_computes_losses():
    done = run(LIBRARY)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


def test_the_command_line_names_the_extra_that_is_missing(tmp_path):
    done = run(CONSOLE, "train", "--config", "configs/tiny.py", "--workdir", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("jaxkd: error: ")
    assert done.stderr.endswith('pip install "jaxkd[train]"\n')
    assert done.stderr.count("\n") == 1


def test_extras_of_missing_modules():
    code, text = multihost._describe(ModuleNotFoundError("No module named 'sympy.core'", name="sympy.core"))
    assert (code, text.count("\n")) == (1, 0)
    assert text.endswith('pip install "jaxkd[math]"')
    code, text = multihost._describe(ModuleNotFoundError("No module named 'mine'", name="mine"))
    assert code == cluster.EXIT_INTERNAL
    assert "mine" in text
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(extras._MODULES) <= set(project["optional-dependencies"])
    modules = {"orbax-checkpoint": "orbax", "absl-py": "absl"}
    for requirement in project["optional-dependencies"]["train"]:
        name = requirement.split(">")[0].split("[")[0]
        assert modules.get(name, name.replace("-", "_")) in extras._MODULES["train"], requirement
