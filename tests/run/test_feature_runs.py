"""Recipes with features: what they refuse, what they build, and TED's two stages as runs."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from harness import recipe, tiny_arguments

from jaxkd.run import job, load, loop, restore


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ("hidden_mse(layers={3: 2})", r"objective.feature.feature names layer 3 of the student, .* layers 1 to 2"),
        ("hidden_mse(layers={1: 9})", r"names layer 9 of the teacher, which has layers 1 to 4"),
        ("hidden_mse(layers={})", r"objective.feature.feature: layers must map student layers to teacher layers"),
        ("hidden_mse(layer={1: 2})", r"objective.feature.feature: .*layer"),
        ("relations(layers={1: 2}, heads=5)", r"objective.feature: heads=5 must divide the student's qq of layer 1"),
        ("", r"objective\.feature .*neither"),
    ],
)
def test_wrong_features_are_said_in_one_line(feature, message):
    with pytest.raises(ValueError, match=message):
        job.build(recipe("features.py", f"--config.objective.feature.feature={feature}"))


def test_a_term_is_of_one_kind():
    e = recipe("features.py")
    term = e.objective["feature"]
    both = dataclasses.replace(term, divergence="forward_kl")
    with pytest.raises(ValueError, match=r"objective\.x .*'forward_kl'"):
        job.build(dataclasses.replace(e, objective={"x": both}))
    warm = dataclasses.replace(term, temperature=2.0)
    with pytest.raises(ValueError, match=r"objective\.x\.temperature"):
        job.build(dataclasses.replace(e, objective={"x": warm}))
    still = dataclasses.replace(e, student=dataclasses.replace(e.student, frozen=True))
    with pytest.raises(ValueError, match=r"student\.frozen"):
        job.build(dataclasses.replace(still, objective={"ce": e.objective["ce"]}))


@pytest.mark.parametrize("name", ["hidden", "attention"])
def test_every_feature_of_the_recipe_builds(name):
    built = job.build(recipe(f"features.py:{name}"))
    assert set(built.state.params["objective"]) == ({"feature"} if name == "hidden" else set())
    for leaf in jax.tree.leaves(built.state.params["objective"]):
        assert leaf.sharding.spec == jax.sharding.PartitionSpec("data", None)  # as wide as the model: spread like it


def handed_on(e):
    return restore.objective_params(e.student.objective_from, job.build(e).state.params["objective"])


def train(e, rows, workdir, steps=3):
    """The first steps of a run, saved; its loop without the log."""
    run = loop.Run(job.build(e), workdir, rows, say=lambda line: None)
    params = lambda: jax.tree.map(np.asarray, run.state.params | {"student": run.student})
    first, losses = params(), []
    for batch in itertools.islice(run._interval(0), steps):
        run.state, metrics = run.step(run.state, run.frozen, run.teachers.train.state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    run.checkpoints.save(steps, run.state, run._progress())
    run.checkpoints.close()
    return first, params(), losses


@pytest.mark.slow
def test_ted_from_filters_to_the_student(two_domains, tmp_path):
    def stage(name, *more):
        arguments = tiny_arguments(two_domains, tmp_path / "rows", "--config.run.mesh.data=1", *more)[3:]
        return recipe(f"ted.py:{name}", "--config.data.domains.code=", "--config.data.domains.manual=", *arguments)

    e = stage("stage1")
    built = job.build(e)
    with jax.set_mesh(built.mesh):
        rows = load.domains(e.data, built.models.tokenizer, progress=False)
        first, last, losses = train(e, rows, tmp_path / "one")
        jax.tree.map(np.testing.assert_array_equal, last["student"], first["student"])
        assert losses[-1] < losses[0]
        filters = last["objective"]["ted"]
        assert set(filters) == {"student_layer_1", "student_layer_2", "teacher_layer_2", "teacher_layer_4"}
        assert all((filters[k] != first["objective"]["ted"][k]).any() for k in filters)
        # The frozen student is in no checkpoint: a resumed run and the other verbs load it again.
        saved = json.loads((tmp_path / "one/checkpoints/3/manifest/metadata").read_text())["leaves"]
        assert {name.split(".")[1] for name in saved if name.startswith("params.")} == {"objective"}
        resumed = loop.Run(built, tmp_path / "one", rows, print)
        jax.tree.map(np.testing.assert_array_equal, resumed.student, first["student"])
        jax.tree.map(np.testing.assert_array_equal, resumed.state.params["objective"], last["objective"])
        resumed.checkpoints.close()
        step, student, _ = restore.student(e.run, tmp_path / "one", built.models, resumed.frozen, None)
        assert step == 3
        jax.tree.map(np.testing.assert_array_equal, student, first["student"])

        begin, end, _ = train(
            stage("stage2", f"--config.student.objective_from={tmp_path / 'one'}"), rows, tmp_path / "two"
        )
        jax.tree.map(np.testing.assert_array_equal, begin["student"], first["student"])
        jax.tree.map(np.testing.assert_array_equal, begin["objective"]["ted"], filters)
        assert (end["student"]["embed"] != begin["student"]["embed"]).any()
        for name, leaf in end["objective"]["ted"].items():
            assert (leaf != filters[name]).any() == name.startswith("student")  # nor do the teacher's decay

        # A resumed run has its own checkpoint, whatever became of the first one's.
        again = loop.Run(
            job.build(stage("stage2", "--config.student.objective_from=gone")), tmp_path / "two", rows, print
        )
        jax.tree.map(np.testing.assert_array_equal, again.state.params["objective"], end["objective"])
        again.checkpoints.close()

    one = f"--config.student.objective_from={tmp_path / 'one' / 'checkpoints' / '3'}"
    assert set(handed_on(stage("stage2", one))["ted"]) == set(filters)
    wide, moved = "--config.teacher.shape.embed=48", "--config.objective.ted.feature=ted_match(layers={1: 3})"
    for more, error, message in (
        (["--config.student.objective_from=gone"], FileNotFoundError, "gone is no run's workdir"),
        ([one, wide], ValueError, r"one/checkpoints/3 .*ted.student_layer_1"),
        ([one, moved], ValueError, "ted.teacher_layer_3"),
    ):
        with pytest.raises(error, match=message):
            handed_on(stage("stage2", *more))
    e = stage("stage2", one)
    renamed = dataclasses.replace(e, objective={"other": e.objective["ted"]})
    with pytest.raises(ValueError, match=r"'ted'.*'other'"):
        handed_on(renamed)
