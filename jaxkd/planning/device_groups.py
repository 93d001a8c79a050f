"""Which devices exchange with which, from the attributes of a compiled program's instructions."""

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_OF_SLICE = 100_000  # a device's id, where there are several slices: this times its slice, from 1, and its place there


def groups(attributes: str, devices: int) -> Iterator[list[int]]:
    """The groups of devices that exchange with each other, from an instruction's attributes."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        yield from _lists(pairs[1] + "}")
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        yield from ids.reshape(shape[0], -1).tolist()
    elif named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes):
        yield from _of_mesh(*named.groups())
    elif (listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes)) is not None:
        yield from _lists(listed[1])
    else:
        yield list(range(devices))


def _of_mesh(sizes: str, order: str | None, axes: str) -> list[list[int]]:
    """Groups that vary along axes of a mesh of the compiler's own: "'a'=2,'b'=4", perhaps "[4,2]T(1,0)", "'b'"."""
    names, extents = zip(*re.findall(r"'([^']+)'=(\d+)", sizes), strict=True)
    dims = [int(n) for n in extents]
    ids = np.arange(math.prod(dims))
    if order and (found := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)):
        ids = ids.reshape([int(n) for n in found[1].split(",")])
        if found[2]:
            ids = ids.transpose([int(n) for n in found[2].split(",")])
    shape, varying = [], []
    parts = {name: (before, part) for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, extent in zip(names, dims, strict=True):
        before, part = (int(n or 0) for n in parts.get(name, ("1", "1")))
        before, part = before or 1, part or extent  # a whole axis has neither
        shape += [before, part, extent // before // part]
        varying += [len(shape) - 2] if name in parts else []
    ids = ids.reshape(shape)
    still = [d for d in range(ids.ndim) if d not in varying]
    return ids.transpose([*still, *varying]).reshape(-1, math.prod(shape[d] for d in varying)).tolist()


def between(product: str | None, listed: str | None) -> list[list[int]]:
    """Groups of devices in several slices: "{1,2}x{0:3}" is each with its like, else lists, or pairs "{1->2}"."""
    if listed is not None:
        return list(_lists(listed.replace("->", ",")))
    slices, places = ([], []) if product is None else (_expanded(part) for part in product.split("x"))
    return [[_OF_SLICE * s + place for s in slices] for place in places]


def _expanded(text: str) -> list[int]:
    """ "{0:2,5}" is 0, 1, 2 and 5."""
    ends = [part.split(":") for part in text.strip("{}").split(",") if part]
    return [n for part in ends for n in range(int(part[0]), int(part[-1]) + 1)]


def _lists(text: str) -> Iterator[list[int]]:
    for inner in re.findall(r"\{([\d,]+)\}", text):
        yield [int(n) for n in inner.split(",")]


def axis_of(exchanging: Iterator[list[int]], mesh: Mapping[str, int]) -> str:
    """The mesh axes along which groups of devices lie, joined by "+"; empty for groups of one."""
    shape = tuple(mesh.values())
    varying = np.zeros(len(shape), bool)
    for group in exchanging:
        places = np.asarray(np.unravel_index(group, shape))
        varying |= (places != places[:, :1]).any(axis=1)
    return "+".join(name for name, varies in zip(mesh, varying, strict=True) if varies)
