"""What a TPU's compiler says when it refuses a program for want of memory: which memory, how much, for what."""

import re
from typing import NamedTuple

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_FIGURES = tuple(
    re.compile(pattern.replace("SIZE", _SIZE))
    for pattern in (
        r"\(SIZE\) exceeds available HBM \(SIZE\)",
        r"Used SIZE of SIZE",
        r"allocation with size SIZE and limit SIZE",
    )
)
_BOTH_CORES = re.compile(f"TensorCore Hbm usage: {_SIZE}, SparseCore Hbm usage:? {_SIZE}, exceeding available bytes")


class Refused(ValueError):
    """A step that was not compiled for want of another memory than the device's main one."""


class Refusal(NamedTuple):
    """Out of memory, in numbers."""

    space: str  # "hbm", or one of a core's own, such as "vmem" and "smem"; empty where that is not said
    used: int | None = None  # bytes that the program would take of it, None where that is not said
    limit: int | None = None
    temporaries: bool = False  # whether a program's arguments come on top of `used`
    place: str = ""  # the instruction that asked for it


def read(message: str) -> Refusal:
    """The compiler's refusal, taken apart.

    Args:
        message: of a RESOURCE_EXHAUSTED.
    """
    found = re.search(r"in memory space (\w+)|on (HBM)\b|available (HBM)\b|scoped (\w+) limit", message)
    space = next(filter(None, found.groups()), "").lower() if found else ""
    place = re.search(r"while allocating on stack for %?([\w.\-]+)", message)
    if both := _BOTH_CORES.search(message):
        return Refusal("hbm", _bytes(both[1], both[2]) + _bytes(both[3], both[4]))
    numbers = next(filter(None, (figures.search(message) for figures in _FIGURES)), None)
    used, limit = (_bytes(numbers[1], numbers[2]), _bytes(numbers[3], numbers[4])) if numbers else (None, None)
    return Refusal(space, used, limit, "HLO temporaries" in message, place[1] if place else "")


def sentence(refusal: Refusal, message: str) -> str:
    """What to say of a refusal that the size of the job does not explain.

    Args:
        refusal: what was read.
        message: what it was read from.
    """
    r = refusal
    if r.space in ("", "hbm"):
        first = message.strip().splitlines()[0]
        return f"the compiler ran out of memory and did not say of which, or how much: {first}"
    mebi = lambda number: f"{number / 2**20:.2f} MiB"
    asked = f"{mebi(r.used)} of {mebi(r.limit)}" if r.used and r.limit else "more than there is"
    flag = ", or --xla_tpu_scoped_vmem_limit_kib in LIBTPU_INIT_ARGS" if r.space == "vmem" else ""
    return (
        f"the compiler ran out of {r.space}, a core's own memory, and not of HBM: {r.place or 'a kernel'} wants "
        f"{asked}. That is not the size of the job: change the kernel's tiles{flag}"
    )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
