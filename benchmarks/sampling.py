"""Speed of the sampler on SmolLM2-135M, against the bare products of its steps, a forward pass, and transformers.

    python benchmarks/sampling.py --quick --json

benchmarks/README.md says what each form is and how to read its rows.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # the times are a CPU's

import jax
import jax.numpy as jnp
import numpy as np
from losses import QUICK_SECONDS, STARTED, _show

from jaxkd.core.types import PyTree
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.sampler import Sampler, decoder, unrolled

PROMPT, SLOTS = 16, 8
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class Form(NamedTuple):
    """Completions to write: as many as there are prompt lengths, in some slots."""

    lengths: tuple[int, ...]
    shares: tuple[float, ...]  # of `--new`: the limit of each completion
    slots: int

    def limits(self, new: int) -> np.ndarray:
        return np.asarray([max(int(share * new), 1) for share in self.shares], np.int32)


def _form(lengths: tuple[int, ...], shares: tuple[float, ...] = (), slots: int = SLOTS) -> Form:
    return Form(lengths, shares or (1.0,) * len(lengths), min(slots, len(lengths)))


# Eight prompts of equal and of mixed lengths have the same sum. In the queue one answer is as long as four others, so
# that no slot need idle.
MIXED = (4, 7, 12, 16, 25, 32, 49, 63)
FORMS = {
    "decode": _form((PROMPT,)),
    "decode batch": _form((sum(MIXED) // SLOTS,) * SLOTS),
    "mixed lengths": _form(MIXED),
    "queue": _form((PROMPT,) * (4 * SLOTS - 3), (1.0, *(0.25,) * (4 * SLOTS - 4))),
}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="float32, 16 new tokens, no peer, about a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of tables")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has transformers; default: this one")
    parser.add_argument("--new", type=int, help="new tokens of a completion (128, or 16 with --quick)")
    parser.add_argument("--dtype", nargs="+", help="of weights and cache (float32 bfloat16)")
    parser.add_argument("--layers", type=int, help="only this many of the model's layers")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken")
    return parser.parse_args()


def _model(layers: int | None) -> tuple[Config, PyTree]:
    from jaxkd.models import shrink, weights

    checkpoint = weights.open_checkpoint("smollm2-135m-instruct")
    config, params = checkpoint.config, checkpoint.load()
    if layers:
        config = dataclasses.replace(config, layers=layers)
        params = shrink.keep_layers(params, tuple(range(layers)))
    return config, params


class Run(NamedTuple):
    """A compiled program and what it is called with."""

    program: Callable
    arguments: tuple

    def seconds(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.program(*self.arguments))
        return time.perf_counter() - start


def _compiled(function: Callable, *arguments: Any) -> Run:
    return Run(jax.jit(function).lower(*arguments).compile(), arguments)


def _prompts(form: Form, vocab: int) -> np.ndarray:
    shape = len(form.lengths), max(form.lengths)
    ids = np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)
    return np.where(np.arange(shape[1]) < np.asarray(form.lengths)[:, None], ids, 0).astype(np.int32)


def _ours(form: Form, config: Config, dtype: Any, new: int, params: PyTree) -> dict[str, Run]:
    """The prefill of the prompts, and then all tokens, greedily; from prepared parameters."""
    sampler = Sampler(unrolled(decoder(config, dtype)), config.vocab, new, Sampling(0.0), slots=form.slots)

    def begin(params, *prompts):
        queue = sampler.queue(params, *prompts)
        return queue, sampler.start(queue)

    lengths, keys = np.asarray(form.lengths, np.int32), jax.random.split(jax.random.key(0), len(form.lengths))
    first = _compiled(begin, params, _prompts(form, config.vocab), lengths, keys, form.limits(new))
    return {"prefill": first, "decode": _compiled(sampler.advance, params, *first.program(*first.arguments))}


def _bare(batch: int, config: Config, dtype: Any, new: int, params: PyTree) -> Run:
    """As many steps of the products of one decoded token, with nothing that is not needed to keep all of them."""
    flat = lambda name, w: w.reshape(-1, config.embed) if name in ("o", "down") else w.reshape(config.embed, -1)
    matrices = [[flat(name, layer[name]) for name in MATRICES] for layer in params["layers"]]

    def step(x, matrices, unembed):
        for q, k, v, o, gate, up, down in matrices:
            y = x @ q
            y = y.at[:, : k.shape[1]].add(x @ k + x @ v)
            x = x + y @ o
            x = x + ((x @ gate) * (x @ up)) @ down
        z = jnp.einsum("bd,vd->bv", x, unembed, preferred_element_type=jnp.float32)
        return x / (1 + jnp.abs(z).max()).astype(x.dtype)

    def run(matrices, unembed, x):
        return jax.lax.fori_loop(0, new, lambda _, x: step(x, matrices, unembed), x)

    return _compiled(run, matrices, params["embed"], jnp.ones((batch, config.embed), dtype))


def _passes(config: Config, dtype: Any, params: PyTree, stacked: PyTree) -> dict[str, Run]:
    """The prefill of eight prompts of 64 tokens, and a forward pass of the same rows up to the last hidden states."""
    from jaxkd.core.types import Batch

    rows = np.random.default_rng(0).integers(0, config.vocab, (SLOTS, 64)).astype(np.int32)
    fill, one, row = decoder(config, dtype).prefill, np.ones_like(rows), np.zeros(SLOTS, np.int32)
    batch = Batch(rows, rows, one.astype(np.float32), one, np.broadcast_to(np.arange(64), rows.shape), row, row)
    run = lambda params, batch: transformer.forward(config, params, batch, dtype=dtype).head.hidden
    return {"prefill": _compiled(fill, params, rows), "forward": _compiled(run, stacked, batch)}


class Peer:
    """transformers' `generate` in a process of its own, which waits while others run."""

    def __init__(self, python: str, config: Config, params: PyTree, dtype: str, folder: str):
        from jaxkd.models import export
        from jaxkd.models.generation import Generation

        target = Path(folder) / dtype
        export.export(target, config, params, tokenizer_json="{}", generation=Generation(), card={}, dtype=dtype)
        command = [python, str(Path(__file__).with_name("_generate_peer.py")), str(target), dtype]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.there = self._process.stdout.readline().strip() == "ready"

    def seconds(self, form: Form, new: int) -> float:
        self._process.stdin.write(f"{len(form.lengths)} {form.lengths[0]} {new}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _rows(dtype: str, options: argparse.Namespace, python: str | None, until: float) -> Iterator[dict]:
    config, host = _model(options.layers)
    prepare = jax.jit(unrolled(decoder(config, dtype)).prepare)
    params = jax.block_until_ready(prepare(host))
    stacked = jax.tree.map(lambda a: jnp.asarray(a, dtype if a.ndim > 2 else a.dtype), host)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(python, config, host, dtype, folder) if python else None
        # In an order in which what is compared is close.
        runs: dict[str, Callable[[], float]] = {}
        for name, run in _passes(config, dtype, params, stacked).items():
            runs[name] = run.seconds
        for name, form in FORMS.items():
            if f"bare {form.slots}" not in runs:
                runs[f"bare {form.slots}"] = _bare(form.slots, config, dtype, options.new, params).seconds
            for part, run in _ours(form, config, dtype, options.new, params).items():
                runs[f"{part} of {name}"] = run.seconds
            if peer is not None and peer.there and name.startswith("decode"):
                runs[f"peer {name}"] = partial(peer.seconds, form, options.new)

        def round_of() -> dict[str, float]:
            seconds = {name: run() for name, run in runs.items()}
            return seconds | {name: seconds[f"prefill of {name}"] + seconds[f"decode of {name}"] for name in FORMS}

        round_of()  # first touch of memory
        seen: list[dict[str, float]] = []
        while len(seen) < options.rounds and (not seen or time.monotonic() < until):
            seen.append(round_of())
        if peer is not None:
            peer.close()
    ratio = lambda one, other: round(statistics.median(s[one] / s[other] for s in seen), 3)
    typical = {name: statistics.median(s[name] for s in seen) for name in seen[0]}
    for name, form in FORMS.items():
        yield {
            "name": f"{name} {dtype}",
            "batch": form.slots,
            "tokens_per_s": round(float(form.limits(options.new).sum()) / typical[name], 1),
            "over_limit": ratio(f"decode of {name}", f"bare {form.slots}"),
            "over_transformers": ratio(f"peer {name}", name) if f"peer {name}" in typical else None,
        }
    yield {
        "name": f"prefill {dtype}",
        "batch": SLOTS,
        "tokens_per_s": round(SLOTS * 64 / typical["prefill"], 1),
        "over_limit": ratio("prefill", "forward"),
        "over_transformers": None,
    }


def main() -> None:
    options = _parsed()
    options.new = options.new or (16 if options.quick else 128)
    python = None if options.quick else options.peers or sys.executable
    until = STARTED + QUICK_SECONDS if options.quick else float("inf")
    for dtype in options.dtype or (("float32",) if options.quick else ("float32", "bfloat16")):
        _show(_rows(dtype, options, python, until), options.json)


if __name__ == "__main__":
    main()
