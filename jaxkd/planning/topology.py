"""TPU slices by name: their shapes, hosts and devices."""

import math
import re
from typing import Any, NamedTuple

from jaxkd.core.chips import CHIPS, Chip


class Generation(NamedTuple):
    """What a slice of some TPUs may be, and what the number in its name counts."""

    name: str  # as libtpu spells it
    aliases: tuple[str, ...]
    kind: str  # JAX's `device_kind`
    shapes: tuple[tuple[int, ...], ...]  # those that a number names
    counted: str  # what that number counts
    per_chip: int = 1  # of those
    devices_per_chip: int = 1


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    *((8, 8, 16), (8, 16, 16), (16, 16, 16)),
)


GENERATIONS = (
    Generation("v4", (), "TPU v4", _CUBES, "TensorCores", 2),
    Generation("v5e", ("v5litepod",), "TPU v5 lite", _FLAT, "chips"),
    Generation("v5p", (), "TPU v5", _CUBES, "TensorCores", 2),
    Generation("v6e", (), "TPU v6 lite", _FLAT, "chips"),
    Generation("tpu7x", ("v7x",), "TPU7x", _CUBES, "TensorCores", 2, 2),
)


_ON_ONE_HOST = 8  # chips of a flat slice that one machine can hold; larger ones have four a machine


class Topology(NamedTuple):
    """A slice: chips in a grid, every one linked to its neighbours. Or several, which talk over the network."""

    asked: str
    generation: Generation
    shape: tuple[int, ...]  # of one
    slices: int = 1

    @property
    def name(self) -> str:
        """Of one slice, as libtpu spells it."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """One JAX device of it."""
        return CHIPS[self.generation.kind]

    @property
    def chips(self) -> int:
        """In all."""
        return math.prod(self.shape) * self.slices

    @property
    def hosts(self) -> int:
        """Machines that run a process each."""
        flat, chips = len(self.shape) == 2, math.prod(self.shape)
        return self.slices if chips <= (_ON_ONE_HOST if flat else 4) else self.chips // 4

    @property
    def devices(self) -> int:
        """As `jax.devices()` counts them."""
        return self.chips * self.generation.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Per dimension, whether the last chip is linked to the first: whole pods, and multiples of 4 x 4 x 4."""
        if len(self.shape) == 2:
            return tuple(n == 16 for n in self.shape)
        return (all(n % 4 == 0 for n in self.shape),) * 3

    @property
    def options(self) -> dict[str, Any]:
        """What `jax.experimental.topologies.get_topology_desc` needs to know beside the name."""
        more: dict[str, Any] = {"chip_config_name": "megacore"} if self.generation.name == "v4" else {}
        more |= {"chips_per_host_bounds": (1, 1, 1)} if math.prod(self.shape) == 1 else {}
        return more | ({"num_slices": self.slices} if self.slices > 1 else {})

    def sentence(self) -> str:
        """Chips, hosts and devices, and where a number could be taken for another what it counts."""
        g, plural = self.generation, lambda n, what: f"{n:,} {what}{'' if n == 1 else 's'}"
        counts = [plural(self.chips, "chip"), plural(self.hosts, "host"), plural(self.devices, "JAX device")]
        times = f"{self.slices} x " if self.slices > 1 else ""
        said = f"{times}{self.name}: {', '.join(counts)}"
        if g.per_chip > 1 and "-" in self.asked and "x" not in self.asked.rpartition("-")[2]:
            said += f" (the number in {self.asked} counts {g.counted}, {g.per_chip} a chip, not chips)"
        return said


def topology(name: str, slices: int = 1) -> Topology:
    """The slice of a name, such as "v5litepod-256", "v5p-128", "v6e-64", "tpu7x-4x4x4" or "v5e:16x16".

    Args:
        name: of one slice.
        slices: how many of them.

    Raises:
        ValueError: for a generation that is not known, or a size that it does not come in.
    """
    if slices < 1:
        raise ValueError(f"--slices {slices}: there must be at least 1")
    generations = {alias: g for g in GENERATIONS for alias in (g.name, *g.aliases)}
    match = re.fullmatch(r"([a-z0-9]+)[-:=](\d+(?:x\d+)*)", name.strip().lower())
    if match is None or match[1] not in generations:
        known = ", ".join(f"{g.name}-{_number(g, g.shapes[3])}" for g in GENERATIONS)
        raise ValueError(
            f"no topology '{name}': give a generation and a size, such as {known} or v5litepod-256, or a grid of chips "
            "such as v5e:16x16 or v5p:4x4x8"
        )
    g = generations[match[1]]
    if "x" in match[2]:
        shape = tuple(map(int, match[2].split("x")))
        if len(shape) != len(g.shapes[0]) or 0 in shape:
            raise ValueError(f"no topology '{name}': a {g.name} slice has {len(g.shapes[0])} dimensions, {_grids(g)}")
        return Topology(name, g, shape, slices)
    for shape in g.shapes:
        if _number(g, shape) == int(match[2]):
            return Topology(name, g, shape, slices)
    numbers = ", ".join(str(_number(g, shape)) for shape in g.shapes)
    of_each = f", {g.per_chip} a chip" if g.per_chip > 1 else ""
    raise ValueError(
        f"no topology '{name}': the number of a {g.name} slice counts {g.counted}{of_each} and is one of {numbers}; "
        f"another grid of chips is given as such, {_grids(g)}"
    )


def _number(g: Generation, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * g.per_chip


def _grids(g: Generation) -> str:
    return f"such as {g.name}:{'x'.join(map(str, g.shapes[3]))}"
