"""Whether a completion states the right mathematical answer, by math-verify in a process that can be killed.

math-verify's own timeouts are signals, which only a main thread gets, and its results differ where they cannot be set.
Here it runs without them; a comparison that takes too long ends its process.
"""

import json
import logging
import select
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 10.0  # of one comparison
_START = 120.0  # of the process with its imports


class Verifier:
    """`verify` in a process of its own, started when it is first needed; a context manager."""

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def verify(self, answers: Sequence[str], text: str) -> bool:
        """Whether a text states one of the answers, each with or without LaTeX; False where that takes too long.

        Raises ValueError: an answer is no mathematical expression.
        """
        if self._process is None:
            command = [sys.executable, "-m", "jaxkd.evals.verify"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if self._answer(_START) != "ready":
                self.__exit__()
                raise OSError("math-verify did not start: see its message above")
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([list(answers), text]) + "\n")
        self._process.stdin.flush()
        answer = self._answer(self._seconds)
        if answer is None:
            self.__exit__()
            return False
        if isinstance(answer, str):
            raise ValueError(f"math-verify reads no mathematical expression in the answer {answer!r}")
        return answer

    def _answer(self, seconds: float) -> bool | str | None:
        """What the process says next; None where it takes longer, or has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        return json.loads(line) if line else None


def _serve() -> None:
    """Reads [answers, text] as JSON lines; writes true, false, or the answer that cannot be read."""
    from math_verify import parse, verify

    logging.disable()
    read = lambda text: parse(text, parsing_timeout=None)
    print('"ready"', flush=True)
    for line in sys.stdin:
        answers, text = json.loads(line)
        golds = {answer: read(answer) or read(f"${answer}$") for answer in answers}
        # What it cannot read it gives back as text.
        result = next((answer for answer, gold in golds.items() if all(isinstance(x, str) for x in gold)), None)
        if result is None:
            stated = read(text)
            result = any(verify(gold, stated, timeout_seconds=None) for gold in golds.values())
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _serve()
