"""What processes do as one: three real ones, without a device."""

import errno
import json
import subprocess
import sys
import time

import pytest
from harness import REPOSITORY, free_address, process_environment

from jaxkd.runtime import cluster, multihost

PROGRAM = """
import json, pathlib, sys, time
from jaxkd import unison
unison.join()
index, place = unison._world().rank, pathlib.Path(sys.argv[1])

def make():
    there = sorted(path.name for path in place.iterdir())
    (place / str(index)).touch()
    return there

if index:
    time.sleep(0.5)
told = {"several": unison.several(), "first": unison.first(), "word": unison.word("number", lambda: [index, 0.1 + 0.2])}
found = unison.in_turn("files", make)
told["first made"] = found[:1] if index else found
told["all made"] = sorted(path.name for path in place.iterdir())
unison.alike("the same", {"a": "b"})
try:
    told["late"] = unison.word("the late one", lambda: time.sleep(3.5) or "in time", 1.0)
except OSError as error:
    told["late"] = str(error)
unison.say(json.dumps({"said": index}))
print(json.dumps(told), flush=True)
try:
    with unison.ending():
        if index == 2:
            unison.meet("here")  # which the others never do
        if index == 1:
            time.sleep(0.5)
            unison.alike("the rows", {"code": str(index)})
        unison.alike("the rows", {"code": "0"})
        time.sleep(600)  # as in a collective that waits for one that is gone
finally:
    print("closing", flush=True)  # what would wait for the others
"""


def test_one_word_for_all_and_one_end(tmp_path):
    (tmp_path / "files").mkdir()
    common = {
        **process_environment(), "JAX_PLATFORMS": "cpu", "JAXKD_COORDINATOR": free_address(), "JAXKD_NUM_PROCESSES": "3"
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "files")], cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=common | {"JAXKD_PROCESS_ID": str(index)},
        )
        for index in range(3)
    ]  # fmt: skip
    results = [process.communicate(timeout=90) for process in started]
    assert [process.returncode for process in started] == [1, 1, 1], results
    for index, (output, errors) in enumerate(results):
        *said, told = map(json.loads, output.splitlines())
        assert said == ([{"said": 0}] if index == 0 else [])
        assert (told["several"], told["first"]) == (True, index == 0)
        assert told["word"] == [0, 0.1 + 0.2]  # to the last bit
        assert told["first made"] == ([] if index == 0 else ["0"])
        late = "gave up after 1 s of waiting for process 0: the late one"
        assert told["late"] == ("in time" if index == 0 else late)  # a slow read is no wait without end (marin#8538)
        assert told["all made"] == ["0", "1", "2"]
        reason = "error: the rows differ between hosts: of 'code' process 0 has 0, and process 1 has 1"
        who = "" if index == 1 else "process 1 failed: "
        assert errors.splitlines()[-1] == f"jaxkd: {who}{reason}"
        assert "closing" not in output


def test_one_process_is_all(capsys):
    assert not multihost.is_multihost()
    assert multihost.is_main()
    assert multihost.broadcast("anything", lambda: (1, "as it is")) == (1, "as it is")
    assert multihost.in_turn("anything", lambda: 3) == 3
    start = time.monotonic()
    multihost.barrier("nobody")
    multihost.alike("the same", {"a": "b"})
    assert time.monotonic() - start < 1
    multihost.say("aloud")
    assert capsys.readouterr().out == "aloud\n"


def device_error(text: str) -> Exception:
    from jax.errors import JaxRuntimeError

    return JaxRuntimeError(text)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("a wrong key"), 1, "jaxkd: error: a wrong key"),
        (OSError(errno.ENOSPC, "No space left on device", "disk"), 1, "jaxkd: error: No space left on device: disk"),
        # What another start may find in order, and launchers therefore make: a bucket, a host.
        (cluster.Unavailable("the bucket did not answer"), 69, "jaxkd: error: the bucket did not answer"),
        (cluster.Absent("process 3 did not come"), 69, "jaxkd: error: process 3 did not come"),
        # What no start would: the same step takes the same memory.
        (
            device_error("RESOURCE_EXHAUSTED: Error allocating 17.1G\nmore"),
            1,
            "jaxkd: error: a device has too little memory: RESOURCE_EXHAUSTED: Error allocating 17.1G. More optim.mi",
        ),
        (multihost.Stopped("stopped", 75), 75, "jaxkd: stopped"),
        (KeyboardInterrupt(), 130, "jaxkd: interrupted"),
    ],
)
def test_whether_a_launcher_should_try_again_is_in_the_code(error, code, said):
    found, text = multihost._verdict(error)
    assert found == code
    assert text.startswith(said)
    assert "\n" not in text


def test_what_nobody_foresaw_is_a_traceback():
    found, text = multihost._verdict(device_error("INTERNAL: a core halted"))
    assert found == cluster.UNFORESEEN
    assert text.startswith("Traceback") or "JaxRuntimeError" in text
