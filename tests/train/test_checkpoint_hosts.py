"""Checkpoints of two processes: each writes its part, both read the same, and what one cannot read neither uses."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import abstract, start

from jaxkd.train.checkpoint import Checkpoints
from jaxkd.train.retention import Keep
from jaxkd.train.state import TrainState

# In each process: a state of which it holds half, and what is asked for in turn.
PROGRAM = """
import os, sys
import jax, jax.numpy as jnp
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(os.environ["JAXKD_COORDINATOR"], 2, int(os.environ["JAXKD_PROCESS_ID"]))
from jax.sharding import NamedSharding, PartitionSpec
from jaxkd.core import sharding
from jaxkd.train.checkpoint import Checkpoints
from jaxkd.train.retention import Keep
from jaxkd.train.state import TrainState

mesh = sharding.make_mesh(2, 1)
place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
where = TrainState(place(), {"student": {"w": place("data")}, "objective": {}}, (place("data"), place()))
def state(step):
    w = jnp.float32(step) + jnp.arange(64.0).reshape(8, 8) / 7
    return TrainState(jnp.int32(step), {"student": {"w": w}, "objective": {}}, (w * 2, jnp.ones(3)))
make = jax.jit(state, out_shardings=where)
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
for argument in sys.argv[1:]:  # a directory for each of us
    checkpoints = Checkpoints(argument.split(",")[jax.process_index()], Keep(2, best=1))
    if not checkpoints.steps():
        for step, loss in ((1, 0.5), (2, 2.0), (3, 1.0), (4, 3.0)):
            checkpoints.save(step, make(step), {"tokens": step}, loss)
            checkpoints.check()
        checkpoints.wait()
    try:
        recovered = checkpoints.recover(target)
        mine = recovered.state.params["student"]["w"].addressable_shards[0].data
        expected = make(recovered.step).params["student"]["w"].addressable_shards[0].data
        assert (mine == expected).all()
        print("said: step", recovered.step, recovered.progress, *recovered.warnings)
    except (ValueError, OSError) as error:
        print("said:", type(error).__name__, error)
    print("said:", checkpoints.best(), checkpoints.steps())
    checkpoints.close()
"""


def state_of(step: int) -> TrainState:
    """The program's, in one process."""
    w = jnp.float32(step) + jnp.arange(64.0).reshape(8, 8) / 7
    return TrainState(jnp.int32(step), {"student": {"w": w}, "objective": {}}, (w * 2, jnp.ones(3)))


def both(*pairs) -> list[list[str]]:
    """What each of two processes says of its directories."""
    processes = start("-c", PROGRAM, *(f"{one},{two}" for one, two in pairs), count=2)
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    return [[line[6:] for line in output.splitlines() if line.startswith("said: ")] for output, _ in results]


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    shared = tmp_path / "shared"
    for lines in both((shared, shared)):
        assert lines == ["step 4 {'tokens': 4}", "1 [1, 3, 4]"]

    # One process, another mesh: what both wrote.
    state, _ = Checkpoints(shared, read_only=True).restore(4, abstract(state_of(0)))
    jax.tree.map(np.testing.assert_array_equal, state, state_of(4))

    copy = lambda name: shutil.copytree(shared, tmp_path / name)
    lacking, damaged = (copy("one"), copy("lacking")), (copy("two"), copy("damaged"))
    shutil.rmtree(lacking[1] / "4")
    (damaged[1] / "4" / "mixture" / "metadata").write_text('{"tokens": 5}')
    checkpoints = Checkpoints(shared, Keep(9))  # and on in one process
    checkpoints.save(5, state_of(5), {"tokens": 5})
    checkpoints.close()

    mine = [1, 3], [1, 3, 4]
    for lines, steps in zip(both(lacking, damaged, (shared, shared)), mine, strict=True):
        # A disk that process 1 does not share: both say the same, and neither changes anything.
        assert lines[0].startswith("ValueError there is no checkpoint")
        assert "1, 3; " in lines[0]
        assert lines[0].endswith("(process 1)")
        # What one process finds damaged is not used by the other; process 0 sets aside what it sees.
        assert lines[2].startswith("step 3 {'tokens': 3} checkpoint ")
        assert "mixture" in lines[2]
        assert "(process 1)" in lines[2]
        assert lines[3] == f"1 {steps}"
        assert lines[4:] == ["step 5 {'tokens': 5}", "1 [1, 3, 4, 5]"]
    assert Checkpoints(lacking[0], read_only=True).steps() == [1, 3, 4]
    assert (damaged[0] / "4.aside").is_dir()
