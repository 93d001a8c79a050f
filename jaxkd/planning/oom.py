"""Parses the TPU compiler's out-of-memory errors: which memory, how many bytes, for which instruction."""

import re
from typing import NamedTuple

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_FIGURES = (
    *(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", rf"Used {_SIZE} of {_SIZE}"),
    rf"allocation with size {_SIZE} and limit {_SIZE}",
)
_BOTH_CORES = f"TensorCore Hbm usage: {_SIZE}, SparseCore Hbm usage:? {_SIZE}, exceeding available bytes"


class OnChipOom(ValueError):
    """A step that does not compile because a kernel needs more on-chip memory (VMEM, SMEM) than there is."""


class Oom(NamedTuple):
    """A parsed RESOURCE_EXHAUSTED message."""

    space: str  # "hbm", or on-chip memory such as "vmem" and "smem"; empty if the message does not name it
    used: int | None = None  # bytes that the program needs of it, None if the message does not say
    limit: int | None = None
    temporaries: bool = False  # whether `used` is without the program's arguments
    instruction: str = ""  # that asked for it


def read(message: str) -> Oom:
    """Parse the message of a RESOURCE_EXHAUSTED error."""
    spaces = re.search(r"in memory space (\w+)|on (HBM)\b|available (HBM)\b|scoped (\w+) limit", message)
    space = next(filter(None, spaces.groups()), "").lower() if spaces else ""
    instruction = re.search(r"while allocating on stack for %?([\w.\-]+)", message)
    if both := re.search(_BOTH_CORES, message):
        return Oom("hbm", _bytes(both[1], both[2]) + _bytes(both[3], both[4]))
    numbers = next(filter(None, (re.search(figures, message) for figures in _FIGURES)), None)
    used, limit = (_bytes(numbers[1], numbers[2]), _bytes(numbers[3], numbers[4])) if numbers else (None, None)
    return Oom(space, used, limit, "HLO temporaries" in message, instruction[1] if instruction else "")


def sentence(oom: Oom, message: str) -> str:
    """One line for an error that a smaller job does not mend: on-chip memory, or an unreadable `message`."""
    if oom.space in ("", "hbm"):
        return (
            f"the compiler ran out of memory and did not say of which, or how much: {message.strip().splitlines()[0]}"
        )
    mebi = lambda number: f"{number / 2**20:.2f} MiB"
    amount = f"{mebi(oom.used)} of {mebi(oom.limit)}" if oom.used and oom.limit else "more than there is"
    flag = ", or --xla_tpu_scoped_vmem_limit_kib in LIBTPU_INIT_ARGS" if oom.space == "vmem" else ""
    needs = f"{oom.instruction or 'a kernel'} needs {amount}"
    return f"out of {oom.space}, on-chip memory: {needs}. A smaller job does not help: change the kernel's tiles{flag}"


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
