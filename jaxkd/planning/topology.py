"""TPU slices by name: their shapes, hosts and devices."""

import math
import re
from typing import Any, NamedTuple

from jaxkd.core.chips import CHIPS, Chip


class Generation(NamedTuple):
    """The slices of one TPU generation, and what the number in a slice's name counts."""

    name: str  # as libtpu spells it
    aliases: tuple[str, ...]
    kind: str  # JAX's `device_kind`
    shapes: tuple[tuple[int, ...], ...]  # those with a number as name
    pod: tuple[int, ...]  # the largest grid of chips; the TPU compiler aborts the process beyond it
    counted: str  # what the number counts
    per_chip: int = 1  # of those
    devices_per_chip: int = 1


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    *((8, 8, 16), (8, 16, 16), (16, 16, 16)),
)
GENERATIONS = (
    Generation("v4", (), "TPU v4", _CUBES, (16, 16, 16), "TensorCores", 2),
    Generation("v5e", ("v5litepod",), "TPU v5 lite", _FLAT, (16, 16), "chips"),
    Generation("v5p", (), "TPU v5", _CUBES, (16, 20, 28), "TensorCores", 2),
    Generation("v6e", (), "TPU v6 lite", _FLAT, (16, 16), "chips"),
    Generation("tpu7x", ("v7x",), "TPU7x", _CUBES, (16, 24, 24), "TensorCores", 2, 2),
)
_ON_ONE_HOST = 8  # chips of the largest flat slice with a single host; larger ones have four a host


class Topology(NamedTuple):
    """A slice (chips in a grid, each linked to its neighbours), or several equal ones joined by the network."""

    asked: str  # the name that the user gave
    generation: Generation
    shape: tuple[int, ...]  # of one slice, in chips
    slices: int = 1

    @property
    def name(self) -> str:
        """Of one slice, as libtpu spells it: "v5e:4x4"."""
        return f"{self.generation.name}:{_grid(self.shape)}"

    @property
    def chip(self) -> Chip:
        """Peak rates and memory of one JAX device."""
        return CHIPS[self.generation.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def hosts(self) -> int:
        """Of all slices; each runs one process."""
        flat, chips = len(self.shape) == 2, math.prod(self.shape)
        return self.slices if chips <= (_ON_ONE_HOST if flat else 4) else self.chips // 4

    @property
    def devices(self) -> int:
        """JAX devices of all slices; a tpu7x chip is two."""
        return self.chips * self.generation.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Per dimension, whether a link closes the ring: at 16 in flat slices, at multiples of 4 x 4 x 4 in cubes."""
        if len(self.shape) == 2:
            return tuple(n == 16 for n in self.shape)
        return (all(n % 4 == 0 for n in self.shape),) * 3

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `jax.experimental.topologies.get_topology_desc` beside the name."""
        more: dict[str, Any] = {"chip_config_name": "megacore"} if self.generation.name == "v4" else {}
        more |= {"chips_per_host_bounds": (1, 1, 1)} if math.prod(self.shape) == 1 else {}
        return more | ({"num_slices": self.slices} if self.slices > 1 else {})

    def sentence(self) -> str:
        """Chips, hosts and devices, and what the number in the name counts where that is not chips."""
        g, plural = self.generation, lambda n, what: f"{n:,} {what}{'' if n == 1 else 's'}"
        counts = [plural(self.chips, "chip"), plural(self.hosts, "host"), plural(self.devices, "JAX device")]
        times = f"{self.slices} x " if self.slices > 1 else ""
        text = f"{times}{self.name}: {', '.join(counts)}"
        if g.per_chip > 1 and "-" in self.asked and "x" not in self.asked.rpartition("-")[2]:
            text += f" (the number in {self.asked} counts {g.counted}, {g.per_chip} a chip, not chips)"
        return text


def topology(name: str, slices: int = 1) -> Topology:
    """Parse a slice's name, such as "v5litepod-256", "v5p-128", "v6e-64", "tpu7x-4x4x4" or "v5e:16x16"."""
    if slices < 1:
        raise ValueError(f"--slices {slices}: there must be at least 1")
    generations = {alias: g for g in GENERATIONS for alias in (g.name, *g.aliases)}
    match = re.fullmatch(r"([a-z0-9]+)[-:=](\d+(?:x\d+)*)", name.strip().lower())
    if match is None or match[1] not in generations:
        examples = ", ".join(f"{g.name}-{_number(g, g.shapes[3])}" for g in GENERATIONS)
        examples += " or v5litepod-256, or a grid of chips such as v5e:16x16 or v5p:4x4x8"
        raise ValueError(f"no topology '{name}': give a generation and a size, such as {examples}")
    g = generations[match[1]]
    example = f"such as {g.name}:{_grid(g.shapes[3])}"
    if "x" in match[2]:
        shape = tuple(map(int, match[2].split("x")))
        if len(shape) != len(g.pod) or 0 in shape:
            raise ValueError(f"no topology '{name}': a {g.name} slice has {len(g.pod)} dimensions, {example}")
        if any(n > most for n, most in zip(sorted(shape), sorted(g.pod), strict=True)):
            raise ValueError(
                f"no topology '{name}': a {g.name} pod has {_grid(g.pod)} chips; for several add --slices N"
            )
        return Topology(name, g, shape, slices)
    numbers = {_number(g, shape): shape for shape in g.shapes}
    if int(match[2]) in numbers:
        return Topology(name, g, numbers[int(match[2])], slices)
    of_each = f", {g.per_chip} a chip" if g.per_chip > 1 else ""
    counts = f"counts {g.counted}{of_each} and is one of {', '.join(map(str, numbers))}"
    raise ValueError(f"no topology '{name}': the number of a {g.name} slice {counts}; or give a grid, {example}")


def _number(g: Generation, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * g.per_chip


def _grid(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
