"""Names the extra of pyproject.toml that brings a module which is not installed."""

_MODULES = {
    "train": (
        "absl", "array_record", "etils", "gguf", "grain", "importlib_resources", "jinja2", "ml_collections", "orbax",
        "pyarrow", "safetensors", "tensorboardX", "tensorflow_datasets", "tokenizers", "tqdm",
    ),
    "math": ("mathgenerator", "matplotlib", "sympy"),
    "tasks": ("math_verify", "rouge_score", "sacrebleu"),
    "lm-eval": ("lm_eval",),
    "gcs": ("gcsfs",),
    "tpu": ("libtpu",),
}  # fmt: skip


class MissingExtra(ModuleNotFoundError):
    """A module is not installed; the message names the extra that brings it."""


def explain(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """A `MissingExtra` where an extra brings the module, else `error` itself."""
    module = (error.name or "").split(".")[0]
    for extra, modules in _MODULES.items():
        if module in modules:
            return MissingExtra(f'{module} is not installed: pip install "jaxkd[{extra}]"', name=error.name)
    return error
