"""Shared by test files: small texts, small models, commands in this process or in one of their own."""

import atexit
import contextlib
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""The type checker of the tests; an int passes as a float."""

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = "JAXKD_TEST_CACHE"
"""Variable that names the directory of compiled programs which all processes of a session share."""
if CACHE not in os.environ:  # in the first process of a session; pytest-xdist's workers inherit it
    os.environ[CACHE] = tempfile.mkdtemp(prefix="jaxkd-tests-")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
_CACHE_SETTINGS = {
    "jax_compilation_cache_dir": os.environ[CACHE],
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
_SENTENCE = "the teacher tells a student what it knows and every token has a price in nats"
WORDS = _SENTENCE.split()


def write_domain(path: Path, seed: int, documents: int = 60) -> Path:
    """A JSONL file of short made-up documents: enough text for a few dozen rows."""
    rng = random.Random(seed)
    lines = [
        json.dumps({"text": f"{seed} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(20, 120)))})
        for i in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tokenizer(folder: Path, template: str) -> Path:
    """A byte-level tokenizer with `<end>` as end token, and a chat template unless that is empty."""
    import tokenizers as library

    letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    inner = library.Tokenizer(library.models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    inner.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<end>", **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def random_params(config, seed: int, spread: float = 0.05):
    """A decoder's parameters from numpy, without compilation; norms and biases differ from their initial values too."""
    import jax
    import numpy as np

    from jaxkd.models import transformer

    rng = np.random.default_rng(seed)
    shapes, axes = transformer.abstract(config)

    def draw(leaf, names):
        centre = 1.0 if set(names) <= {"layers", "embed"} or names == ("layers", "head_dim") else 0.0  # a norm's scale
        return jax.numpy.asarray((centre + spread * rng.normal(size=leaf.shape)).astype(np.float32))

    return jax.tree.map(draw, shapes, axes)


def recipe(*arguments: str):
    """The experiment of `--config...` arguments, of which the first may be the name of a recipe in configs/."""
    from jaxkd.config.recipe import read_config
    from jaxkd.config.schema import experiment

    first, *more = arguments
    named = first if first.startswith("--") else f"--config={REPOSITORY / 'configs' / first}"
    return experiment(read_config([named, *more]))


def batch_of(tokens, **fields):
    """A batch of whole rows: each token's target is the next one and its weight 1, unless `fields` say otherwise."""
    import jax.numpy as jnp
    import numpy as np

    from jaxkd.core.types import Batch

    tokens, row = np.asarray(tokens, np.int32), np.zeros(len(tokens), np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    values = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": ones.astype(np.float32)}
    values |= {"segments": ones, "positions": positions, "row": row, "domain": row} | fields
    return Batch(**{name: jnp.asarray(value) for name, value in values.items()})


def tiny_arguments(domains: dict[str, Path], rows: Path, *more: str) -> list[str]:
    """`--config...` arguments: the tiny recipe on these domains instead of its own."""
    return [
        "--config=" + str(REPOSITORY / "configs" / "tiny.py"),
        *("--config.data.domains.code=", "--config.data.domains.manual="),  # which read Python's whole library
        *[f"--config.data.domains.{name}={path}" for name, path in domains.items()],
        f"--config.data.directory={rows}",
        *more,
    ]


def jaxkd(*arguments: str, devices: int = 1, **options) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "jaxkd", *arguments],
        env=process_environment(devices),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )


def here(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command line in this process, which saves a process its start and imports."""
    from jaxkd.cli import main

    output, errors, code = io.StringIO(), io.StringIO(), 0
    with _compiled_once(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main.console(arguments)
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def succeeds(*arguments: str) -> str:
    """What a command prints that must succeed."""
    result = here(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def fails(*arguments: str) -> str:
    """The one line on stderr of a command that fails."""
    result = here(*arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    complaint = [line for line in result.stderr.splitlines() if line.startswith("jaxkd: error:")]
    assert len(complaint) == 1, result.stderr
    return complaint[0]


@contextlib.contextmanager
def _compiled_once() -> Iterator[None]:
    """Switch JAX's compilation cache on for a command; other tests inspect programs that must be compiled anew."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = {name: jax.config.values[name] for name in _CACHE_SETTINGS}
    try:
        for name, value in _CACHE_SETTINGS.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it reads the settings only once
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def process_environment(devices: int = 1, cache: bool = True) -> dict[str, str]:
    """The environment of a user's shell, with this many fake devices.

    Processes share compiled programs, unless a test needs each of them to compile (`cache=False`). LLVM's optimiser is
    off, as in the tests' own process.
    """
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
    if cache:
        environment |= {name.upper(): str(value) for name, value in _CACHE_SETTINGS.items()}
    return environment


def program(path: Path, text: str) -> None:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def free_address() -> str:
    """A free port of this machine as HOST:PORT."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(
    *command: str, count: int = 1, devices: int = 1, last: tuple[str, ...] = (), **environment: str
) -> list[subprocess.Popen]:
    """Python with these arguments in processes that find each other; `last` are more arguments for the last of them."""
    environment = process_environment(devices) | {"JAX_PLATFORMS": "cpu"} | environment
    if count > 1:
        environment |= {"JAXKD_COORDINATOR": free_address(), "JAXKD_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *command, *(last if index == count - 1 else ())],
            env=environment | ({"JAXKD_PROCESS_ID": str(index)} if count > 1 else {}),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


TIMINGS = ("tokens_per_s", "step_s", "tflops", "rule_s", "rule_share")
SMALL = (
    "--config.run.steps=12",
    "--config.run.checkpoint_every=3",
    "--config.run.eval_every=6",
    "--config.data.interval=5",
    "--config.run.keep_checkpoints=1",
)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logged(workdir: Path, file: str = "metrics.jsonl") -> list[dict]:
    """The rows of a log without their timings."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in lines(workdir / file)]


def final_state(workdir: Path, step: int = 12) -> tuple[dict, dict]:
    """Every array of a checkpoint as bytes, and its mixture."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    reader, path = ocp.PyTreeCheckpointer(), workdir.absolute() / "checkpoints" / str(step)
    shapes = reader.metadata(path / "train").item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    tree = reader.restore(path / "train", ocp.args.PyTreeRestore(restore_args=as_numpy))
    mixture = json.loads((path / "mixture" / "metadata").read_text())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}, mixture


def abstract(state):
    """Shapes, dtypes and shardings of a tree of arrays."""
    import jax

    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def flip_a_bit(directory: Path, array: bytes) -> None:
    """Of the only file that holds the array, in its middle, as a disk may: nothing in Orbax or TensorStore notices."""
    [file] = [f for f in directory.rglob("*") if f.is_file() and array in f.read_bytes()]
    content = bytearray(file.read_bytes())
    content[content.index(array) + len(array) // 2] ^= 1
    file.write_bytes(content)


def assert_same_run(workdir: Path, reference: Path) -> None:
    assert logged(workdir) == logged(reference)
    assert logged(workdir, "mixture.jsonl") == logged(reference, "mixture.jsonl")
    assert lines(workdir / "evals.jsonl") == lines(reference / "evals.jsonl")
    (state, mixture), (expected, expected_mixture) = final_state(workdir), final_state(reference)
    assert len(expected) > 20
    assert state == expected
    assert mixture == expected_mixture


class Background:
    """A run in a process of its own, to be killed or signalled."""

    def __init__(self, workdir: Path, arguments: list[str], cache: bool = True, verb: str = "train"):
        self.workdir = workdir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxkd", verb, "--workdir", str(workdir), *arguments],
            env=process_environment(8, cache),  # as many as this process has: programs are then bitwise the same
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int, file: str = "metrics.jsonl") -> None:
        """Wait until a file has that many lines, or the run is over."""
        deadline = time.monotonic() + 300
        path = self.workdir / file
        while time.monotonic() < deadline and self.process.poll() is None:
            if path.exists() and path.read_text().count("\n") >= step:
                return
            time.sleep(0.005)
        assert self.process.poll() is not None, "the run made no progress"

    def kill_at(self, step: int) -> None:
        """SIGKILL once so many steps are logged."""
        self.wait_for_step(step)
        self.process.kill()
        self.finish()

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=300)
        return output


def lines_so_far(workdir: Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


class Collective(NamedTuple):
    """A collective operation of a compiled program."""

    name: str
    shapes: tuple[tuple[int, ...], ...]  # of its results, one an operand
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Every collective in the text of an optimised HLO module; `in_loop` where a loop repeats it."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if (start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)) is not None:
            name = start.group(1)
        bodies.setdefault(name, []).append(line)
    inner_names = r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)"
    called = {n: set(re.findall(inner_names, "\n".join(b))) for n, b in bodies.items()}
    looping, queue = set(), list(re.findall(r"body=%?([\w.\-]+)", text))
    while queue:
        if (inner := queue.pop()) not in looping:
            looping.add(inner)
            queue.extend(called.get(inner, ()))
    operations = []
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for computation, lines in bodies.items():
        for line in lines:
            if (match := re.match(rf"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({kinds})(?:-start)?\(", line)) is not None:
                sizes = re.findall(r"\w+\[([\d,]*)\]", match.group(1))
                shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for dims in sizes)
                operations.append(Collective(match.group(2), shapes, computation in looping))
    return operations
