"""How a babysitter of TPU VMs decides, from what gcloud and the hosts answer."""

import os
import shutil
import subprocess

import pytest
from launching import bash, environment, until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="bash scripts")

GCLOUD = """#!/bin/sh
echo "$@" | sed 's/ --zone=z//; s/compute tpus queued-resources //' >> "$PLACE/calls"
answer() { # the next line of a file; !WORDS is a failure
    line="$(head -n 1 "$PLACE/$1")"
    sed -i 1d "$PLACE/$1"
    case "$line" in
        NONE) line="!NOT_FOUND: Resource 'q' was not found" ;;
    esac
    case "$line" in
        "!"*) echo "ERROR: (gcloud.compute) ${line#!}" >&2 && exit 1 ;;
    esac
}
case "$*" in
    *describe*) answer states && echo "$line" ;;
    *"echo code"*) answer codes && echo "$line" | tr ' ' '\\n' | sed '/./s/^/code /' ;;
    *"queued-resources create"*) answer create ;;
    *"queued-resources delete"*) answer delete ;;
    *launch/host.sh*) answer run ;;
esac
"""
# Sixty naps are too many for these tests: a babysitter that comes to no end is ended.
SLEEP = """#!/bin/sh
echo "sleep $1" >> "$PLACE/calls"
[ "$(grep -c sleep "$PLACE/calls")" -lt 60 ] || kill $PPID
"""
KINDS = {
    "launch/setup.sh": "setup", "launch/host.sh": "run", "echo code": "codes",
    "kill -TERM": "term", "kill -KILL": "kill",
}  # fmt: skip


@pytest.fixture
def cloud(tmp_path):
    """babysit(states, codes, *options, create=, delete=, run=), with two hosts: gcloud says these, a line a call.

    Gives the result and what was done, looks at the state left out; with naps=True each nap, too.
    """
    programs = {"gcloud": GCLOUD, "sleep": SLEEP, "git": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def babysit(states: list[str], codes: list[str], *options: str, naps: bool = False, **failures: list[str]):
        said = {"states": states, "codes": codes, "calls": [], "create": [], "delete": [], "run": []} | failures
        for name, answers in said.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in answers))
        done = bash(
            f"bash launch/tpu_vm.sh babysit --name q --zone z --accelerator v5p-16 {' '.join(options)} -- train --x",
            PATH=f"{tmp_path}:{os.environ['PATH']}", PLACE=str(tmp_path), TMPDIR=str(tmp_path),
        )  # fmt: skip
        verbs = [
            next((kind for mark, kind in KINDS.items() if mark in line), line.split()[0])
            for line in (tmp_path / "calls").read_text().splitlines()
        ]
        return done, [verb for verb in verbs if verb not in ("describe", "alpha") and (naps or verb != "sleep")]

    return babysit


START = ["codes", "setup", "run"]  # a look whether a run is going on comes before


def test_babysit_brings_a_run_to_its_end(cloud):
    done, verbs = cloud(
        ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
        ["lost lost", "running running", "running 0", "0 0"],
    )
    assert done.returncode == 0, done.stderr
    assert verbs == ["create", *START, "codes", "codes", "codes", "delete"]


def test_babysit_starts_again_what_was_stopped_or_killed(cloud):
    ends = ["75 75", "134 lost", "70 69", "0 0"]
    looks = [look for before, end in zip(["lost lost", *ends], ends) for look in (before, end)]
    done, verbs = cloud(["ACTIVE"] * 4, looks, "--retries 2", "--keep")
    assert done.returncode == 0, done.stderr
    assert verbs == [*START, "codes"] * 4
    assert "retry 0 of 2" in done.stderr  # after code 75, which costs none


def test_babysit_asks_anew_for_what_was_preempted(cloud):
    done, verbs = cloud(
        ["ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "ACTIVE"],
        ["lost lost", "running running", "!no such host", "lost lost", "0 0"],
    )
    assert done.returncode == 0, done.stderr
    assert verbs == [*START, "codes", "codes", "delete", "create", *START, "codes", "delete"]


@pytest.mark.parametrize(("codes", "code"), [("1 70", 1), ("134 2", 2), ("130 130", 130)])
def test_babysit_stops_at_an_error_and_keeps_the_slices_to_look_at(cloud, codes, code):
    done, verbs = cloud(["ACTIVE"], ["lost lost", codes])
    assert (done.returncode, verbs) == (code, [*START, "codes"])
    assert f"ended with code {code}, which another start would not mend" in done.stderr


def test_babysit_gives_up(cloud):
    done, verbs = cloud(["ACTIVE"] * 3, ["137 137"] * 5, "--retries 1")
    assert done.returncode == 1
    assert verbs == [*START, "codes"] * 2
    assert "gave up after 1 retries; the last ended with 137" in done.stderr


def test_babysit_attaches_to_a_run_that_is_going_on(cloud):
    """One host that says so is enough: code must not be put under a run."""
    done, verbs = cloud(["ACTIVE", "ACTIVE"], ["running", "running running", "0 0"])
    assert done.returncode == 0, done.stderr
    assert verbs == ["codes", "codes", "codes", "delete"]
    assert "a run is going on: attached to it" in done.stderr


def test_babysit_outlives_a_network_that_is_down(cloud):
    """A look that failed says nothing of the slices: they are neither asked for anew, nor set up again."""
    down = ["!Unable to find the server"] * 3
    done, verbs = cloud(
        [*down, "ACTIVE", *down, "ACTIVE"],
        ["lost lost", "running running", "!unreachable", "0 0"],
        "--poll 7",
        naps=True,
    )
    assert done.returncode == 0, done.stderr
    pause = ["sleep", "codes"]
    assert verbs == ["sleep"] * 3 + START + pause * 2 + ["sleep"] * 3 + pause + ["delete"]
    sentence = "gcloud did not say how q is, asked again in 7 s: ERROR: (gcloud.compute) Unable to find the server"
    assert done.stderr.count(sentence) == 6


def test_babysit_sets_up_nothing_while_a_host_does_not_answer(cloud):
    done, verbs = cloud(["ACTIVE"] * 2, ["lost", "lost lost", "0 0"], naps=True)
    assert done.returncode == 0, done.stderr
    assert verbs == ["codes", "sleep", *START, "sleep", "codes", "delete"]
    assert "of 2 hosts, 1 answered" in done.stderr


def test_a_run_is_done_when_all_hosts_say_so(cloud):
    done, verbs = cloud(["ACTIVE"] * 2, ["lost lost", "0", "0 1"])
    assert (done.returncode, verbs) == (1, [*START, "codes", "codes"])


def test_every_failed_start_is_followed_by_a_nap(cloud):
    done, verbs = cloud(["ACTIVE"] * 3, ["lost lost"] * 3, "--retries 2", naps=True, run=["!connection lost"] * 3)
    assert done.returncode == 1
    assert verbs == [*START, "sleep", *START, "sleep", *START]
    assert "gave up after 2 retries; the last ended with 255" in done.stderr


def test_babysit_tries_again_to_create_and_to_delete(cloud):
    done, verbs = cloud(
        ["NONE", "NONE", "FAILED", "FAILED", "NONE", "ACTIVE"], ["lost lost", "0 0"], naps=True,
        create=["!UNAVAILABLE: later", "!ALREADY_EXISTS: Resource 'q' already exists"],
        delete=["!FAILED_PRECONDITION: in use", "", "!UNAVAILABLE: later", "NONE"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before = [word for verb in ("create", "create", "delete", "delete", "create") for word in (verb, "sleep")]
    assert verbs == [*before, *START, "sleep", "codes", "delete", "sleep", "delete"]
    assert "(gcloud.compute) ALREADY_EXISTS: Resource 'q' already exists" in done.stderr
    assert "create failed, looked at again in 60 s" in done.stderr


@pytest.mark.parametrize(("verb", "states"), [("create", ["NONE"]), ("delete", ["FAILED"]), ("describe", None)])
@pytest.mark.parametrize("words", ["PERMISSION_DENIED: tpu.nodes", "INVALID_ARGUMENT: no such type"])
def test_babysit_ends_at_what_no_repetition_mends(cloud, verb, states, words):
    refused = [f"!{words}"]
    done, verbs = cloud(states or refused, [], naps=True, **({verb: refused} if states else {}))
    assert (done.returncode, verbs) == (1, [verb] if states else [])
    assert f"gcloud cannot {verb} q, however often it is asked" in done.stderr
    assert done.stderr.endswith(f"ERROR: (gcloud.compute) {words}\n")


def test_a_run_that_some_hosts_lost_is_ended_and_started_again(cloud):
    """A VM that was made anew has no .launch, and the others wait for it in a collective."""
    torn = ["running lost"] * 3
    done, verbs = cloud(
        ["ACTIVE"] * 2, ["lost lost", "running running", *torn, "running lost", "75 lost", "75 lost", "0 0"]
    )
    assert done.returncode == 0, done.stderr
    assert verbs == [*START, *["codes"] * 4, "term", "codes", "codes", *START, "codes", "delete"]


def test_a_host_that_lost_the_run_is_looked_at_three_times(cloud):
    done, verbs = cloud(["ACTIVE"], ["lost lost", *["running lost"] * 2, "running 0", *["running lost"] * 2, "0 0"])
    assert done.returncode == 0, done.stderr
    assert verbs == [*START, *["codes"] * 6, "delete"]


HOSTS = """#!/bin/sh
set -e
for word; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
case "$*" in *describe*) echo ACTIVE ;; esac
[ -n "$command" ] || exit 0
for host in "$PLACE"/hosts/*; do
    case "$command" in
        *launch/setup.sh*) mkdir -p "$host/jaxkd" && cp -R "$PLACE/launch" "$PLACE/.venv" "$host/jaxkd" ;;
        *) (cd "$host" && PLACE="$host" bash -c "$command") ;;
    esac
done
"""


@pytest.mark.slow
@pytest.mark.parametrize("stubborn", [False, True])
def test_what_babysit_asks_of_hosts(copy, stubborn):
    """Its commands, run from the home of hosts with a real detached run: one has it, the other was made anew."""
    first, second = copy / "hosts/a", copy / "hosts/b"
    for host in (first, second):
        host.mkdir(parents=True)
    (second / "ready").touch()  # its run will end at once, as that of the first will when it is started again
    if stubborn:
        (first / "stubborn").touch()
    nap = 0.1 if stubborn else 0.5  # the grace is ten naps: enough to save, or soon over
    sleep = f"#!/bin/sh\nexec {shutil.which('sleep')} {nap}\n"
    programs = {"gcloud": HOSTS, "sleep": sleep, "git": "#!/bin/sh\n"}
    for name, text in programs.items():
        (copy / name).write_text(text)
        (copy / name).chmod(0o755)
    (first / "jaxkd").mkdir()
    for name in ("launch", ".venv"):
        shutil.copytree(copy / name, first / "jaxkd" / name)
    start = ["bash", "jaxkd/launch/host.sh", "--background", ".launch", "--", "train"]
    subprocess.run(start, cwd=first, env=environment(copy, PLACE=str(first)), check=True, capture_output=True)
    until(first / "ready")
    command = "bash launch/tpu_vm.sh babysit --name q --zone z --accelerator v5p-16 -- train"
    done = bash(command, **environment(copy, TMPDIR=str(copy)))
    assert done.returncode == 0, done.stderr
    assert "some hosts run and wait for others that have lost the run" in done.stderr
    assert ("it did not end within 600 s: killed" in done.stderr) == stubborn
    assert ((first / "saved").exists(), (first / "let be").exists()) == (not stubborn, False)
    assert [(host / "jaxkd/.launch/run.code").read_text() for host in (first, second)] == ["0\n", "0\n"]
