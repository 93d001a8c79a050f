"""Times and temporary memory on the CPU."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import _forms
import jax
from _forms import FORMS, Form, Shape, family
from _peers import Peers

QUICK = Shape(512, 32_000)
FAMILY = Shape(1_024, 32_000)
SHAPES = [Shape(tokens, vocab) for vocab in (32_000, 128_256, 151_936) for tokens in (1_024, 2_048)]
SHAPES.insert(2, Shape(8_192, 32_000))

MEMORY = [Shape(8_192, 128_256), Shape(8_192, 128_256, 2_048, 4_096)]
SWEEP = [1_024, 2_048, 4_096, 8_192, 16_384, 32_768]


def say(*words: Any) -> None:
    print(*words, file=sys.stderr, flush=True)


def compiled(function: Callable, arguments: tuple):
    """The XLA program. Every array is an argument, so that nothing is folded into it."""
    return jax.jit(function).lower(*arguments).compile()


def temporary(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def _needs(program) -> int:
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def _timed(program, arguments: tuple) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


class _Programs(NamedTuple):
    """A form's three programs, what they are called with, and what is known before they are timed."""

    inputs: tuple
    bare: Any
    ours: Any
    dense: Any  # None where it would not fit
    temp_bytes: int
    dense_temp_bytes: int
    error: float


def _programs(shape: Shape, forms: dict[str, Form], most: float) -> dict[str, _Programs]:
    inputs = _forms.arguments(shape, {form.signal for form in forms.values()})
    bares = {signal: compiled(_forms.bare, arguments) for signal, arguments in inputs.items()}
    found = {}
    for name, form in forms.items():
        say(f"{shape.tokens} x {shape.vocab}: {name}")
        arguments = inputs[form.signal]
        ours = compiled(_forms.fused(form, shape.vocab), arguments)
        dense = compiled(_forms.dense(form, shape.vocab), arguments)
        memory = temporary(ours), temporary(dense)
        if (needs := _needs(dense) / 2**30) > most:
            say(f"  its dense form needs {needs:.1f} GiB and is not run")
            dense = None
        error = _forms.gradient_error(ours, form, shape.vocab, arguments)
        found[name] = _Programs(arguments, bares[form.signal], ours, dense, *memory, error)
    return found


def _round(programs: dict[str, _Programs], peers: Peers | None) -> dict[tuple[str, str], float]:
    """Seconds of each form, its bare products and its dense twin, one after the other, and then of its peers."""
    seconds = {}
    for name, form in programs.items():
        for which in ("bare", "ours", "dense"):
            if (program := getattr(form, which)) is not None:
                seconds[name, which] = _timed(program, form.inputs)
        for peer in peers.of(name) if peers else ():
            seconds[name, peer] = peers.run(peer)["seconds"]
    return seconds


def _median(rounds: list[dict], above: tuple[str, str], below: tuple[str, str]) -> float | None:
    """Of the rounds' ratios: what slows a machine for a while slows both sides of a round."""
    ratios = [seconds[above] / seconds[below] for seconds in rounds if below in seconds]
    return round(statistics.median(ratios), 3) if ratios else None


def measure(
    shape: Shape,
    forms: dict[str, Form],
    rounds: int,
    most: float,
    python: str | None = None,
    until: float = float("inf"),
) -> Iterator[dict]:
    """One row per form, then one per peer that has it.

    Args:
        shape: of the problem.
        forms: by name.
        rounds: each runs every form once.
        most: GiB; a dense form that needs more is compiled and not run.
        python: interpreter of the peers, None to leave them out.
        until: `time.monotonic()` after which no further round begins.
    """
    programs = _programs(shape, forms, most)
    peers = Peers(python, _forms.make(shape)) if python else None
    say(f"  peers: {peers.versions}" if peers else "  no peers")
    _round(programs, peers)  # first touch of memory, and the peers' own compilers
    seen: list[dict] = []
    while len(seen) < rounds and (not seen or time.monotonic() < until):
        seen.append(_round(programs, peers))
    say(f"  {len(seen)} rounds")
    for name, form in programs.items():
        ratio = lambda which, to, name=name: _median(seen, (name, which), (name, to))
        common = {"tokens": shape.tokens, "vocab": shape.vocab}
        yield {
            "name": name,
            **common,
            "time_over_matmul": ratio("ours", "bare"),
            "time_over_dense": ratio("ours", "dense"),
            "temp_bytes": form.temp_bytes,
            "dense_temp_bytes": form.dense_temp_bytes,
            "max_grad_error": float(f"{form.error:.2e}"),
        }
        value = float(form.ours(*form.inputs)[0])
        for peer in peers.of(name) if peers else ():
            yield {
                "name": peer,
                **common,
                "time_over_matmul": ratio(peer, "bare"),
                "time_over_dense": ratio(peer, "dense"),
                "temp_bytes": peers.last[peer]["temp_bytes"],
                "dense_temp_bytes": form.dense_temp_bytes,
                "time_over_ours": ratio(peer, "ours"),
                "value_over_ours": round(peers.last[peer]["value"] / value, 6),
            }
    if peers:
        peers.close()


def memory() -> Iterator[dict]:
    """Temporary bytes of the compiled programs, which are not run: every form at two widths, then more tokens."""
    for shape in MEMORY:
        for name, form in FORMS.items():
            yield _memory(shape, name, form)
    for tokens in SWEEP:
        yield _memory(Shape(tokens, 128_256), "forward_kl", FORMS["forward_kl"], sweep=True)


def _memory(shape: Shape, name: str, form: Form, sweep: bool = False) -> dict:
    say(f"{'sweep' if sweep else 'memory'}: {name} at {shape}")
    arguments = _forms.abstract(shape, form.signal)
    ours = temporary(compiled(_forms.fused(form, shape.vocab), arguments))
    dense = temporary(compiled(_forms.dense(form, shape.vocab), arguments))
    return {
        "name": f"{name} {'sweep' if sweep else 'memory'}",
        **shape._asdict(),
        "temp_bytes": ours,
        "dense_temp_bytes": dense,
        "head_gradient_bytes": 4 * shape.width * shape.vocab,
        "dense_over_temp": round(dense / ours, 2),
    }


__all__ = ["FAMILY", "FORMS", "QUICK", "SHAPES", "family", "measure", "memory"]
