"""The door: recipes, overrides and blocks; every wrong input is one line that says what to do."""

import dataclasses
import errno
import shutil
import subprocess
from types import SimpleNamespace

import jax
import pytest
from harness import REPOSITORY, jaxkd, tiny_arguments, write_domain

from jaxkd.config import recipe as config
from jaxkd.config.schema import experiment
from jaxkd.run import job, restore
from jaxkd.run import workdir as workdirs
from jaxkd.run.load import check_one_device, host_params
from jaxkd.train.checkpoint import Checkpoints
from jaxkd.train.step import make_step

TINY = "--config=" + str(REPOSITORY / "configs" / "tiny.py")


def resolved(*overrides: str):
    return experiment(config.read_config([TINY, *overrides]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optim.lr.paek=1", r"unknown key --config.optim.lr.paek: did you mean optim.lr.peak"),
        ("--config.run.mesh.contxt=2", r"did you mean run.mesh.context or run.mesh.data or run.mesh.model"),
        ("--config.optim.lr=1", r"it is a block; set one of optim.lr.end, optim.lr.peak"),
        ("--config.run.steps=many", r"--config.run.steps must be int, got 'many'"),
        ("--config.nothing=1", r"unknown key --config.nothing"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ValueError, match=message):
        config.read_config([TINY, override])


def test_overrides_reach_the_blocks():
    e = resolved("--config.optim.lr.peak=1e-4", "--config.student.layers=(1,2)", "--config.data.domains.mine=/x")
    assert e.optim.lr.peak == 1e-4
    assert e.student.layers == (1, 2)
    assert e.data.domains["mine"] == "/x"
    assert "code" not in resolved("--config.data.domains.code=").data.domains


def test_recipe_must_exist():
    with pytest.raises(FileNotFoundError, match=r"no config file configs/nope\.py"):
        config.read_config(["--config=configs/nope.py"])
    with pytest.raises(ValueError, match="give one recipe"):
        config.read_config([])


def test_recipe_argument_reaches_get_config():
    values = config.read_config([f"--config={REPOSITORY / 'configs' / 'logit_kd.py'}:generalized_jsd(beta=0.3)"])
    assert values["objective"]["kd"]["divergence"] == "generalized_jsd(beta=0.3)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {"setps": 3}}, r"unknown key config.run.setps: did you mean steps"),
        ({"run": {}}, r"missing key config.run.steps"),
        ({"run": {"steps": "3"}}, r"config.run.steps must be int, got '3'"),
        ({"student": {"layers": 3}}, r"config.student.layers must be a sequence"),
        ({"objective": {"kd": 1.0}}, r"config.objective.kd must be a block"),
    ],
)
def test_blocks_are_strict(change, message):
    values = config.read_config([TINY])
    with pytest.raises(ValueError, match=message):
        experiment({**values, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "objective.kd.divergence=forward_lk",
            r"unknown .* 'forward_lk': did you mean forward_kl",
        ),
        ("objective.kd.divergence=generalized_jsd(gamma=1)", r"objective.kd.divergence.*gamma"),
        ("objective.kd.divergence=generalized_jsd(beta=1.0)", r"0 < beta < 1"),
        ("objective.kd.divergence=__import__('os')", r"objective.kd.divergence"),
        ("optim.lr.schedule=cosin", r"unknown optim.lr.schedule 'cosin': did you mean cosine"),
        ("run.dtype=float16", r"unknown run.dtype 'float16': did you mean"),
        ("run.remat=all", r"unknown run.remat 'all'"),
        ("run.mesh.model=3", r"there are 8"),
        ("data.batch=12", r"data.batch=12 must be a multiple"),
        ("optim.micro_batches=0", r"optim.micro_batches must be at least 1"),
        ("optim.spike=-1.0", r"optim.spike must be finite and at least 0, got -1.0"),
        ("student.keep=2", r"exclude each other"),
        ("student.path=nowhere", r"nowhere: no such file or directory"),
        ("teacher.path=meta-llama/Llama-3.2-1B", r"nothing is downloaded at run time"),
        ("data.tokenizer=teacher", r"a random model has none"),
        ("data.length=4096", r"beyond the teacher's context of 2048"),
        ("data.domains.mean=builtin:code", r"cannot be called 'mean'"),
        ("objective.kd.temperature=0.0", r"temperature must be above 0"),
        ("objective.ce.weight=-1.0", r"weight must not be negative"),
        ("student.layers=(0,9)", r"from 0 to 3"),
        ("student.layers=(2,1)", r"different and rising"),
        ("teacher.shape.kv_heads=3", r"not a multiple of kv_heads=3"),
        ("teacher.shape.widht=3", r"unknown key teacher.shape.widht"),
    ],
)
def test_values_that_do_not_fit(change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        job.build(resolved(f"--config.{change}"))


def test_tokenizer_that_does_not_match_the_weights():
    values = config.read_config([TINY])
    shape = {**values["teacher"]["shape"], "vocab": 128}
    with pytest.raises(ValueError, match="the tokenizer has 257 ids but the teacher's weights have 128"):
        job.build(experiment({**values, "teacher": {**values["teacher"], "shape": shape}}))


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (REPOSITORY / "configs").glob("*.py")))
def test_every_recipe_builds_abstractly(recipe):
    e = experiment(config.read_config([f"--config={REPOSITORY / 'configs' / recipe}.py"]))
    rows = e.data.batch * 2 if e.data.batch % (8 * e.optim.micro_batches) else e.data.batch
    e = dataclasses.replace(
        e,
        data=dataclasses.replace(e.data, batch=rows),
        run=dataclasses.replace(e.run, eval_batch=8 * e.run.eval_batch),
    )
    try:
        built = job.build(e)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from jaxkd.teachers.online import online

    step = make_step(built.student.forward, online({}, built.teacher.forward), built.objective, built.tx)
    state, metrics = jax.eval_shape(step, built.state, built.teacher.shapes, job.abstract_batch(built))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), built.state)
    assert "loss" in metrics


def test_mixture_by_name():
    built = job.build(resolved("--config.data.mixture=code=3,manual=1"))
    assert job.rule(built).init([10, 20], None)[0].tolist() == [0.75, 0.25]
    assert job.rule(job.build(resolved())).init([10, 30], None)[0].tolist() == [0.25, 0.75]
    assert job.rule(job.build(resolved("--config.data.mixture=ddk(alpha=0.3)"))).measures
    for name, message in (
        ("cod=1", "no domain 'cod': did you mean code"),
        ("unifrom", "unknown data.mixture 'unifrom': did you mean uniform"),
        ("ddk(alpha=2.0)", "data.mixture: alpha must be from 0 to 1, got 2.0"),
        ("code=much", "must be a rule, such as ddk"),
    ):
        with pytest.raises(ValueError, match=message):
            job.build(resolved(f"--config.data.mixture={name}"))


def test_random_weights_follow_the_seed():
    built = job.build(resolved())
    first, again, other = (host_params(built.teacher, seed) for seed in (0, 0, 1))
    assert (first["embed"] == again["embed"]).all()
    assert (first["embed"] != other["embed"]).any()


# ------------------------------------------------------------------------------ as a user sees it


def fails(*arguments: str, **options) -> str:
    """The one line on stderr of a command that fails."""
    result = jaxkd(*arguments, **options)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    complaint = [line for line in result.stderr.splitlines() if line.startswith("jaxkd: error:")]
    assert len(complaint) == 1, result.stderr
    return complaint[0]


def test_a_model_that_one_device_does_not_hold_is_not_tried_there():
    """student.keep would end in a device's own words, on every start, whatever the size of the mesh."""
    model = {"embedding": jax.ShapeDtypeStruct((2**17, 4096), "bfloat16")}
    device = lambda known: SimpleNamespace(memory_stats=lambda: known)
    for enough in (None, {}, {"bytes_limit": 3 * 2**30}):
        check_one_device(model, device(enough))
    with pytest.raises(ValueError, match=r"student.keep tries .* its 2.0 GiB in float32 do not fit: name the layers"):
        check_one_device(model, device({"bytes_limit": 2 * 2**30}))


def test_errors_are_one_line(tmp_path, two_domains):
    arguments = tiny_arguments(two_domains, tmp_path / "rows")
    workdir = ["--workdir", str(tmp_path / "run")]
    assert "did you mean run.steps" in fails("train", *workdir, *arguments, "--config.run.step=1")
    assert "no such file" in fails("train", *workdir, *arguments, "--config.teacher.path=nowhere")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\x03\0\0\0" + bytes(4))
    assert "cut.gguf" in fails("train", *workdir, *arguments, f"--config.teacher.path={cut}")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "0 distinct documents" in fails("prepare", *arguments, f"--config.data.domains.empty={empty}")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    assert "holds no jaxkd run" in fails("train", "--workdir", str(foreign), *arguments)
    assert (foreign / "thesis.tex").read_text() == "mine"
    assert "holds no run" in fails("evaluate", "--workdir", str(tmp_path / "nothing"))


def test_a_corrected_command_may_reuse_a_workdir_in_which_nothing_was_trained(tmp_path, two_domains):
    e = resolved()
    other = dataclasses.replace(e, run=dataclasses.replace(e.run, seed=5))
    workdir = tmp_path / "run"
    assert workdirs.claim(workdir, e, False) == []
    (workdir / "evals.jsonl").write_text("of the first student")
    assert workdirs.claim(workdir, other, False) == []
    assert not (workdir / "evals.jsonl").exists()
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run\.seed decides which rows a step sees"):
        workdirs.claim(workdir, e, True)
    longer = dataclasses.replace(other, run=dataclasses.replace(other.run, steps=99))
    with pytest.raises(ValueError, match=r"another experiment: run\.steps: 20 -> 99\. Use a new --workdir"):
        workdirs.claim(workdir, longer, False)
    assert workdirs.claim(workdir, longer, True) == ["run.steps: 20 -> 99"]
    assert workdirs.saved_experiment(workdir) == other  # until `adopt`, which follows a successful start


def test_logged_steps_are_kept_when_checkpoints_are_gone(tmp_path):
    e = resolved()
    other = dataclasses.replace(e, optim=dataclasses.replace(e.optim, clip=2.0))
    workdirs.claim(tmp_path, e, False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"optim\.clip"):
        workdirs.claim(tmp_path, other, False)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_checkpoints_that_lie_where_marks_would_are_kept(tmp_path):
    """A run whose checkpoints were moved to another place has whole ones and marks side by side."""
    e, elsewhere = resolved(), tmp_path / "elsewhere"
    e = dataclasses.replace(e, run=dataclasses.replace(e.run, checkpoints=str(elsewhere)))
    (elsewhere / "20").mkdir(parents=True)
    (elsewhere / "20" / "commit_success.txt").write_text("")
    marks = tmp_path / "checkpoints"
    for step, names in {"5": ("commit_success.txt", "train"), "10": ("commit_success.txt",)}.items():
        (marks / step).mkdir(parents=True)
        for name in names:
            (marks / step / name).write_text("")
    restore.mark(e, tmp_path, Checkpoints(elsewhere, read_only=True))
    assert sorted(path.name for path in marks.iterdir()) == ["20", "5"]
    assert (marks / "5" / "train").exists()


def test_one_process_at_a_time(tmp_path):
    with (
        workdirs.lock(tmp_path),
        pytest.raises(ValueError, match="another process is training"),
        workdirs.lock(tmp_path),
    ):
        pass
    with workdirs.lock(tmp_path):
        pass


def test_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    """Lustre without flock and NFS without its lock server: a run is told, and goes on."""
    for number in (errno.ENOSYS, errno.ENOLCK):
        monkeypatch.setattr("fcntl.flock", lambda *_, number=number: (_ for _ in ()).throw(OSError(number, "no")))
        with workdirs.lock(tmp_path):
            pass
        said = f"jaxkd: {tmp_path / '.lock'} is on a file system without locks: see to it that no other"
        assert capsys.readouterr().err.startswith(said)
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error") as raised, workdirs.lock(tmp_path):
        pass
    assert raised.value.filename == str(tmp_path / ".lock")


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"data": ')
    with pytest.raises(ValueError, match=r"config\.json is no JSON: put it back, or begin anew in another --workdir"):
        workdirs.saved_experiment(tmp_path)


def test_no_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert workdirs.commit() is None


def test_recipes_that_cannot_be_read(tmp_path):
    for text, message in (("def get_config(:", "SyntaxError"), ("x = 1", "get_config")):
        recipe = tmp_path / f"broken{len(text)}.py"
        recipe.write_text(text)
        assert message in fails("prepare", f"--config={recipe}")


def test_help_names_every_verb():
    result = jaxkd("--help")
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in ("prepare", "train", "evaluate", "export", "report"))
    assert "--config.optim.lr.peak" in jaxkd("train", "--help").stdout


@pytest.mark.slow
def test_rows_that_changed_under_a_run_are_noticed(tmp_path):
    text = write_domain(tmp_path / "a.jsonl", 3)
    arguments = tiny_arguments({"a": text}, tmp_path / "rows", "--config.run.steps=2", "--config.run.eval_every=0")
    workdir = ["--workdir", str(tmp_path / "run")]
    assert jaxkd("train", *workdir, *arguments).returncode == 0
    write_domain(text, 4)
    assert "the rows of a are not those" in fails("train", *workdir, *arguments)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mount"), reason="needs a small file system of its own")
def test_a_full_disk_is_said_plainly(tmp_path, two_domains):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        more = ["--config.run.steps=4", "--config.run.checkpoint_every=1", "--config.run.keep_checkpoints=9"]
        arguments = tiny_arguments(two_domains, tmp_path / "rows", *more)
        complaint = fails("train", "--workdir", str(place / "run"), *arguments)
        assert "the disk is full: a checkpoint takes" in complaint
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
