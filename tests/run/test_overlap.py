"""The loop waits for nothing that it need not wait for: the next step is under way before a step's numbers are read."""

import contextlib

import jax
import pytest
from harness import here, tiny_arguments

from jaxkd.core import metrics
from jaxkd.data import loader
from jaxkd.run import loop, program
from jaxkd.train.checkpoint import Checkpoints

MORE = ("--config.run.steps=8", "--config.run.checkpoint_every=8", "--config.data.interval=100", "--no-check")
MORE += ("--config.run.mesh.data=1",)


@pytest.fixture(scope="module")
def events(two_domains, tmp_path_factory):
    """What a run's training thread did, in order, with every transfer that is not asked for forbidden."""
    place, found = tmp_path_factory.mktemp("overlap"), []
    steps, compiled, read, put, save = (
        loop.Run._steps,
        program.jitted_step,
        metrics.read,
        loader.to_devices,
        Checkpoints.save,
    )

    def guarded(self, *arguments):
        found.append("loop")
        with jax.transfer_guard("disallow"):
            return steps(self, *arguments)

    def observed(*arguments):
        step = compiled(*arguments)

        def call(*more):
            found.append("dispatch")
            return step(*more)

        return call

    def noting(name, function, guard=contextlib.nullcontext):
        def call(*arguments):
            found.append(name)
            with guard():
                return function(*arguments)

        return call

    # A number that is asked for in passing, as by float(x) or `if x:`; on a CPU no transfer guard sees it.
    kind = type(jax.numpy.zeros(()))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("__float__", "__int__", "__bool__", "__index__", "block_until_ready"):
            patch.setattr(kind, name, noting("wait", getattr(kind, name)))
        patch.setattr(loop.Run, "_steps", guarded)
        patch.setattr(program, "jitted_step", observed)
        patch.setattr(metrics, "read", noting("read", read))
        # A batch is asked for; Orbax copies as it likes, while nothing trains.
        allowed = lambda: jax.transfer_guard("allow")
        patch.setattr(loader, "to_devices", noting("place", put, allowed))
        patch.setattr(Checkpoints, "save", noting("save", save, allowed))
        result = here("train", "--workdir", str(place / "run"), *tiny_arguments(two_domains, place / "rows", *MORE))
    assert result.returncode == 0, result.stderr
    return found[found.index("loop") + 1 :]


def test_a_step_is_read_when_the_next_one_is_under_way(events):
    """Batch, step, then the numbers of the step before: the device always has a step to do, and its batch beside it."""
    first = events[: events.index("save")]
    assert first[:2] == ["place", "dispatch"]
    assert first[2:23] == ["place", "dispatch", "read"] * 7
    assert first[23] == "read"  # the last one is waited for


def test_nothing_is_moved_that_was_not_asked_for(events):
    """The run ended well with `jax.transfer_guard("disallow")` around its loop; nothing asked for one number."""
    assert events.count("dispatch") == 8
    assert "wait" not in events[: events.index("save")]
