"""The compiler for TPUs: there without a TPU, where libtpu is installed."""

import importlib.util

import pytest


def pytest_collection_modifyitems(items):
    missing = importlib.util.find_spec("libtpu") is None
    reason = "compiling for TPUs needs libtpu: bash launch/setup.sh tpu, or pip install 'jax[tpu]'"
    for item in items:
        if "tpu" in item.path.parent.parts:
            item.add_marker(pytest.mark.tpu)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.skipif(missing, reason=reason))
