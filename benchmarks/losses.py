"""Time, memory and exactness of the fused loss, against bare matrix products, dense JAX and other libraries.

    python benchmarks/losses.py --quick --json

benchmarks/README.md says what each mode does and how to read its rows.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable

STARTED = time.monotonic()
QUICK_SECONDS = 30  # after which no further round begins
# glibc gives large arrays back to the system at once, and takes them again page by page, which is a part of what a user
# waits for, and of no interest to who works on a kernel. Read when a process begins; the peers' inherits them.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="one small shape, no peers, under a minute")
    mode.add_argument("--family", action="store_true", help="every divergence and transform at 1,024 x 32,000")
    mode.add_argument("--memory", action="store_true", help="compile large shapes for memory; nothing is run")
    mode.add_argument("--tpu", action="store_true", help="compile for TPUs: what fits, bytes moved, collectives")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of tables")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has trl or tunix; default: this one")
    parser.add_argument("--keep-memory", action="store_true", help="tell glibc to keep freed memory, peers' too")
    # Who keeps memory has no room for the dense forms of the large shapes and for peers beside each other.
    parser.add_argument("--dense-gib", type=float, default=16.0, help="dense forms that need more are not run")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these token counts of the full table")
    parser.add_argument("--vocab", type=int, nargs="+", help="only these vocabularies of the full table")
    return parser.parse_args()


def _show(rows: Iterable[dict], as_json: bool) -> None:
    """Rows as they come: JSON lines, or Markdown with a new head whenever the columns change."""
    known: list[str] | None = None
    for row in rows:
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if list(row) != known:
            known = list(row)
            print(f"\n| {' | '.join(known)} |\n|{'---|' * len(known)}")
        cells = ("" if x is None else f"{x:,}" if isinstance(x, int) else str(x) for x in row.values())
        print(f"| {' | '.join(cells)} |", flush=True)


def _table(options: argparse.Namespace) -> Iterable[dict]:
    import _cpu

    python = options.peers or sys.executable
    for shape in _cpu.SHAPES:
        if shape.tokens in (options.tokens or [shape.tokens]) and shape.vocab in (options.vocab or [shape.vocab]):
            yield from _cpu.measure(shape, _cpu.FORMS, options.rounds, options.dense_gib, python)


def main() -> None:
    options = _parsed()
    missing = {name: value for name, value in KEEP_MEMORY.items() if name not in os.environ}
    if options.keep_memory and missing:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})
    os.environ["JAX_PLATFORMS"] = "cpu"  # the times are a CPU's, and TPUs are compiled for, not used
    if options.tpu:
        import _tpu

        return _show(_tpu.table(), options.json)
    import _cpu

    if options.quick:
        until = STARTED + QUICK_SECONDS
        return _show(_cpu.measure(_cpu.QUICK, _cpu.FORMS, 3, options.dense_gib, until=until), options.json)
    if options.memory:
        return _show(_cpu.memory(), options.json)
    if not options.family:
        _show(_table(options), options.json)
    if options.family or not (options.tokens or options.vocab):
        _show(_cpu.measure(_cpu.FAMILY, _cpu.family(), options.rounds, options.dense_gib), options.json)


if __name__ == "__main__":
    main()
