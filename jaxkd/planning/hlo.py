"""Reads optimised HLO text: trip counts of loops, collectives, and bytes moved to and from HBM.

XLA's cost analysis counts a loop's body once; here an instruction counts once per execution.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxkd.planning.device_groups import axis_of, between, groups

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
)
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
# No memory traffic of their own: aliases, and control flow, whose computations are counted by themselves.
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "opt-barrier", "async-start", "async-update", "domain"),
}
_WORK = ("fusion", "convolution", "dot", "while", "call", "conditional", "reduce", "sort")
_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollective", "ConcatBitcast", "Sharding", "SPMD")
_SLICES = ("dynamic-slice", "slice", "gather")
# Transfers between slices go through the hosts; the megascale runtime has its own names for them.
_TRANSFERS = {
    **{"ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter"},
    **{"ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute"},
}
_NAMES = re.compile(r"%([\w.\-]+)")
_ARRAYS = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str  # of its result, with layouts
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one program that are alike."""

    op: str
    axis: str  # of the mesh; several are joined by "+"
    bytes: int  # on one device, of one execution: the whole array that is gathered, reduced or moved
    in_loop: bool
    count: int  # executions a step
    overlapped: bool = False  # whether compute is scheduled between its start and its end


class Program:
    """A parsed HLO module, of `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, body = "", []
        for line in text.splitlines():
            if (head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$", line)) and not line.startswith(" "):
                body = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif (instruction := _instruction(line)) is not None:
                body.append(instruction)
        self.types = {name: {i.name: i.type for i in lines} for name, lines in self.computations.items()}
        self.times: dict[str, int] = {}  # executions of each computation a step, those inside fusions too
        self.looped: set[str] = set()
        self.unfused: set[str] = set()  # computations whose instructions run one by one, not as part of a fusion
        self._visit(self.entry, 1, False, True)

    def _visit(self, name: str, times: int, looped: bool, unfused: bool) -> None:
        self.times[name] = self.times.get(name, 0) + times
        self.looped |= {name} if looped else set()
        self.unfused |= {name} if unfused else set()
        for i in self.computations.get(name, []):
            if i.op == "while":
                trips = self.trips(i, self.computations[name])
                for part in re.findall(r"\b(?:body|condition)=%?([\w.\-]+)", i.attributes):
                    self._visit(part, times * trips, True, unfused)
            elif i.op in ("call", "conditional", "fusion", "async-start"):
                for part in _called(i):
                    self._visit(part, times, looped, unfused and i.op in ("call", "conditional"))

    def trips(self, loop: Instruction, around: list[Instruction]) -> int:
        """Trip count of a `while` in `around`: annotated by the compiler, or from its counter's bound, step, start."""
        if annotated := re.search(r'known_trip_count\\?"?[:=]\s*\{\\?"?n\\?"?:\s*\\?"?(\d+)', loop.attributes):
            return int(annotated[1])
        parts = dict(re.findall(r"\b(body|condition)=%?([\w.\-]+)", loop.attributes))
        condition, body = (self.computations.get(parts.get(name, ""), []) for name in ("condition", "body"))
        constants = _constants(condition)
        indices = {i.name: int(m[1]) for i in condition if (m := re.search(r"\bindex=(\d+)", i.attributes))}
        compare = next((i for i in condition if i.root and i.op == "compare"), None)
        if compare is None:  # inside a fusion: the bound is the largest constant there
            fused = [n for i in condition for c in _called(i) for n in _constants(self.computations[c]).values()]
            return max([*constants.values(), *fused], default=1)
        bound = next((constants[o] for o in compare.operands if o in constants), 1)
        counter = next((indices[o] for o in compare.operands if o in indices), -1)
        start = _constants(around).get(_element(around, loop.operands[0], counter), 0)
        return max(-(-(bound - start) // _step(body, counter)), 1)

    def collectives(self, mesh: Mapping[str, int], ids: Sequence[int] = ()) -> list[Collective]:
        """All communication between devices, equal ones counted together, most bytes in total first.

        `ids` are those of the devices in the mesh's order; transfers between slices name devices by id.
        """
        numbers = {device_id: number for number, device_id in enumerate(ids)}
        counts: dict[Collective, int] = {}
        for name in self.times:
            body = self.computations.get(name, [])
            starts_async = any("AsyncCollectiveStart" in i.attributes for i in body)
            for index, i in enumerate(body):
                op = i.op.removesuffix("-start")
                if op == "send" and (transfer := self._transfer(i, body, mesh, numbers)):
                    op, axis, size_ = transfer
                    recv = next((n for n, r in enumerate(body) if r.op == "recv" and _same_transfer(i, r)), index)
                    overlapped = self._overlaps(body, recv)
                elif op in COLLECTIVES and (starts_async or "chain_id=" not in i.attributes):
                    # One with a chain_id is overlapped, and named again in the fusions that carry and end it.
                    axis, size_ = axis_of(groups(i.attributes, math.prod(mesh.values())), mesh), self._bytes(name, i)
                    overlapped = starts_async or self._overlaps(body, index)
                    if op == "all-reduce" and name.startswith("all-reduce-scatter"):
                        op = "reduce-scatter"  # on TPUs a fusion that keeps a slice of the sum
                else:
                    continue
                if axis:
                    one = Collective(op, axis, size_, name in self.looped, 0, overlapped)
                    counts[one] = counts.get(one, 0) + self.times[name]
        rows = [dataclasses.replace(one, count=count) for one, count in counts.items()]
        return sorted(rows, key=lambda c: -c.bytes * c.count)

    def _overlaps(self, body: list[Instruction], index: int) -> bool:
        """Whether compute is scheduled between the start of an asynchronous instruction and its `-done`."""
        start = body[index]
        if not start.op.endswith(("-start", "send", "recv")):
            return False
        aliases, end = {start.name}, len(body)
        for later in range(index + 1, len(body)):
            i = body[later]
            if aliases & set(i.operands):
                if i.op.endswith("-done"):
                    end = later
                    break
                aliases.add(i.name)
        return any(i.op in _WORK for i in body[index + 1 : end])

    @staticmethod
    def _transfer(
        i: Instruction, body: list[Instruction], mesh: Mapping[str, int], numbers: Mapping[int, int]
    ) -> tuple[str, str, int] | None:
        """Operation, axis and bytes of a `send` between slices with its `recv`; None for another send."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
        target = re.search(r'_xla_megascale_target=(?:"([^"]*)"|\{(\{.*?\})\})', i.attributes)
        if kind is None or target is None:
            return None
        both = [i, *(r for r in body if r.op == "recv" and _same_transfer(i, r))]
        members = [[numbers[n] for n in group if n in numbers] for group in between(target[1], target[2])]
        axis = axis_of([group for group in members if group], mesh)
        return _TRANSFERS.get(kind[1], kind[1].lower()), axis, max(size(x.type.replace("u32[]", "")) for x in both)

    def _bytes(self, computation: str, i: Instruction) -> int:
        result = size(i.type.replace("u32[]", ""))  # without the context that a start passes to its end
        operands = sum(size(self.types[computation].get(o, "")) for o in i.operands)
        if i.op == "all-reduce-start":
            return result
        if i.op.endswith("-start"):  # its result includes its operands
            result -= operands
        return max(result, operands)

    def traffic(self) -> int:
        """Bytes read from and written to a device's HBM in one step.

        A fusion counts the slices that it reads of its operands, an update in place only the update. Arrays in
        on-chip memory, S(1) in their layout, do not count.
        """
        return sum(self.times[name] * self._moved(name, i) for name in self.unfused for i in self.computations[name])

    def _moved(self, computation: str, i: Instruction) -> int:
        if i.op in _NO_TRAFFIC or i.op.endswith("-done"):
            return 0
        types = self.types[computation]
        if i.op == "custom-call" and re.search(rf'custom_call_target="(?:{"|".join(_CALLS)})', i.attributes):
            return 0
        if i.op == "copy-start":  # (destination, source, context)
            return size(i.type, memory=True)
        if i.op == "slice-start":  # ((source), destination, context), from HBM to on-chip memory
            return size(i.type) - sum(size(types.get(o, "")) for o in i.operands)
        fused = self.computations.get(next(iter(_called(i)), ""), []) if i.op == "fusion" else []
        if any("chain_id=" in x.attributes for x in fused):
            return self._moved_beside_collective(i, fused, types)
        reads, in_place = 0, False
        for number, operand in enumerate(i.operands):
            whole = size(types.get(operand, ""), memory=True)
            if not whole:
                continue
            if i.op in _SLICES and number == 0:
                reads += size(i.type)
            elif i.op == "dynamic-update-slice" and number == 0:
                in_place = True
            elif fused:
                read, updated = self._read_of(fused, number, whole)
                reads, in_place = reads + read, in_place or updated
            else:
                reads += whole
        if not in_place:
            return reads + size(i.type, memory=True)
        inner_types = {x.name: x.type for x in fused} if fused else types
        updates = [x for x in fused or [i] if x.op == "dynamic-update-slice"]
        return reads + sum(size(inner_types.get(x.operands[1], "")) for x in updates)

    def _moved_beside_collective(self, i: Instruction, body: list[Instruction], types: Mapping[str, str]) -> int:
        """Bytes of a fusion that carries a collective beside its own work.

        The collective is passed from fusion to fusion: only its operand where it starts and its result where it ends
        count.
        """
        root = next(x for x in body if x.root)
        collective = {x.name for x in body if "chain_id=" in x.attributes}
        starts, inside = any("AsyncCollectiveStart" in x.attributes for x in body), {x.name: x.type for x in body}
        moved, passed_on = 0, set(collective)
        for x in body:
            if x.op != "parameter":
                continue
            users, number = [u for u in body if x.name in u.operands], int(x.operands[0])
            whole = size(types.get(i.operands[number], ""), memory=True)
            if not all(u.name in collective or u.op in ("tuple", "custom-call") for u in users):
                moved += self._read_of(body, number, whole)[0]
                continue
            passed_on.add(x.name)
            moved += whole if starts and any(u.name in collective for u in users) else 0
        if root.op == "tuple":
            return moved + sum(size(inside[name], memory=True) for name in root.operands if name not in passed_on)
        return moved + (0 if starts else size(i.type, memory=True))

    def _read_of(self, body: list[Instruction], number: int, whole: int) -> tuple[int, bool]:
        """Bytes that a fusion reads of an operand, at most `whole`, and whether it updates it in place."""
        names = [i.name for i in body if i.op == "parameter" and i.operands[:1] == (str(number),)]
        if not names:
            return whole, False
        read, updated = 0, False
        while names:
            name = names.pop()
            for i in body:
                if name not in i.operands:
                    continue
                if i.op == "bitcast" and not i.root:
                    names.append(i.name)
                elif i.op in _SLICES and i.operands[0] == name:
                    read += size(i.type)
                elif i.op == "dynamic-update-slice" and i.operands[0] == name:
                    updated = True
                elif i.op == "fusion":  # inside another: a product's operand is often sliced in one of its own
                    inner = self.computations[_called(i)[0]]
                    parts = [self._read_of(inner, n, whole) for n, operand in enumerate(i.operands) if operand == name]
                    if any(changed for _, changed in parts):
                        return whole, False
                    read += sum(part for part, _ in parts)
                else:
                    return whole, False
        return min(read, whole), updated


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if start is None:
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    op, inside = rest[:opening], rest[opening + 1 : closing]
    operands = tuple(_NAMES.findall(inside)) or tuple(filter(None, [inside.strip()]))
    return Instruction(start[2], type_, op, operands, rest[closing + 1 :], bool(start[1]))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text)


def _same_transfer(send: Instruction, recv: Instruction) -> bool:
    rendezvous = re.search(r'_xla_host_transfer_rendezvous="[^"]*"', send.attributes)
    return rendezvous is not None and rendezvous[0] in recv.attributes


def _constants(body: list[Instruction]) -> dict[str, int]:
    integers = [i for i in body if i.op == "constant" and re.match(r"[su]\d+\[\]", i.type)]
    return {i.name: int(i.operands[0]) for i in integers if re.fullmatch(r"-?\d+", i.operands[0])}


def _element(body: list[Instruction], name: str, index: int) -> str:
    """The instruction behind element `index` of a tuple, copies and bitcasts removed; empty if it is not there."""
    by_name = {i.name: i for i in body}
    tuple_ = by_name.get(name)
    if tuple_ is None or tuple_.op != "tuple" or not 0 <= index < len(tuple_.operands):
        return ""
    element = tuple_.operands[index]
    while element in by_name and by_name[element].op in ("copy", "bitcast"):
        element = by_name[element].operands[0]
    return element


def _step(body: list[Instruction], counter: int) -> int:
    """The increment of a loop's counter, 1 where the body does not show it."""
    root = next((i.name for i in body if i.root), "")
    by_name, constants = {i.name: i for i in body}, _constants(body)
    update = by_name.get(_element(body, root, counter))
    return next((constants[o] for o in update.operands if o in constants), 1) if update and update.op == "add" else 1


def _called(i: Instruction) -> list[str]:
    pattern = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
    return re.findall(pattern, i.attributes) + (_NAMES.findall(branches[1]) if branches else [])


def size(type_: str, memory: bool = False) -> int:
    """Bytes of a type such as "(f32[8,128]{1,0:T(8,128)}, s32[])"; with `memory`, only those in main memory."""
    total = 0
    for dtype, dimensions, layout in _ARRAYS.findall(type_):
        if memory and (space := re.search(r"S\((\d+)\)", layout)) and space[1] != "0":
            continue
        bits = _BITS.get(dtype) if dtype in _BITS else int((re.search(r"\d+", dtype) or ["0"])[0])
        total += -(-math.prod(map(int, filter(None, dimensions.split(",")))) * (bits or 0) // 8)
    return total
