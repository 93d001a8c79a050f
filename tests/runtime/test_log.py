"""A run's logs: rows are complete and in order, and the training loop does not wait for the disk."""

import errno
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
from harness import REPOSITORY, SMALL, here, tiny_arguments
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxkd.runtime import files, log, progress


def line(step: int, **more) -> dict:
    return {"step": step, "loss": 1.0 / step, "tokens_per_s": 10.0, **more}


class Disk:
    """A disk whose fsync returns only while `answers` is set, and is counted."""

    def __init__(self, monkeypatch):
        self.syncs, self.answers, sync = 0, threading.Event(), os.fsync
        self.answers.set()

        def answer(file):
            self.syncs += 1
            assert self.answers.wait(60)
            sync(file)

        monkeypatch.setattr(os, "fsync", answer)

    def blocks(self, call) -> None:
        self.answers.clear()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        self.answers.set()
        thread.join(60)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk(monkeypatch)
    yield disk
    disk.answers.set()


@pytest.fixture
def output(tmp_path):
    output = log.TrainLog(tmp_path, 1000, 0, 0)
    yield output
    output.close()


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jaxkd_log")]


def steps(workdir) -> list[int]:
    return [row["step"] for row in files.read_jsonl(workdir / "metrics.jsonl")]


def events(workdir) -> list[Event]:
    read = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])  # a length and its checksum, the event and its checksum
            read.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return read


def test_the_loop_waits_for_a_hanging_disk_only_when_the_queue_is_full(disk, output, tmp_path):
    disk.answers.clear()
    output.step(line(1), write=True)
    while not disk.syncs:
        time.sleep(0.001)
    for step in range(2, log._QUEUE + 2):
        output.step(line(step), write=True)
    before = disk.syncs
    disk.blocks(lambda: output.step(line(log._QUEUE + 2), write=True))
    output.flush()
    assert steps(tmp_path) == list(range(1, log._QUEUE + 3))
    assert disk.syncs - before < 10  # many rows, one fsync


def test_flush_evaluation_and_mixture_return_when_their_rows_are_on_disk(disk, output, tmp_path):
    disk.answers.clear()
    for step in range(1, 11):
        output.step(line(step), write=step % 2 == 0)
    disk.blocks(output.flush)
    assert steps(tmp_path) == [2, 4, 6, 8, 10]
    assert [event.step for event in events(tmp_path) if event.summary.value] == [2, 4, 6, 8, 10]
    rows = [{"step": 19, "domain": name, "kl": 0.5} for name in ("alpha", "beta", "mean")]
    disk.blocks(lambda: output.evaluation(rows))
    assert files.read_jsonl(tmp_path / "evals.jsonl") == rows
    output.mixture({"step": 20, "interval": 1})
    assert files.read_jsonl(tmp_path / "mixture.jsonl") == [{"step": 20, "interval": 1}]
    output.restart_evaluation(19)
    assert files.read_jsonl(tmp_path / "evals.jsonl") == []


def test_a_resumed_run_replaces_later_rows(tmp_path):
    for first, last in ((0, 8), (5, 12)):
        output = log.TrainLog(tmp_path, 12, first, 0)
        for step in range(first + 1, last + 1):
            output.step(line(step, attempt=first), write=True)
        output.close()
    rows = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["attempt"]) for row in rows] == [(step, 5 * (step > 5)) for step in range(1, 13)]


def test_tensorboard_has_the_finite_numbers_of_a_row_and_drops_later_events(output, tmp_path):
    output.step({"step": 3, "loss": None, "tokens_per_s": 2.0, "grad_norm": float("inf"), "rows": {"a": [1]}}, True)
    output.evaluation([{"step": 3, "domain": "alpha", "kl": 0.25}])
    output.flush()
    start, train, evaluation = events(tmp_path)[1:]
    assert (start.step, start.session_log.status) == (1, SessionLog.START)
    assert [(v.tag, v.simple_value) for v in train.summary.value] == [("train/tokens_per_s", 2.0)]
    assert [(v.tag, v.simple_value) for v in evaluation.summary.value] == [("eval/alpha/kl", 0.25)]
    assert abs(train.wall_time - time.time()) < 600


@pytest.mark.parametrize("call", ["step", "flush", "evaluation", "mixture", "close", "many"])
def test_an_error_of_the_writer_is_raised_by_the_next_call_and_only_once(call, tmp_path):
    output = log.TrainLog(tmp_path, 10, 0, 0)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    output.step(line(1), write=True)
    if call == "step":  # also for a step that is not written
        output._writer._thread.submit(int).result(60)  # after the row
    calls = {
        "step": lambda: output.step(line(2), write=False),
        "flush": output.flush,
        "evaluation": lambda: output.evaluation([{"step": 1, "domain": "mean"}]),
        "mixture": lambda: output.mixture({"step": 1}),
        "close": output.close,
        "many": lambda: [output.step(line(step), write=True) for step in range(1, 10 * log._QUEUE)],  # does not block
    }
    with pytest.raises(OSError, match="No space left on device") as caught:
        calls[call]()
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    output.close()


def test_only_the_main_process_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(log.multihost, "is_main", lambda: False)
    output = log.TrainLog(tmp_path, 10, 0, 0)
    output.step(line(1), write=True)
    output.evaluation([{"step": 1, "domain": "mean"}])
    output.mixture({"step": 1})
    output.restart_evaluation(1)
    output.flush()
    output.close()
    assert not list(tmp_path.iterdir())


KILLED = """
import pathlib, sys
from jaxkd.runtime import log
output = log.TrainLog(pathlib.Path(sys.argv[1]), 10**9, 0, 0)
for step in range(1, 10**9):
    output.step({"step": step, "loss": 1.0, "tokens_per_s": 1.0}, write=True)
    if step % 20 == 0:
        output.flush()
        print(step, flush=True)  # as a checkpoint that is complete
"""


def test_a_kill_loses_only_rows_after_the_last_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY
    ) as process:
        saved = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        saved += map(int, process.stdout.read().split())
    rows = steps(tmp_path)
    assert rows == list(range(1, len(rows) + 1))
    assert len(rows) >= saved[-1] >= 60


def test_a_full_disk_ends_a_run_before_a_checkpoint_of_unwritten_steps(two_domains, tmp_path, monkeypatch):
    sync, written = os.fsync, tmp_path / "run" / "metrics.jsonl"

    def fill(file):
        if written.exists() and os.path.samestat(os.fstat(file), written.stat()) and len(steps(tmp_path / "run")) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", fill)
    arguments = tiny_arguments(two_domains, tmp_path / "rows", *SMALL, "--config.run.mesh.data=1", "--no-check")
    result = here("train", "--workdir", str(tmp_path / "run"), *arguments)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("jaxkd: error: No space left on device")
    assert last.endswith(str(written))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")] == ["3"]


def test_without_a_terminal_there_is_a_line_now_and_then(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("jaxkd.runtime.progress.time.monotonic", lambda: clock[0])
    bar = progress.bar(title="train", total=100, unit="steps", initial=10, at_once=True)
    for step in range(11, 51):
        clock[0] += 2.0
        bar.set_postfix_str(f"loss {step}.0, 7 tokens/s")
        bar.update()
    bar.close()
    assert capsys.readouterr().err.splitlines() == [  # the first step, one line per 30 seconds, the last step
        "train: 11 of 100 steps, loss 11.0, 7 tokens/s, 02:58 left",
        "train: 26 of 100 steps, loss 26.0, 7 tokens/s, 02:28 left",
        "train: 41 of 100 steps, loss 41.0, 7 tokens/s, 01:58 left",
        "train: 50 of 100 steps, loss 50.0, 7 tokens/s, 01:40 left",
    ]
    assert list(progress.bar(range(3), "reading", unit="documents")) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # finished before a line was due


def test_changed_shares_and_the_compilation_are_printed_without_a_terminal(tmp_path, capsys):
    output = log.TrainLog(tmp_path, 10, 0, 0)
    for step, share in ((0, 0.25), (5, 0.25), (10, 0.5)):
        output.mixture({"step": step, "share/code": share, "share/math": 1 - share})
    output.compiling()
    output.close()
    assert capsys.readouterr().err.splitlines() == [
        "train: shares from step 0: code 25.0%, math 75.0%",
        "train: shares from step 10: code 50.0%, math 50.0%",
        "train: compiling the step",
    ]
