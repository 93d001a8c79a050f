"""Compiled programs read as text: how often each loop runs, what devices exchange, what goes to memory.

XLA's own figures count the body of a loop once. Here every instruction counts as often as the loops around it run.
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
# What moves nothing by itself: names for what is there already, and loops, whose insides are counted on their own.
_STILL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "opt-barrier", "async-start", "async-update", "domain"),
}
_WORK = ("fusion", "convolution", "dot", "while", "call", "conditional", "reduce", "sort")
_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollective", "ConcatBitcast", "Sharding", "SPMD")
_SLICES = ("dynamic-slice", "slice", "gather")
# What goes between slices is sent through the hosts, by a runtime that has names of its own for it.
_TRANSFERS = {
    **{"ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter"},
    **{"ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute"},
}
_NAMES = re.compile(r"%([\w.\-]+)")
_ARRAYS = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    kind: str  # its result's type, with layouts
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes
    root: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal exchanges of one program."""

    op: str
    axis: str  # of the mesh; several are joined by "+"
    bytes: int  # of one, on one device: the whole array that is gathered, reduced or moved
    in_loop: bool
    count: int  # times a step
    overlapped: bool = False  # whether the program computes between its start and its end


class Program:
    """The text of an optimised module, taken apart."""

    def __init__(self, text: str):
        """Read `compiled.as_text()`."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, here = "", []
        for line in text.splitlines():
            if (head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$", line)) and not line.startswith(" "):
                here = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif (found := _instruction(line)) is not None:
                here.append(found)
        self.kinds = {name: {i.name: i.kind for i in body} for name, body in self.computations.items()}
        self.times: dict[str, int] = {}  # executions of each computation in one step; those of fusions' too
        self.looped: set[str] = set()
        self.moving: set[str] = set()  # computations whose instructions run one by one, not as part of a fusion
        self._visit(self.entry, 1, False, True)

    def _visit(self, name: str, times: int, looped: bool, moving: bool) -> None:
        self.times[name] = self.times.get(name, 0) + times
        if looped:
            self.looped.add(name)
        if moving:
            self.moving.add(name)
        for i in self.computations.get(name, []):
            if i.op == "while":
                trips = self.trips(i, self.computations[name])
                for part in re.findall(r"\b(?:body|condition)=%?([\w.\-]+)", i.rest):
                    self._visit(part, times * trips, True, moving)
            elif i.op in ("call", "conditional"):
                for part in _called(i):
                    self._visit(part, times, looped, moving)
            elif i.op in ("fusion", "async-start"):
                for part in _called(i):
                    self._visit(part, times, looped, False)

    def trips(self, loop: Instruction, around: list[Instruction]) -> int:
        """Of a `while`: what the compiler says, or what follows from its counter's bound, step and start.

        Args:
            loop: the instruction.
            around: the computation that it stands in.
        """
        if known := re.search(r'known_trip_count\\?"?[:=]\s*\{\\?"?n\\?"?:\s*\\?"?(\d+)', loop.rest):
            return int(known[1])
        parts = dict(re.findall(r"\b(body|condition)=%?([\w.\-]+)", loop.rest))
        condition, body = (self.computations.get(parts.get(name, ""), []) for name in ("condition", "body"))
        numbers = _constants(condition)
        places = {i.name: int(m[1]) for i in condition if (m := re.search(r"\bindex=(\d+)", i.rest))}
        compared = next((i for i in condition if i.root and i.op == "compare"), None)
        if compared is None:  # hidden in a fusion: its bound is the only large number there
            inside = [
                value for i in condition for c in _called(i) for value in _constants(self.computations[c]).values()
            ]
            return max([*numbers.values(), *inside], default=1)
        bound = next((numbers[o] for o in compared.operands if o in numbers), 1)
        counter = next((places[o] for o in compared.operands if o in places), -1)
        step = _step(body, counter)
        start = _element(around, loop.operands[0], counter)
        return max(-(-(bound - _constants(around).get(start, 0)) // step), 1)

    def collectives(self, mesh: Mapping[str, int], ids: Sequence[int] = ()) -> list[Collective]:
        """All exchanges between devices, equal ones together, the largest in sum first.

        Args:
            mesh: axis name -> devices, in the order in which the mesh's devices are numbered.
            ids: the devices' own, in that order; what goes between slices is known by them alone.
        """
        numbers = {own: number for number, own in enumerate(ids)}
        found: dict[Collective, int] = {}

        def add(one: Collective, name: str, overlapped: bool) -> None:
            one = dataclasses.replace(one, in_loop=name in self.looped, overlapped=overlapped)
            found[one] = found.get(one, 0) + self.times[name]

        for name, body in self.computations.items():
            begins = any("AsyncCollectiveStart" in i.rest for i in body)
            for place, i in enumerate(body):
                op = i.op.removesuffix("-start")
                if op == "send" and name in self.times and (sent := self._sent(i, body, mesh, numbers)):
                    back = next((n for n, r in enumerate(body) if r.op == "recv" and _meets(i, r)), place)
                    add(sent, name, self._computes(body, back))
                if op not in COLLECTIVES or name not in self.times:
                    continue
                if "chain_id=" in i.rest and not begins:
                    continue  # it overlaps with products: the fusions that carry and end it name it again
                axis = axis_of(groups(i.rest, math.prod(mesh.values())), mesh)
                if not axis:
                    continue
                if op == "all-reduce" and name.startswith("all-reduce-scatter"):
                    op = "reduce-scatter"  # how a TPU's program spells it: a fusion that keeps a slice of the sum
                one = Collective(op, axis, self._exchanged(name, i), False, 0)
                add(one, name, begins or self._computes(body, place))
        rows = [dataclasses.replace(collective, count=count) for collective, count in found.items()]
        return sorted(rows, key=lambda c: -c.bytes * c.count)

    def _computes(self, body: list[Instruction], place: int) -> bool:
        """Whether anything is computed between an exchange's start, an instruction of a scheduled body, and its end."""
        started = body[place]
        if not started.op.endswith(("-start", "send", "recv")):
            return False
        handed, end = {started.name}, len(body)
        for later in range(place + 1, len(body)):
            i = body[later]
            if handed & set(i.operands):
                if i.op.endswith("-done"):
                    end = later
                    break
                handed.add(i.name)
        return any(i.op in _WORK for i in body[place + 1 : end])

    @staticmethod
    def _sent(
        i: Instruction, body: list[Instruction], mesh: Mapping[str, int], numbers: Mapping[int, int]
    ) -> Collective | None:
        """What a `send` of the runtime between slices exchanges, with the `recv` that belongs to it."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
        target = re.search(r'_xla_megascale_target=(?:"([^"]*)"|\{(\{.*?\})\})', i.rest)
        if kind is None or target is None:
            return None
        back = [r for r in body if r.op == "recv" and _meets(i, r)]
        moved = max(size(x.kind.replace("u32[]", "")) for x in [i, *back])
        exchanging = [[numbers[n] for n in group if n in numbers] for group in between(target[1], target[2])]
        axis = axis_of(iter([group for group in exchanging if group]), mesh)
        return Collective(_TRANSFERS.get(kind[1], kind[1].lower()), axis, moved, False, 0) if axis else None

    def _exchanged(self, computation: str, i: Instruction) -> int:
        result = size(i.kind.replace("u32[]", ""))  # without what a start hands on to its end
        operands = sum(size(self.kinds[computation].get(o, "")) for o in i.operands)
        if i.op == "all-reduce-start":
            return result
        if i.op.endswith("-start"):  # its result holds its operands too
            result -= operands
        return max(result, operands)

    def traffic(self) -> int:
        """Bytes that the program reads from and writes to the device's main memory in one step.

        Of a fusion's operands only what it reads of them; of an update in place only the update. Arrays that the
        compiler put into on-chip memory, S(1) in their layout, are no traffic.
        """
        return sum(
            self.times[name] * sum(self._moved(name, i) for i in self.computations[name]) for name in self.moving
        )

    def _moved(self, computation: str, i: Instruction) -> int:
        if i.op in _STILL or i.op.endswith("-done"):
            return 0
        kinds = self.kinds[computation]
        if i.op == "custom-call" and re.search(rf'custom_call_target="(?:{"|".join(_CALLS)})', i.rest):
            return 0
        if i.op == "copy-start":  # (destination, source, context)
            return size(i.kind, memory=True)
        if i.op == "slice-start":  # ((source), destination, context): read from memory, to on-chip memory
            return size(i.kind) - sum(size(kinds.get(o, "")) for o in i.operands)
        inner = self.computations.get(next(iter(_called(i)), ""), []) if i.op == "fusion" else []
        if any("chain_id=" in x.rest for x in inner):
            return self._carried(i, inner, kinds)
        reads, in_place = 0, False
        for number, operand in enumerate(i.operands):
            kind = kinds.get(operand, "")
            if not (whole := size(kind, memory=True)):
                continue
            if i.op in _SLICES and number == 0:
                reads += size(i.kind)
            elif i.op == "dynamic-update-slice" and number == 0:
                in_place = True
            elif inner:
                read, updated = self._read_of(inner, number, whole)
                reads, in_place = reads + read, in_place or updated
            else:
                reads += whole
        if not in_place:
            return reads + size(i.kind, memory=True)
        body = inner or [i]
        kept = {x.name: x.kind for x in body} if inner else kinds
        updates = [x for x in body if x.op == "dynamic-update-slice"]
        return reads + sum(size(kept.get(x.operands[1], "")) for x in updates)

    def _carried(self, i: Instruction, body: list[Instruction], kinds: Mapping[str, str]) -> int:
        """What a fusion moves that carries an exchange beside its own work: of the exchange itself, which is handed
        from fusion to fusion, only the operand where it starts and the result where it ends.
        """
        root = next(x for x in body if x.root)
        exchange = {x.name for x in body if "chain_id=" in x.rest}
        begins, inside = any("AsyncCollectiveStart" in x.rest for x in body), {x.name: x.kind for x in body}
        moved, handed = 0, set(exchange)
        for x in body:
            if x.op != "parameter":
                continue
            users, number = [u for u in body if x.name in u.operands], int(x.operands[0])
            whole = size(kinds.get(i.operands[number], ""), memory=True)
            if not all(u.name in exchange or u.op in ("tuple", "custom-call") for u in users):
                moved += self._read_of(body, number, whole)[0]
                continue
            handed.add(x.name)
            moved += whole if begins and any(u.name in exchange for u in users) else 0
        if root.op == "tuple":
            return moved + sum(size(inside[name], memory=True) for name in root.operands if name not in handed)
        return moved + (0 if begins else size(i.kind, memory=True))

    @staticmethod
    def _read_of(body: list[Instruction], number: int, whole: int) -> tuple[int, bool]:
        """What a fusion reads of its operand with that number, and whether it updates it in place."""
        names = [i.name for i in body if i.op == "parameter" and i.operands[:1] == (str(number),)]
        if not names:
            return whole, False
        waiting, read, updated = names, 0, False
        while waiting:
            name = waiting.pop()
            for i in body:
                if name not in i.operands:
                    continue
                if i.op == "bitcast":
                    waiting.append(i.name)
                elif i.op in _SLICES and i.operands[0] == name:
                    read += size(i.kind)
                elif i.op == "dynamic-update-slice" and i.operands[0] == name:
                    updated = True
                else:
                    return whole, False
        return min(read, whole), updated


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if start is None:
        return None
    rest = line[start.end() :]
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    op, inside = rest[:opening], rest[opening + 1 : closing]
    operands = tuple(_NAMES.findall(inside)) or tuple(filter(None, [inside.strip()]))
    return Instruction(start[2], kind, op, operands, rest[closing + 1 :], bool(start[1]))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def _meets(sent: Instruction, received: Instruction) -> bool:
    """Whether two transfers through the hosts are the two ways of one exchange."""
    meeting = re.search(r'_xla_host_transfer_rendezvous="[^"]*"', sent.rest)
    return meeting is not None and meeting[0] in received.rest


def _constants(body: list[Instruction]) -> dict[str, int]:
    whole = [i for i in body if i.op == "constant" and re.match(r"[su]\d+\[\]", i.kind)]
    return {i.name: int(i.operands[0]) for i in whole if re.fullmatch(r"-?\d+", i.operands[0])}


def _element(body: list[Instruction], name: str, place: int) -> str:
    """The name of a tuple's element, copies looked through."""
    named = {i.name: i for i in body}
    found = named.get(name)
    if found is None or found.op != "tuple" or not 0 <= place < len(found.operands):
        return ""
    element = found.operands[place]
    while element in named and named[element].op in ("copy", "bitcast"):
        element = named[element].operands[0]
    return element


def _step(body: list[Instruction], counter: int) -> int:
    """By how much a loop's body moves its counter; 1 where that does not show."""
    root = next((i.name for i in body if i.root), "")
    named, numbers = {i.name: i for i in body}, _constants(body)
    moved = named.get(_element(body, root, counter))
    return next((numbers[o] for o in moved.operands if o in numbers), 1) if moved and moved.op == "add" else 1


def _called(i: Instruction) -> list[str]:
    pattern = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
    return re.findall(pattern, i.rest) + (_NAMES.findall(branches[1]) if branches else [])


def size(kind: str, memory: bool = False) -> int:
    """Bytes of a type such as "(f32[8,128]{1,0:T(8,128)}, s32[])"; with `memory`, of what lies in main memory only."""
    total = 0
    for dtype, dimensions, layout in _ARRAYS.findall(kind):
        if memory and (space := re.search(r"S\((\d+)\)", layout)) and space[1] != "0":
            continue
        bits = _BITS.get(dtype) if dtype in _BITS else int((re.search(r"\d+", dtype) or ["0"])[0])
        total += -(-math.prod(map(int, filter(None, dimensions.split(",")))) * (bits or 0) // 8)
    return total
