"""Checkpoints on gs://, through gcsfs and TensorStore's own driver, against a server that speaks the same protocol."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import abstract, free_address, recipe, succeeds

from jaxkd.run import workdir as workdirs
from jaxkd.train.checkpoint import Checkpoints
from jaxkd.train.retention import Keep
from jaxkd.train.state import TrainState

pytest.importorskip("gcsfs", reason="needs the gcs extra")
emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")


@pytest.fixture
def bucket(monkeypatch):
    host, port = free_address().split(":")
    address = f"http://{host}:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs and Google's client
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # TensorStore would look for one
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    server = emulator.create_server(
        "localhost", int(address.rpartition(":")[2]), in_memory=True, default_bucket="bucket"
    )
    server.start()
    yield "gs://bucket"
    server.stop()


def state_of(seed: int) -> TrainState:
    w = jax.random.normal(jax.random.key(seed), (64, 16))
    return TrainState(jnp.int32(seed), {"student": {"w": w}, "objective": {}}, (w * 2, w * 3))


def in_a_directory(bucket: str, runs: str, attempt) -> None:
    """TensorStore writes arrays side by side, and the emulator, when it is slow, was seen to answer one of them with a
    generation that none of its writes had: then the attempt is made anew elsewhere."""
    for directory in (f"{bucket}/{runs}/{name}" for name in ("one", "two", "three")):
        try:
            return attempt(directory)
        except OSError as error:
            if "Malformed StorageGeneration" not in str(error) or directory.endswith("three"):
                raise


@pytest.mark.slow
def test_checkpoints_in_a_bucket(bucket):
    in_a_directory(bucket, "runs", saves_and_restores)


def saves_and_restores(directory: str) -> None:
    checkpoints = Checkpoints(directory, Keep(2, best=1))
    target = abstract(state_of(0))
    assert checkpoints.recover(target) is None
    for step, loss in ((1, 0.5), (2, 2.0), (3, 1.0), (4, 3.0)):
        checkpoints.save(step, state_of(step), {"tokens": step}, loss)
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.best()) == ([1, 3, 4], 1)
    (checkpoints.directory / "4" / "mixture" / "metadata").write_text('{"tokens": 5}')
    checkpoints.close()

    again = Checkpoints(directory, Keep(2, best=1))
    recovered = again.recover(target)
    assert (recovered.step, recovered.progress) == (3, {"tokens": 3})
    assert f"{directory}/4" in recovered.warnings[0]
    jax.tree.map(np.testing.assert_array_equal, recovered.state, state_of(3))
    again.save(4, state_of(4), {"tokens": 4})
    again.wait()
    assert again.steps() == [1, 3, 4]
    assert sorted(p.name for p in again.directory.iterdir()) == ["1", "3", "4", "4.aside"]
    jax.tree.map(np.testing.assert_array_equal, again.restore(4, target)[0], state_of(4))
    again.close()


@pytest.mark.slow
def test_rollback_in_a_bucket(bucket, arguments, tmp_path):
    """As the verb does it: the workdir is on a disk, its checkpoints are not."""

    def attempt(directory: str) -> None:
        workdir = tmp_path / directory.rsplit("/", 1)[1]
        workdirs.write_config(workdir, recipe(*arguments, f"--config.run.checkpoints={directory}"))
        with contextlib.closing(Checkpoints(directory, Keep(9))) as writer:
            for step, loss in ((3, 2.0), (6, 1.0), (9, 3.0)):
                writer.save(step, state_of(step), {"tokens": step}, loss)
            writer.wait()
        output = succeeds("rollback", "--workdir", str(workdir), "--step", "best")
        assert "9.aside" in output
        target = abstract(state_of(0))
        with contextlib.closing(Checkpoints(directory, Keep(9))) as again:
            recovered = again.recover(target)
            jax.tree.map(np.testing.assert_array_equal, recovered.state, state_of(6))
            again.save(9, state_of(1), {"tokens": 1})
            again.wait()
            assert again.steps() == [3, 6, 9]

    # not where the test before was, whose server had other files: gcsfs remembers its lists
    in_a_directory(bucket, "others", attempt)
