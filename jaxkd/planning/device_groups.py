"""Which devices communicate with which, from the attributes of a compiled program's instructions."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

_SLICE_STRIDE = 100_000  # with several slices a device's id is this times its slice (from 1) plus its index there


def groups(attributes: str, devices: int) -> Iterator[list[int]]:
    """Groups of device numbers that communicate, from an instruction's attributes; all devices when none are given."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        yield from _lists(pairs[1] + "}")
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        yield from _iota(iota[2]).reshape(int(iota[1].partition(",")[0]), -1).tolist()
    elif named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes):
        yield from _of_mesh(*named.groups())
    elif listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        yield from _lists(listed[1])
    else:
        yield list(range(devices))


def _iota(text: str) -> np.ndarray:
    """XLA's "[4,2]T(1,0)": 0 to 7 in that shape, then transposed."""
    dims, permutation = re.findall(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)[0]
    shape = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in permutation.split(",")]) if permutation else ids


def _of_mesh(sizes: str, order: str | None, axes: str) -> list[list[int]]:
    """Groups along axes of a mesh that the compiler spells: "'a'=2,'b'=4", perhaps "[4,2]T(1,0)", then "'b'".

    A part of an axis is written 'x':(before)size: of 'x'=8 the groups along 'x':(4)2 are the neighbours.
    """
    names, extents = zip(*re.findall(r"'([^']+)'=(\d+)", sizes), strict=True)
    dims = [int(n) for n in extents]
    ids = _iota(order) if order else np.arange(math.prod(dims))
    shape, varying = [], []
    parts = {name: (before, part) for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, extent in zip(names, dims, strict=True):
        before, part = (int(n or 0) for n in parts.get(name, ("1", "1")))
        before, part = before or 1, part or extent  # a whole axis has neither
        shape += [before, part, extent // before // part]
        varying += [len(shape) - 2] if name in parts else []
    ids = ids.reshape(shape)
    fixed = [d for d in range(ids.ndim) if d not in varying]
    return ids.transpose([*fixed, *varying]).reshape(-1, math.prod(shape[d] for d in varying)).tolist()


def between(product: str | None, listed: str | None) -> list[list[int]]:
    """Groups of device ids across slices: "{1,2}x{0:3}" pairs equal indices of the slices; else lists, or "{1->2}"."""
    if listed is not None:
        return list(_lists(listed.replace("->", ",")))
    slices, indices = ([], []) if product is None else (_expanded(part) for part in product.split("x"))
    return [[_SLICE_STRIDE * s + index for s in slices] for index in indices]


def _expanded(text: str) -> list[int]:
    """ "{0:2,5}" is 0, 1, 2 and 5."""
    ends = [part.split(":") for part in text.strip("{}").split(",") if part]
    return [n for part in ends for n in range(int(part[0]), int(part[-1]) + 1)]


def _lists(text: str) -> Iterator[list[int]]:
    for inner in re.findall(r"\{([\d,]+)\}", text):
        yield [int(n) for n in inner.split(",")]


def axis_of(groups: Iterable[list[int]], mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the members of the groups differ, joined by "+"; empty for groups of one."""
    shape = tuple(mesh.values())
    varying = np.zeros(len(shape), bool)
    for group in groups:
        coordinates = np.asarray(np.unravel_index(group, shape))
        varying |= (coordinates != coordinates[:, :1]).any(axis=1)
    return "+".join(name for name, varies in zip(mesh, varying, strict=True) if varies)
