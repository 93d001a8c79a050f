"""What a student learns from each form of a teacher's signal: same student, same rows, same steps."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from _teachers_cost import FORMS, Form, arguments, say

DOMAINS = ("code", "manual", "legal", "scripture", "dialogue", "math")
LAYERS = "(0,1,2,11,28,29)"
QUALITY = {
    "head, live": FORMS["head, live"],
    "hidden bfloat16": FORMS["hidden bfloat16"],
    "hidden int8": FORMS["hidden int8"],
    "top-64 and tail": FORMS["top-64"],
    "top-8 and tail": FORMS["top-8"],
    "top-64, no tail": FORMS["top-64"]._replace(divergence="renormalized_kl"),
    "top-8, no tail": FORMS["top-8"]._replace(divergence="renormalized_kl"),
    "sampled 50": FORMS["sampled 50"],
    "sampled 12": FORMS["sampled 12"],
    "labels alone": Form({}, "", False),
}


def _jaxkd(*words: str) -> None:
    """The command line, in a process of its own; what it says goes to stderr when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run([sys.executable, "-m", "jaxkd", *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        say(done.stdout[-2000:], done.stderr[-2000:])
        raise SystemExit(f"jaxkd {words[0]} ended with {done.returncode}")


def _last(workdir: Path, steps: int) -> dict | None:
    """The mean row of the last evaluation, None where the run is not at its end."""
    file = workdir / "evals.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return next((row for row in rows if row["step"] == steps and row["domain"] == "mean"), None)


def table(where: Path, seeds: int, steps: int) -> Iterator[dict]:
    """A row per form: means over domains, then over seeds, and the spread between seeds.

    Args:
        where: rows, caches and runs go; finished runs that are there are not made again.
        seeds: runs of each form.
        steps: of each run.
    """
    where = where.absolute()
    for name, form in QUALITY.items():
        found = []
        common = [
            *arguments(form, where, 32, DOMAINS), f"--config.student.layers={LAYERS}", f"--config.run.steps={steps}",
            "--config.run.eval_every=0", f"--config.run.checkpoint_every={steps}",
        ]  # fmt: skip
        for seed in range(seeds):
            workdir = where / "runs" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            if _last(workdir, steps) is None:
                start = time.monotonic()
                if form.cached:
                    _jaxkd("cache", *common)
                _jaxkd("train", "--no-check", "--workdir", str(workdir), *common, f"--config.run.seed={seed}")
                say(f"{name}, seed {seed}: {time.monotonic() - start:.0f} s")
            found.append(_last(workdir, steps))
        mean = lambda key, found=found: statistics.mean(row[key] for row in found)
        kls = [row["kl"] for row in found]
        yield {
            "signal": name,
            "kl": round(mean("kl"), 4),
            "kl_spread": round(max(kls) - min(kls), 4),
            "student_nats": round(mean("student_nats"), 4),
            "agreement": round(mean("agreement"), 4),
            "student_ece": round(mean("student_ece"), 4),
            "teacher_ece": round(mean("teacher_ece"), 4),
            "teacher_nats": round(mean("teacher_nats"), 4),
        }
