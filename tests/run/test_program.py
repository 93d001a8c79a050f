"""The whole step lowers for platforms that this machine does not have."""

import jax
import pytest
from harness import recipe

from jaxkd.planning import plan
from jaxkd.run import program
from jaxkd.run import teacher as teaching


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_the_step_lowers_for_gpus_on_a_mesh(platform):
    overrides = ("--config.run.mesh.data=4", "--config.run.mesh.model=2", "--config.run.dtype=bfloat16")
    job = plan.build(recipe("tiny.py", *overrides), jax.devices())
    teacher = teaching.build_teacher(job.experiment, job.models, plan.teacher_weights(job.models), {}).train
    with jax.set_mesh(job.mesh):
        step = program.jitted_step(job, teacher)
        exported = jax.export.export(step, platforms=[platform])(
            job.state, job.frozen, teacher.state, teaching.abstract_batch(job.experiment, job.models, job.mesh)
        )
    assert exported.platforms == (platform,)
    assert exported.nr_devices == 8
    assert "all_reduce" in exported.mlir_module()  # the head's gradient, over the devices that share its tokens
    assert "stablehlo.while" in exported.mlir_module()  # over chunks of tokens
