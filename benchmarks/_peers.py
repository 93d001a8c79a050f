"""Other libraries on the same tensors: a worker in their own interpreter, asked for one run at a time.

`Peers` is our side. Run as a script with a directory of .npy files, this file is theirs: it imports neither jaxkd nor
the other benchmark files, says on its first line what it can run, and then answers each line of its input with one.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd_0.5": 0.5}
"""TRL's beta is the teacher's weight, as ours; 0 and 1 stand for the two KLs."""


class Peers:
    """A worker with its own copy of the arrays; empty where the interpreter has none of the libraries."""

    def __init__(self, python: str, arrays: dict[str, np.ndarray]):
        self._folder = tempfile.TemporaryDirectory()
        for name, array in arrays.items():
            np.save(Path(self._folder.name) / f"{name}.npy", array)
        command = [python, str(Path(__file__).resolve()), self._folder.name]
        self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.offers, self.versions = self._answer()
        self.last: dict[str, dict] = {}  # answers, by name

    def _answer(self):
        line = self._worker.stdout.readline()
        if not line:
            raise RuntimeError("the peers' process ended; its messages are above")
        return json.loads(line)

    def of(self, form: str) -> list[str]:
        """The peers' names for one of our forms."""
        return [name for name in self.offers if name.partition("/")[2] == form]

    def run(self, name: str) -> dict:
        """{"seconds", "value", "temp_bytes"} of one run."""
        self._worker.stdin.write(name + "\n")
        self._worker.stdin.flush()
        self.last[name] = self._answer()
        return self.last[name]

    def close(self) -> None:
        self._worker.stdin.close()
        self._worker.wait()
        self._folder.cleanup()


# --------------------------------------------------------------------------------------- their side


def _trl(arrays: dict) -> dict[str, Callable]:
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    hidden = tensors["hidden"][None].requires_grad_()
    unembed = tensors["unembed"].T.contiguous().requires_grad_()  # torch's [V, D]
    teacher = tensors["teacher_hidden"][None], tensors["teacher_unembed"].T.contiguous()
    mask = torch.ones(hidden.shape[:2])

    def run(beta: float) -> tuple[float, None]:
        hidden.grad = unembed.grad = None
        loss = _chunked_divergence_loss(hidden, teacher[0], unembed, teacher[1], mask, beta)[0]
        loss.backward()
        return loss.item(), None

    return {f"trl/{form}": lambda beta=beta: run(beta) for form, beta in BETAS.items()}


def _tunix(arrays: dict) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp
    from tunix.distillation.strategies.logit import LogitStrategy

    names = ("hidden", "unembed", "teacher_hidden", "teacher_unembed", "targets")
    inputs = [jnp.asarray(arrays[name]) for name in names]
    nothing = lambda *_: None

    def program(alpha: float) -> Callable:
        strategy = LogitStrategy(nothing, nothing, nothing, temperature=1.0, alpha=alpha)

        def loss(hidden, unembed, teacher_hidden, teacher_unembed, targets):
            labels = jax.nn.one_hot(targets, unembed.shape[1])
            return strategy.compute_loss(hidden @ unembed, teacher_hidden @ teacher_unembed, labels)

        known = []

        def run() -> tuple[float, int]:
            if not known:
                step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
                known.append(step.lower(*inputs).compile())
            (value, _), _ = jax.block_until_ready(known[0](*inputs))
            # alpha weighs the two losses: of both together it is half our sum
            return float(value) / max(alpha, 1 - alpha), known[0].memory_analysis().temp_size_in_bytes

        return run

    return {"tunix/forward_kl": program(1.0), "tunix/forward_kl+ce": program(0.5)}


def _serve(folder: Path) -> None:
    # The libraries print as they like: what is for the other side has a stream of its own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    offers: dict[str, Callable] = {}
    versions = {}
    for package, build in (("trl", _trl), ("tunix", _tunix)):
        try:
            module = importlib.import_module(package)
            offers |= build(arrays)
            versions[package] = getattr(module, "__version__", "unknown")
        except ImportError as error:
            print(f"{package} is left out: {error}", file=sys.stderr)
    print(json.dumps([list(offers), versions]), file=answers)
    for line in sys.stdin:
        start = time.perf_counter()
        value, temp = offers[line.strip()]()
        row = {"seconds": time.perf_counter() - start, "value": value, "temp_bytes": temp}
        print(json.dumps(row), file=answers)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
