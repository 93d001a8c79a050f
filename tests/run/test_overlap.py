"""The loop waits for nothing that it need not wait for: the next step is under way before a step's numbers are read."""

import contextlib

import jax
import pytest
from harness import succeeds, tiny_arguments

from jaxkd.core import metrics
from jaxkd.data import loader
from jaxkd.run import loop, program
from jaxkd.train.checkpoint import Checkpoints

MORE = ("--config.run.steps=8", "--config.run.checkpoint_every=8", "--config.data.interval=100", "--no-check")
MORE += ("--config.run.mesh.data=1",)


@pytest.fixture(scope="module")
def events(two_domains, tmp_path_factory):
    """What a run's training thread did, in order, with every transfer that is not asked for forbidden."""
    root, events, compiled = tmp_path_factory.mktemp("overlap"), [], program.jitted_step

    def noting(name, function, guard=contextlib.nullcontext):
        def call(*arguments):
            events.append(name)
            with guard():
                return function(*arguments)

        return call

    # A number that is asked for in passing, as by float(x) or `if x:`; on a CPU no transfer guard sees it.
    kind = type(jax.numpy.zeros(()))
    # A batch is asked for; Orbax copies as it likes, while nothing trains.
    allowed, disallowed = (lambda: jax.transfer_guard("allow")), (lambda: jax.transfer_guard("disallow"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("__float__", "__int__", "__bool__", "__index__", "block_until_ready"):
            patch.setattr(kind, name, noting("wait", getattr(kind, name)))
        patch.setattr(loop.Run, "_steps", noting("loop", loop.Run._steps, disallowed))
        patch.setattr(program, "jitted_step", lambda *arguments: noting("dispatch", compiled(*arguments)))
        patch.setattr(metrics, "read", noting("read", metrics.read))
        patch.setattr(loader, "to_devices", noting("place", loader.to_devices, allowed))
        patch.setattr(Checkpoints, "save", noting("save", Checkpoints.save, allowed))
        succeeds("train", "--workdir", str(root / "run"), *tiny_arguments(two_domains, root / "rows", *MORE))
    return events[events.index("loop") + 1 :]


def test_a_step_is_read_when_the_next_one_is_under_way_and_nothing_else_is(events):
    first = events[: events.index("save")]
    assert first[:2] == ["place", "dispatch"]
    assert first[2:23] == ["place", "dispatch", "read"] * 7
    assert first[23] == "read"  # the last one is waited for
    assert events.count("dispatch") == 8
    assert "wait" not in events[: events.index("save")]
