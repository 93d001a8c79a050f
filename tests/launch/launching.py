"""What tests of the launchers share: bash in a bare environment, and a run that takes its time to save."""

import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
CLEAN = {"PATH": os.environ["PATH"], "HOME": "/", "TMPDIR": "TMP"}
RUN = """\
import os, pathlib, signal, sys, time
place = pathlib.Path(os.environ["PLACE"])
if (place / "ready").exists():
    raise SystemExit(0)  # started again: nothing is left to do
def save(*_):
    time.sleep(0.3)  # a save takes its time, and must be let
    (place / "saved").write_text(" ".join(sys.argv[1:]))
    raise SystemExit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if (place / "stubborn").exists() else save)
(place / "flags").write_text(os.environ.get("LIBTPU_INIT_ARGS", ""))
(place / "ready").touch()
time.sleep(60)
(place / "let be").touch()
"""


def bash(command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=CLEAN | environment, capture_output=True, text=True, timeout=60
    )


def until(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.read_text() or path.name == "ready")):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)
    return path.read_text()


def environment(copy: Path, **more: str) -> dict[str, str]:
    return CLEAN | {"PLACE": str(copy), "PATH": f"{copy}:{os.environ['PATH']}"} | more
