"""SIGTERM and Ctrl-C before there is anything to save: the process ends at once, and the next one goes on."""

import signal

import pytest
from harness import start, succeeds, tiny_arguments

from jaxkd.runtime import cluster

# jaxkd with a text that comes slowly: the first domain is done at once, and the second would take twenty minutes.
PROGRAM = """
import itertools, sys, time
from jaxkd.cli import main
from jaxkd.data import build

pack, sides = build.pack, itertools.count()

def slowly(documents, length):
    slow = next(sides) >= 2
    for number, row in enumerate(pack(documents, length)):
        if slow and number >= 3:
            print("building", file=sys.__stdout__, flush=True)  # TFDS is kept from printing
            time.sleep(60)
        yield row

build.pack = slowly
main.console(sys.argv[1:])
"""
# The same with weights that come slowly.
LOADING = """
import sys, time
from jaxkd.cli import main
from jaxkd.run import load

def slowly(*arguments, **options):
    print("building", flush=True)
    time.sleep(60)

load.weights = slowly
main.console(sys.argv[1:])
"""


class Building:
    """A verb in so many processes, the first of which is in the middle of the second domain."""

    def __init__(self, arguments: list[str], count: int = 1, program: str = PROGRAM):
        self.processes = start("-c", program, *arguments, count=count)
        for line in self.processes[0].stdout:
            if line == "building\n":
                break

    def stop(self, index: int, number: int = signal.SIGTERM) -> list[int]:
        """Exit codes after a signal to one; the last line of each says that a signal stopped it."""
        self.processes[index].send_signal(number)
        try:
            # Neither the twenty minutes of the text, nor the two that Python's own end was seen to take.
            errors = [process.communicate(timeout=60)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.communicate()
        last = [text.splitlines()[-1] for text in errors]
        assert all(line.startswith("jaxkd: ") and "stopped by a signal" in line for line in last), last
        return [process.returncode for process in self.processes]


@pytest.mark.parametrize(
    ("verb", "count", "index", "number", "code"),
    [
        ("train", 1, 0, signal.SIGTERM, cluster.EXIT_STOPPED),
        # A verb that has not joined JAX's processes, and a process that waits for another's rows.
        pytest.param("prepare", 1, 0, signal.SIGINT, cluster.EXIT_INTERRUPTED, marks=pytest.mark.slow),
        pytest.param("train", 2, 1, signal.SIGTERM, cluster.EXIT_STOPPED, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_building_of_rows(two_domains, tmp_path, verb, count, index, number, code):
    arguments = tiny_arguments(two_domains, tmp_path / "rows")
    workdir = ["--workdir", str(tmp_path / "run")] if verb == "train" else []
    run = Building([verb, *workdir, *arguments], count)
    assert run.stop(index, number) == [code] * count
    assert not list((tmp_path / "rows").rglob("incomplete.*"))
    alpha, beta = succeeds("prepare", *arguments).splitlines()
    assert " already in " in alpha
    assert " built in " in beta


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, cluster.EXIT_STOPPED), (signal.SIGINT, cluster.EXIT_INTERRUPTED)]
)
def test_a_signal_while_weights_are_loaded_ends_the_process(two_domains, tmp_path, number, code):
    arguments = tiny_arguments(two_domains, tmp_path / "rows")
    run = Building(["train", "--workdir", str(tmp_path / "run"), *arguments], program=LOADING)
    assert run.stop(0, number) == [code]
