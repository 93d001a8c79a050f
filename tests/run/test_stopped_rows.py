"""SIGTERM and Ctrl-C before there is anything to save: the process ends at once, and the next one goes on."""

import signal
import subprocess
import sys

import pytest
from harness import REPOSITORY, free_address, here, process_environment, tiny_arguments

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
        several = {"JAXKD_COORDINATOR": free_address(), "JAXKD_NUM_PROCESSES": str(count)} if count > 1 else {}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments], cwd=REPOSITORY, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=process_environment() | several | ({"JAXKD_PROCESS_ID": str(index)} if several else {}),
            )
            for index in range(count)
        ]  # fmt: skip
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
        last = [said.splitlines()[-1] for said in errors]
        assert all(line.startswith("jaxkd: ") and "stopped by a signal" in line for line in last), last
        return [process.returncode for process in self.processes]


def assert_goes_on(arguments, rows) -> None:
    assert not list(rows.rglob("incomplete.*"))
    result = here("prepare", *arguments)
    assert result.returncode == 0, result.stderr
    alpha, beta = result.stdout.splitlines()
    assert " already in " in alpha
    assert " built in " in beta


def test_sigterm_ends_the_building_of_rows(two_domains, tmp_path):
    arguments = tiny_arguments(two_domains, tmp_path / "rows")
    run = Building(["train", "--workdir", str(tmp_path / "run"), *arguments])
    assert run.stop(0) == [cluster.EXIT_STOPPED]
    assert_goes_on(arguments, tmp_path / "rows")


@pytest.mark.slow
def test_ctrl_c_ends_the_building_of_rows(two_domains, tmp_path):
    """By a verb that has not joined JAX's processes."""
    arguments = tiny_arguments(two_domains, tmp_path / "rows")
    run = Building(["prepare", *arguments])
    assert run.stop(0, signal.SIGINT) == [cluster.EXIT_INTERRUPTED]
    assert_goes_on(arguments, tmp_path / "rows")


@pytest.mark.slow
def test_sigterm_to_one_that_waits_for_rows_ends_all(two_domains, tmp_path):
    arguments = tiny_arguments(two_domains, tmp_path / "rows")
    run = Building(["train", "--workdir", str(tmp_path / "run"), *arguments], count=2)
    assert run.stop(1) == [cluster.EXIT_STOPPED] * 2
    assert_goes_on(arguments, tmp_path / "rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, cluster.EXIT_STOPPED), (signal.SIGINT, cluster.EXIT_INTERRUPTED)]
)
def test_a_signal_while_weights_are_loaded_ends_the_process(two_domains, tmp_path, number, code):
    """Which of a pod takes minutes, when thirty seconds are all that it has."""
    arguments = tiny_arguments(two_domains, tmp_path / "rows")
    run = Building(["train", "--workdir", str(tmp_path / "run"), *arguments], program=LOADING)
    assert run.stop(0, number) == [code]
