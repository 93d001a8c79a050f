"""Recipes, overrides and blocks: what they resolve to, and the key that an error names."""

import json
from pathlib import Path

import jax
import pytest
from harness import REPOSITORY, fails, here, recipe, succeeds, tiny_arguments

from jaxkd.config import recipe as recipes
from jaxkd.config import reference
from jaxkd.config.schema import Domain, Schedule, Term, experiment, plain
from jaxkd.run import job
from jaxkd.run.batch import rows_batch
from jaxkd.teachers.online import online
from jaxkd.train.step import make_step

TINY = "--config=" + str(REPOSITORY / "configs" / "tiny.py")


def resolved(*overrides: str):
    return recipe("tiny.py", *overrides)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["student.frozen=true"], "student.frozen", True),
        (["student.frozen=False"], "student.frozen", False),
        (["run.seed=3"], "run.seed", 3),
        (["optim.lr.peak=1e-4"], "optim.lr.peak", 1e-4),
        (["optim.clip=inf"], "optim.clip", float("inf")),
        (["optim.clip=2", "optim.clip=None"], "optim.clip", 1.0),
        (["student.layers=(1,2)"], "student.layers", (1, 2)),
        (["student.layers=2"], "student.layers", (2,)),
        (["student.layers=None"], "student.layers", ()),
        (["teacher.temperatures=(2.0)"], "teacher.temperatures", (2.0,)),
        (["teacher.temperatures=1,2"], "teacher.temperatures", (1.0, 2.0)),
        (["teacher.cache=a b=c"], "teacher.cache", "a b=c"),
        (["teacher.cache=x", "teacher.cache="], "teacher.cache", ""),
        (["teacher.shape.tied=true"], "teacher.shape.tied", True),
        (["teacher.members.a.path=x", "teacher.members.a.domains.code=1"], "teacher.members.a.domains", {"code": 1.0}),
        (["objective.kd.weight={'schedule': 'linear', 'peak': 1}"], "objective.kd.weight", Schedule("linear", 1.0)),
        (["objective.kd.weight.schedule=linear", "objective.kd.weight.peak=1"], "objective.kd.weight.peak", 1.0),
        (["objective.new={'feature': 'f()', 'weight': 1, 'standardize': true}"], "objective.new.standardize", True),
        (["objective.new.feature=f()", "objective.new.weight=0.1"], "objective.new.feature", "f()"),
        (["objective.ce=None"], "objective", {"kd": Term(0.5, "forward_kl")}),
        (
            ["data.domains.code=", "data.domains.en.wiki=x"],
            "data.domains",
            {"manual": "builtin:manual", "en.wiki": "x"},
        ),
        (["data.domains.code.field=a.b"], "data.domains.code", Domain("builtin:code", "a.b")),
        (["data.domains={'a': 'x'}", "data.domains.b={c,d}.txt"], "data.domains", {"a": "x", "b": "{c,d}.txt"}),
        (["data.domains.code.validation=y"], "data.sources.code", Domain("builtin:code", "", "y")),
        (["data.domains.a.source=x", "data.domains.a.field=b.c"], "data.sources.a", Domain("x", "b.c")),
    ],
)
def test_overrides(overrides, key, value):
    value_read = resolved(*[f"--config.{override}" for override in overrides])
    for name in key.split("."):
        value_read = value_read[name] if isinstance(value_read, dict) else getattr(value_read, name)
    assert value_read == value
    assert type(value_read) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr.paek=1", r"optim\.lr\.paek.*optim\.lr\.peak"),
        ("run.mesh.contxt=2", r"run\.mesh\.contxt.*run\.mesh\.context"),
        ("objective.kd.wieght=1", r"objective\.kd\.wieght.*objective\.kd\.weight"),
        ("peak=1", r"optim\.lr\.peak"),
        ("nothing=1", r"nothing.*docs/config\.md"),
        ("optim.lr=1", r"write --config\.optim\.lr\.peak=1"),
        ("objective=forward_kl", r"write --config\.objective\.NAME\.divergence=forward_kl"),
        ("data.domains=x", r"write --config\.data\.domains\.NAME=x"),
        ("data.domains.cod=", r"data\.domains\.cod.*code"),
        ("run.steps=many", r"run\.steps.*many"),
        ("student.frozen=1", r"student\.frozen.*1"),
        ("objective.new.feature=f()", r"objective\.new\.weight"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ValueError, match=message):
        resolved(f"--config.{override}")


def test_flags_take_no_other_flag_and_one_recipe_is_read():
    frozen, seed, workdir = "--config.student.frozen", "--config.run.seed", ["--workdir", "W"]
    assert recipes.split([frozen, *workdir]) == (workdir, [f"{frozen}=true"])
    assert recipes.split([frozen, "false", *workdir, seed, "-1"]) == (workdir, [f"{frozen}=false", f"{seed}=-1"])
    for rest in (workdir, []):
        with pytest.raises(ValueError, match=r"run\.seed"):
            recipes.split([seed, *rest])
    with pytest.raises(ValueError, match=r"student\.frozen"):
        recipes.split(["--config.student.frozn", *workdir])
    with pytest.raises(FileNotFoundError, match=r"configs/nope\.py"):
        recipes.read_config(["--config=configs/nope.py"])
    with pytest.raises(ValueError, match="--config"):
        recipes.read_config([])
    values = recipes.read_config([f"--config={REPOSITORY / 'configs' / 'logit_kd.py'}:generalized_jsd(beta=0.3)"])
    assert values["objective"]["kd"]["divergence"] == "generalized_jsd(beta=0.3)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", r"recipe\.py.*SyntaxError"),
        ("x = 1", r"recipe\.py.*get_config"),
        ("def get_config():\n    return {}['x']", r"recipe\.py.*KeyError.*line 2"),
        ("def get_config():\n    return 1", r"recipe\.py.*ConfigDict"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path, text, message):
    file = tmp_path / "recipe.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipes.read_config([f"--config={file}"])


def test_a_recipe_may_be_a_dict_with_dots_in_names(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text("def get_config():\n    return {'data': {'domains': {'en.wiki': 'x'}}}")
    override = "--config.data.domains.en.wiki=y"
    assert recipes.read_config([f"--config={file}", override]) == {"data": {"domains": {"en.wiki": "y"}}}


def test_what_a_recipe_resolves_to():
    """Every key of a run that states few: a changed default changes old recipes."""
    assert plain(resolved()) == json.loads((Path(__file__).parent / "tiny.json").read_text())
    page = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference.render(), "run python -m jaxkd.config.reference > docs/config.md"
    assert all(f"`{key}`" in page for key in ("run.mesh.model", "objective.NAME.weight", "data.domains.NAME.field"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {"setps": 3}}, r"run\.setps.*steps"),
        ({"run": {}}, r"run\.steps"),
        ({"run": {"steps": "3"}}, r"run\.steps"),
        ({"run": {"steps": 10**5000}}, r"run\.steps"),
        ({"optim": {"lr": {"schedule": "linear", "peak": 10**400}}}, r"optim\.lr\.peak"),
        ({"student": {"layers": 3}}, r"student\.layers"),
        ({"objective": {"kd": 1.0}}, r"objective\.kd"),
    ],
)
def test_blocks_are_strict(change, message):
    values = recipes.read_config([TINY])
    with pytest.raises(ValueError, match=message):
        experiment({**values, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objective.kd.divergence=forward_lk", r"objective\.kd\.divergence.*forward_kl"),
        ("objective.kd.divergence=generalized_jsd(gamma=1)", r"objective\.kd\.divergence.*gamma"),
        ("objective.kd.divergence=generalized_jsd(beta=1.0)", r"objective\.kd\.divergence.*beta"),
        ("objective.kd.divergence=__import__('os')", r"objective\.kd\.divergence"),
        ("objective.kd.token_weights=prefx(share=0.3)", r"objective\.kd\.token_weights.*prefix"),
        ("optim.lr.schedule=cosin", r"optim\.lr\.schedule.*cosine"),
        ("run.dtype=float16", r"run\.dtype.*bfloat16"),
        ("run.remat=all", r"run\.remat"),
        ("run.mesh.model=3", r"there are 8"),
        ("data.batch=12", r"data\.batch=12"),
        ("optim.micro_batches=0", r"optim\.micro_batches"),
        ("optim.spike=-1.0", r"optim\.spike"),
        ("optim.lr.peak=nan", r"optim\.lr\.peak"),
        ("optim.clip=nan", r"optim\.clip"),
        ("optim.clip=-1", r"optim\.clip"),
        ("optim.b1=nan", r"optim\.b1"),
        ("optim.b2=1.0", r"optim\.b2"),
        (f"run.steps={10**400}", r"run\.steps"),
        (f"optim.lr.warmup={10**400}", r"optim\.lr\.warmup"),
        ("student.keep=2", r"student\.layers and student\.keep"),
        ("student.path=nowhere", "nowhere"),
        ("teacher.path=meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("data.tokenizer=teacher", r"data\.tokenizer"),
        ("data.length=4096", r"data\.length=4096"),
        ("data.domains.mean=builtin:code", r"data\.domains\.mean"),
        ("run.seed=-1", r"run\.seed"),
        ("run.seed=9223372036854775808", r"run\.seed"),
        ("objective.kd.temperature=0.0", r"objective\.kd\.temperature"),
        ("objective.ce.weight=-1.0", r"objective\.ce\.weight"),
        ("student.layers=(0,9)", r"student\.layers"),
        ("student.layers=(2,1)", r"student\.layers"),
        ("teacher.shape.kv_heads=3", r"teacher\.shape"),
        ("teacher.shape.kv_heads=0", r"teacher\.shape\.kv_heads"),
        ("teacher.shape.embed=-32", r"teacher\.shape\.embed"),
        ("teacher.shape.widht=3", r"teacher\.shape\.widht"),
    ],
)
def test_values_that_do_not_fit(change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        job.build(resolved(f"--config.{change}"))


@pytest.mark.parametrize("name", sorted(p.stem for p in (REPOSITORY / "configs").glob("*.py")))
def test_every_recipe_builds_abstractly(name):
    rows = ["--config.data.batch=64", "--config.run.eval_batch=64"]  # for eight devices
    e = recipe(f"{name}.py", *rows)
    try:
        built = job.build(e)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    step = make_step(built.models.student.forward, online({}, built.models.teacher.forward), built.objective, built.tx)
    state, metrics = jax.eval_shape(step, built.state, built.frozen, built.models.teacher.shapes, rows_batch(e.data))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), built.state)
    assert "loss" in metrics


OWN = """
from jaxkd.core.types import Divergence
from jaxkd.losses import divergences

def my_kl(beta=1.0):
    return divergences.mixed_kl(beta)

def wrong():
    return 1
"""


def test_a_divergence_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_losses").mkdir()
    (tmp_path / "own_losses" / "kl.py").write_text(OWN)
    (tmp_path / "own_losses" / "broken.py").write_text("1 / 0")
    own = lambda text: job.build(resolved(f"--config.objective.kd.divergence={text}")).objective
    assert own("own_losses.kl:my_kl(beta=0.5)").uses_teacher
    own("own_losses.kl:my_kl")
    for text, message in (
        ("own_losses.kl:my_lk", "my_kl"),
        ("own_losses.kl:my_kl(gamma=1)", "gamma"),
        ("own_losses.kl:my_kl(beta=__import__('os'))", "literals"),
        ("own_losses.kl:wrong", "Divergence.*int"),
        ("own_losses.lk:my_kl", "own_losses.lk.*PYTHONPATH"),
        ("own_losses.broken:my_kl", "ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=rf"objective\.kd\.divergence.*{message}"):
            own(text)


def test_mixture_by_name():
    built = job.build(resolved("--config.data.mixture=code=3,manual=1"))
    assert built.rule.init([10, 20], None)[0].tolist() == [0.75, 0.25]
    assert job.build(resolved()).rule.init([10, 30], None)[0].tolist() == [0.25, 0.75]
    assert job.build(resolved("--config.data.mixture=ddk(alpha=0.3)")).rule.measures
    for name, message in (
        ("cod=1", "data.mixture.*cod"),
        ("unifrom", "data.mixture.*uniform"),
        ("ddk(alpha=2.0)", "data.mixture.*alpha"),
        ("code=much", "data.mixture.*code=much"),
    ):
        with pytest.raises(ValueError, match=message):
            job.build(resolved(f"--config.data.mixture={name}"))


def test_errors_are_one_line(tmp_path, two_domains):
    arguments = tiny_arguments(two_domains, tmp_path / "rows")
    workdir = ["--workdir", str(tmp_path / "run")]
    assert "run.steps" in fails("train", *workdir, *arguments, "--config.run.step=1")
    assert "nowhere" in fails("train", *workdir, *arguments, "--config.teacher.path=nowhere")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\x03\0\0\0" + bytes(4))
    assert "cut.gguf" in fails("train", *workdir, *arguments, f"--config.teacher.path={cut}")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty" in fails("prepare", *arguments, f"--config.data.domains.empty={empty}")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    assert str(foreign) in fails("train", "--workdir", str(foreign), *arguments)
    assert (foreign / "thesis.tex").read_text() == "mine"
    assert "nothing" in fails("evaluate", "--workdir", str(tmp_path / "nothing"))


def test_help_names_every_verb():
    output = succeeds("--help")
    assert all(verb in output for verb in ("prepare", "train", "evaluate", "export", "report"))
    assert "--config.optim.lr.peak" in here("train", "--help").stdout
