"""Checkpoints that are not what was saved: found before anything of them is used, and the step before is taken."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import REPOSITORY, abstract, flip_a_bit, process_environment

from jaxkd.runtime.cluster import Unavailable
from jaxkd.train import checkpoint_errors
from jaxkd.train.checkpoint import Checkpoints
from jaxkd.train.checkpoint_errors import DamagedCheckpoint
from jaxkd.train.retention import Keep
from jaxkd.train.state import TrainState


def state_of(seed: int, size: int = 64) -> TrainState:
    w = jax.random.normal(jax.random.key(seed), (size, 16))
    return TrainState(jnp.int32(seed), {"student": {"w": w}, "objective": {}}, (w * 2, w * 3))


def same(left, right) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), left, right)))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    writer = Checkpoints(directory, Keep(9))
    for step in (1, 2):
        writer.save(step, state_of(step), {"tokens": step}, metric=float(step))
    writer.wait()
    writer.close()
    return directory


@pytest.fixture
def damaged(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def flip_in_w(step):
    flip_a_bit(step / "train", np.asarray(state_of(2).params["student"]["w"]).tobytes())


def data(step):
    return max((f for f in (step / "train").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def another_number(step):
    shutil.rmtree(step)
    shutil.copytree(step.parent / "1", step)


DAMAGE = {
    "one bit of a weight": (flip_in_w, "student.w"),
    "a truncated file": (lambda step: data(step).write_bytes(data(step).read_bytes()[:-900]), ""),
    "a file that is gone": (lambda step: data(step).unlink(), ""),
    "arrays that are gone": (lambda step: shutil.rmtree(step / "train"), ""),
    "no manifest": (lambda step: shutil.rmtree(step / "manifest"), "manifest/metadata"),
    "an empty manifest": (lambda step: (step / "manifest/metadata").write_text(""), "manifest"),
    "binary in the manifest": (lambda step: (step / "manifest/metadata").write_bytes(b"\xff\xfe"), "utf-8"),
    "another mixture": (lambda step: (step / "mixture/metadata").write_text('{"tokens": 3}'), "mixture"),
    "no mixture": (lambda step: (step / "mixture/metadata").unlink(), "mixture/metadata"),
    "another step": (another_number, "step 1"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_the_step_before_is_used_and_nothing_is_lost(damaged, what):
    change, message = DAMAGE[what]
    change(damaged / "2")
    left = {f.relative_to(damaged / "2"): f.read_bytes() for f in (damaged / "2").rglob("*") if f.is_file()}
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoints/2.*{message}"):
        Checkpoints(damaged, read_only=True).restore(2, abstract(state_of(0)))
    assert (damaged / "2").exists()  # who only reads sets nothing aside

    checkpoints = Checkpoints(damaged, Keep(9))
    recovered = checkpoints.recover(abstract(state_of(0)))
    assert (recovered.step, recovered.progress) == (1, {"tokens": 1})
    assert same(recovered.state, state_of(1))
    [warning] = recovered.warnings
    assert all(name in warning for name in (str(damaged / "2"), "2.aside", "step 1"))
    aside = damaged / "2.aside"
    assert {f.relative_to(aside): f.read_bytes() for f in aside.rglob("*") if f.is_file()} == left

    checkpoints.save(2, state_of(2), {"tokens": 2})  # the same number again
    checkpoints.wait()
    again = checkpoints.recover(abstract(state_of(0)))
    assert (again.step, again.warnings) == (2, ())
    assert same(again.state, state_of(2))
    checkpoints.close()


def test_whatever_byte_is_flipped_wrong_values_are_never_used(damaged):
    reader, target, outcomes = Checkpoints(damaged, read_only=True), abstract(state_of(0)), {True: 0, False: 0}
    for file in sorted(f for f in (damaged / "2").rglob("*") if f.is_file() and f.stat().st_size):
        content = file.read_bytes()
        changed = bytearray(content)
        changed[2 * len(content) // 3] ^= 0x10
        file.write_bytes(changed)
        try:
            state, progress = reader.restore(2, target)
            assert same(state, state_of(2)), file
            assert progress == {"tokens": 2}, file
            outcomes[True] += 1
        except DamagedCheckpoint:
            outcomes[False] += 1
        file.write_bytes(content)
    assert outcomes[False] > 5


@pytest.mark.parametrize("name", ["_sharding", "array_metadatas", "_CHECKPOINT_METADATA"])
def test_what_orbax_can_do_without_is_not_missed(damaged, name):
    """Orbax reads a copy that has lost these, and the manifest says that its values are whole."""
    lost = list((damaged / "2").rglob(name))
    assert lost
    for path in lost:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    recovered = Checkpoints(damaged, Keep(9)).recover(abstract(state_of(0)))
    assert (recovered.step, recovered.progress, recovered.warnings) == (2, {"tokens": 2}, ())
    assert same(recovered.state, state_of(2))


class Answer(Exception):
    """As gcsfs raises it."""

    def __init__(self, code: int):
        super().__init__(f"answer {code}")
        self.code = code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("UNAVAILABLE: the bucket did not answer"), Unavailable),
        (TimeoutError("too long"), Unavailable),
        (ConnectionResetError("by peer"), Unavailable),
        (OSError(errno.ESTALE, "Stale file handle"), Unavailable),
        (Answer(503), Unavailable),
        (PermissionError("no"), OSError),
        (ValueError("PERMISSION_DENIED: no rights"), OSError),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), OSError),
        (Answer(404), DamagedCheckpoint),
        (ValueError("Error reading ocdbt manifest"), DamagedCheckpoint),
    ],
)
def test_what_cannot_be_read_is_damaged_or_refused_or_may_be_there_the_next_time(error, kind):
    assert type(checkpoint_errors.classify(error)) is kind


def test_silent_buckets_and_hosts_that_see_different_steps(damaged, monkeypatch):
    checkpoints = Checkpoints(damaged, read_only=True)

    checkpoints.directory = Mock(iterdir=Mock(side_effect=Answer(503)))
    with pytest.raises(Unavailable, match="answer 503"):
        checkpoints.steps()
    assert Checkpoints(damaged / "nothing", read_only=True).steps() == []
    checkpoints = Checkpoints(damaged, Keep(9))
    monkeypatch.setattr("jaxkd.runtime.multihost.broadcast", lambda name, make, patience: [*make(), 3])
    with pytest.raises(Unavailable, match=r"\[1, 2, 3\] and \[1, 2\]"):
        checkpoints.save(3, state_of(3), {})
    checkpoints.close()


def test_a_part_that_could_not_be_written_is_told_before_the_others_have_given_up(damaged, monkeypatch):
    checkpoints = Checkpoints(damaged, Keep(9))
    checkpoints.save(3, state_of(3), {})
    checkpoints.wait()
    checkpoints.save(4, state_of(4), {})
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._manager, "is_saving_in_progress", lambda: True)
        failed = Mock(side_effect=ValueError("UNAVAILABLE: the bucket did not answer"))
        patched.setattr(checkpoints._manager, "check_for_errors", failed)
        with pytest.raises(Unavailable, match=r"UNAVAILABLE.*step 3"):
            checkpoints.check()
    checkpoints.close()


def test_orbax_asks_for_no_signal(damaged, monkeypatch):
    """Its questions carry numbers of steps, which JAX would take for the loop's."""
    asked = []
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", asked.append)
    checkpoints = Checkpoints(damaged, Keep(9))
    checkpoints.save(3, state_of(3), {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3]
    assert not asked


def test_parts_are_verified_by_themselves(damaged):
    flip_in_w(damaged / "2")
    reader, target = Checkpoints(damaged, read_only=True), abstract(state_of(0))
    with pytest.raises(DamagedCheckpoint, match=r"student.w"):
        reader.restore_student(2, target.params["student"])
    step, student, wrong = reader.newest(lambda step: reader.restore_student(step, target.params["student"]))
    assert (step, list(wrong)) == (1, [2])
    assert same(student, state_of(1).params["student"])
    assert reader.steps() == [1, 2]
    for step in ("1", "2"):
        shutil.rmtree(damaged / step / "mixture")
    checkpoints = Checkpoints(damaged)
    with pytest.raises(ValueError, match=r"checkpoints/2.*checkpoints/1"):
        checkpoints.recover(abstract(state_of(0)))
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()
    assert Checkpoints(damaged / "nothing").recover(abstract(state_of(0))) is None


@contextlib.contextmanager
def limit(what: int, number: int):
    before = resource.getrlimit(what)
    resource.setrlimit(what, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def alone(what: str, directory: Path) -> None:
    """Run a function of this file in a process of its own: its limits must not meet what else pytest is doing."""
    environment = process_environment()
    environment["PYTHONPATH"] += os.pathsep + str(REPOSITORY / "tests")
    command = [sys.executable, __file__, what, str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def cannot_read(directory: Path) -> None:
    checkpoints = Checkpoints(directory)
    with limit(resource.RLIMIT_NOFILE, 3), pytest.raises(OSError, match="Too many open files"):
        checkpoints.restore(2, abstract(state_of(0)))
    assert checkpoints.recover(abstract(state_of(0))).step == 2
    checkpoints.close()


@pytest.mark.slow
def test_a_machine_that_cannot_read_now_has_no_damaged_checkpoint(damaged):
    alone("cannot_read", damaged)


def cannot_write(directory: Path) -> None:
    checkpoints = Checkpoints(directory, Keep(9))
    checkpoints.save(1, state_of(1), {"tokens": 1})
    checkpoints.wait()

    def go_on():
        checkpoints.save(2, state_of(2, size=2**16), {"tokens": 2})
        for _ in range(3000):
            checkpoints.check()  # as the loop does after each step
            time.sleep(0.01)

    with limit(resource.RLIMIT_FSIZE, 2**20), pytest.raises(OSError, match="step 1"):
        go_on()
    assert (checkpoints.steps(), checkpoints.latest()) == ([1], 1)
    checkpoints.close()  # says nothing more


@pytest.mark.slow
def test_a_write_that_fails_in_the_background_is_noticed_and_earlier_steps_stand(tmp_path):
    """A full disk, as far as one can have it without a disk: files may not grow beyond a limit."""
    alone("cannot_write", tmp_path)
    # In another process, as it would be: threads of a write that failed may go on for a while in their own.
    again = Checkpoints(tmp_path, Keep(9))
    recovered = again.recover(abstract(state_of(0)))
    assert (recovered.step, recovered.warnings) == (1, ())
    again.save(2, state_of(2), {"tokens": 2})
    again.wait()
    assert again.steps() == [1, 2]
    again.close()


if __name__ == "__main__":
    {"cannot_read": cannot_read, "cannot_write": cannot_write}[sys.argv[1]](Path(sys.argv[2]))


def test_a_message_is_one_whole_sentence():
    """TensorStore adds its spec, of a few hundred characters, which was cut in the middle of a word."""
    spec = "[tensorstore_spec='{" + "context " * 60 + "}']"
    reason = checkpoint_errors.first_line(ValueError(f'NOT_FOUND: Metadata at "x/.zarray" does not exist {spec}\nmore'))
    assert reason == 'NOT_FOUND: Metadata at "x/.zarray" does not exist'
    assert checkpoint_errors.first_line(ValueError("word " * 99)).endswith("word ...")
    assert checkpoint_errors.first_line(ValueError()) == "ValueError"
