"""The public names: `import jaxkd as kd`."""

import importlib.util
import inspect
import re
import subprocess
import sys

import pytest
from harness import REPOSITORY, process_environment

import jaxkd as kd


@pytest.mark.parametrize(
    ("use", "heavy"),
    [
        ("", "jax flax optax orbax tensorstore tensorflow_datasets grain ml_collections absl tokenizers pyarrow"),
        (
            "[getattr(jaxkd, name) for name in jaxkd.__all__ if name not in ('load_model', 'cached')]",
            "orbax tensorstore tensorflow_datasets grain",
        ),
    ],
)
def test_import_and_names_load_nothing_that_only_runs_need(use, heavy):
    code = f"import sys, jaxkd; {use or 0}; print(*[name for name in {heavy.split()!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=process_environment())
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr


@pytest.mark.parametrize("name", kd.__all__)
def test_every_name_is_there_and_documented(name):
    assert name in dir(kd)
    assert len((inspect.getdoc(getattr(kd, name)) or "").split()) > 5


def test_every_divergence_is_public():
    from jaxkd.losses import divergences, features

    assert set(divergences.__all__) <= set(kd.__all__)  # `next_token` is the objective's term of that name
    assert set(features.__all__) <= set(kd.__all__)
    with pytest.raises(AttributeError, match="forward_k"):
        kd.forward_k  # noqa: B018


def test_the_page_is_what_the_docstrings_say():
    spec = importlib.util.spec_from_file_location("api_page", REPOSITORY / "docs" / "api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPOSITORY / "docs/api.md").read_text(encoding="utf-8") == module.page(), "python docs/api.py > docs/api.md"


def test_the_program_of_the_readme(tmp_path):
    """A user's own model in a loop of their own, on a mesh whose axes have other names."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    program = re.search(r"^```python\n(.*?)^```", text, re.M | re.S).group(1)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=process_environment(8), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    first, *_, last = map(float, result.stdout.split())
    assert last < 0.8 * first
