"""jaxkd: distil large language models with JAX."""

__version__ = "0.1.0"
