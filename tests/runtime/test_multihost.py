"""Multi-host helpers, on three real processes without devices."""

import errno
import json
import time

import pytest
from harness import start

from jaxkd.runtime import cluster, multihost

PROGRAM = """
import json, pathlib, sys, time
from jaxkd.runtime import multihost
multihost.join()
index, folder = multihost._world().rank, pathlib.Path(sys.argv[1])

def make():
    before = sorted(path.name for path in folder.iterdir())
    (folder / str(index)).touch()
    return before

if index:
    time.sleep(0.5)
result = {"is_multihost": multihost.is_multihost(), "is_main": multihost.is_main()}
result["broadcast"] = multihost.broadcast("number", lambda: [index, 0.1 + 0.2])
before = multihost.main_first("files", make)
result["before"] = before[:1] if index else before
result["after"] = sorted(path.name for path in folder.iterdir())
multihost.assert_equal("the same", {"a": "b"})
try:
    result["slow"] = multihost.broadcast("the slow one", lambda: time.sleep(3.5) or "in time", 1.0)
except OSError as error:
    result["slow"] = str(error)
multihost.print_main(json.dumps({"printed by": index}))
print(json.dumps(result), flush=True)
try:
    with multihost.abort_on_error():
        if index == 2:
            multihost.barrier("here")  # the others never reach it
        if index == 1:
            time.sleep(0.5)
            multihost.assert_equal("the rows", {"code": str(index)})
        multihost.assert_equal("the rows", {"code": "0"})
        time.sleep(600)  # as in a collective that waits for a process that is gone
finally:
    print("closing", flush=True)  # would wait for the others
"""


def test_three_processes_agree_and_end_together(tmp_path):
    (tmp_path / "files").mkdir()
    processes = start("-c", PROGRAM, str(tmp_path / "files"), count=3)
    results = [process.communicate(timeout=90) for process in processes]
    assert [process.returncode for process in processes] == [1, 1, 1], results
    for index, (output, errors) in enumerate(results):
        *printed, result = map(json.loads, output.splitlines())  # "closing" is never printed
        assert printed == ([{"printed by": 0}] if index == 0 else [])
        assert (result["is_multihost"], result["is_main"]) == (True, index == 0)
        assert result["broadcast"] == [0, 0.1 + 0.2]  # to the last bit
        assert result["before"] == ([] if index == 0 else ["0"])
        assert result["after"] == ["0", "1", "2"]
        assert (result["slow"] == "in time") == (index == 0)
        assert index == 0 or "the slow one" in result["slow"]  # a timeout instead of an endless wait (marin#8538)
        last = errors.splitlines()[-1]
        assert last.startswith("jaxkd: " + "process 1 failed: " * (index != 1) + "error: the rows")
        assert "'code'" in last


def test_one_process(capsys):
    assert not multihost.is_multihost()
    assert multihost.is_main()
    assert multihost.broadcast("anything", lambda: (1, "unchanged")) == (1, "unchanged")
    assert multihost.main_first("anything", lambda: 3) == 3
    start = time.monotonic()
    multihost.barrier("nobody")
    multihost.assert_equal("the same", {"a": "b"})
    assert time.monotonic() - start < 1
    multihost.print_main("aloud")
    assert capsys.readouterr().out == "aloud\n"


def device_error(text: str) -> Exception:
    from jax.errors import JaxRuntimeError

    return JaxRuntimeError(text)


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (ValueError("a wrong key"), 1, "jaxkd: error: a wrong key"),
        (OSError(errno.ENOSPC, "No space left on device", "disk"), 1, "jaxkd: error: No space left on device: disk"),
        (cluster.Unavailable("the bucket did not answer"), 69, "jaxkd: error: the bucket did not answer"),
        # A restart would run out of memory at the same step.
        (device_error("RESOURCE_EXHAUSTED: Error allocating 17.1G\nmore"), 1, "jaxkd: error: a device is out of"),
        (multihost.Stopped("stopped", 75), 75, "jaxkd: stopped"),
        (KeyboardInterrupt(), 130, "jaxkd: interrupted"),
        (device_error("INTERNAL: a core halted"), cluster.EXIT_INTERNAL, ""),
    ],
)
def test_exit_codes_tell_a_launcher_whether_to_restart(error, code, start):
    actual, text = multihost._describe(error)
    assert actual == code
    assert text.startswith(start)
    assert ("\n" in text or "JaxRuntimeError" in text) == (code == cluster.EXIT_INTERNAL)
