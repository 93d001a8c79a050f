"""What each form of a teacher's signal costs, and what it is worth: SmolLM2 and a student with half its layers.

    python benchmarks/teachers.py --quick --json
    python benchmarks/teachers.py --quality --directory DIR

benchmarks/README.md says what each mode does and how to read its rows.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="few rows and rounds, the distillation term alone")
    mode.add_argument("--quality", action="store_true", help="train a small student from every form")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--directory", type=Path, help="for rows, caches and runs (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each form with --quality")
    parser.add_argument("--steps", type=int, default=48, help="of each run with --quality")
    return parser.parse_args()


def _show(rows: Iterable[dict], as_json: bool) -> None:
    head = None
    for row in rows:
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if head is None:
            head = list(row)
            print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        cells = ("" if x is None else f"{x:,}" if isinstance(x, int) else str(x) for x in row.values())
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    options = _parsed()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    with tempfile.TemporaryDirectory() as temporary:
        where = options.directory or Path(temporary)
        if options.quality:
            import _teachers_quality

            return _show(_teachers_quality.table(where, options.seeds, options.steps), options.json)
        import _teachers_cost

        _show(_teachers_cost.table(where, options.quick), options.json)


if __name__ == "__main__":
    main()
