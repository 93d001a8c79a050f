"""configs/ddk.py: pairs and methods resolve to the settings of the paper."""

import pytest
from harness import REPOSITORY, recipe

from jaxkd.config.recipe import read_config
from jaxkd.report.records import leaves
from jaxkd.run import job

RECIPE = f"--config={REPOSITORY / 'configs' / 'ddk.py'}"
PAIRS = ("qwen", "llama", "starcoder", "small")
METHODS = ("ddk", "no_smoothing", "uniform", "kd", "minillm", "cpt", "doremi_proxy", "doremi", "ted_filters", "ted")


def read(argument, *more):
    return recipe(f"ddk.py:{argument}", *more)


def test_the_default_is_the_papers_setting():
    e = recipe("ddk.py")
    assert (e.teacher.path, e.student.path) == ("models/Qwen1.5-14B", "models/Qwen1.5-1.8B")
    assert len(e.data.domains) == 10
    assert (e.data.mixture, e.data.interval, e.data.valid_rows) == ("ddk(alpha=0.5)", 1000, 500)
    assert {name: (t.divergence, t.weight, t.temperature) for name, t in e.objective.items()} == {
        "ce": ("next_token", 1.0, 1.0),
        "kd": ("forward_kl", 0.2, 1.0),
    }
    assert (e.optim.lr.peak, e.optim.lr.warmup, e.optim.lr.end, e.run.steps) == (3e-5, 1000, 3e-6, 30_000)
    assert e.data.batch * e.data.length * e.run.steps == pytest.approx(15e9, rel=0.06)
    for argument in ("x", "small,llama", "kd,cpt"):
        with pytest.raises(ValueError, match=rf"ddk\.py .*'{argument}'"):
            read(argument)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_combination_is_small_and_differs_from_ddk_where_it_says(pair):
    ddk = read(pair)
    for method in METHODS:
        assert len(leaves(read_config([f"{RECIPE}:{pair},{method}"]))) < 60
        e = read(f"{pair},{method}")
        assert (e.data.domains, e.optim, e.run) == (ddk.data.domains, ddk.optim, ddk.run)
        same_rows = e.data.mixture == "natural"
        assert same_rows == (method in ("kd", "minillm", "cpt", "ted_filters", "ted"))
    assert read(f"{pair},minillm").objective["kd"].divergence == "reverse_kl"
    assert list(read(f"{pair},cpt").objective) == ["ce"]


@pytest.mark.parametrize("method", METHODS)
def test_small_builds(method):
    sizes = {"vocab": 257, "embed": 16, "layers": 30, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16}
    shape = [f"--config.teacher.shape.{name}={size}" for name, size in sizes.items()]
    random = ["--config.teacher.path=random", "--config.data.tokenizer=bytes", "--config.run.mesh.data=1", *shape]
    built = job.build(read(f"small,{method}", *random))
    assert built.models.student.config.layers == 15
    assert built.objective.uses_teacher == (method not in ("cpt", "doremi"))
