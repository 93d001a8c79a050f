"""What a checkpoint's arrays and values were when they were saved: a few bytes that are saved with them."""

import functools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxkd.core.types import PyTree
from jaxkd.train.checkpoint_errors import Damaged, judged

FORMAT = 1
_LARGE = 2**14  # numbers that may as well be added up one by one
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # of eight bytes two words


class Leaf(NamedTuple):
    """An array as it was saved."""

    dtype: str
    shape: tuple[int, ...]
    checksum: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Manifest(NamedTuple):
    """What a step holds."""

    step: int
    metric: float | None  # by which steps are compared, lower is better; None where it was not measured
    leaves: dict[str, Leaf]  # of the train state, by path
    progress: int  # checksum of the JSON beside it


# -------------------------------------------------------------------------------------------- checksums


def checksum(array: jax.Array, folded: bool = False) -> jax.Array:
    """sum_i mix(w_i XOR mix(i + 1)) mod 2^32: a checksum that is made where the array is, whatever its shards.

    w_i is the element at place i in C order as an unsigned integer, mix the 32-bit finaliser of MurmurHash3. Both are
    one to one, so a single element that differs always shows; of anything else one in 2^32 does not.

    Args:
        array: any shape, on any mesh: every device adds up its own part.
        folded: how it is added up: the same number either way.
    """
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = _mix(words ^ _mix(place + jnp.uint32(1)))
    return jnp.sum(_folded(mixed) if folded else mixed, dtype=jnp.uint32)


def _folded(numbers: jax.Array) -> jax.Array:
    """Fewer numbers with the same sum, the second half added to the first again and again.

    On a CPU, XLA adds up one number after the other, with all that makes them in the same loop. Whole arrays it takes
    eight numbers at a time and on all cores, three times as fast; the barriers keep them apart. It takes the memory of
    the array once more, so it is not for accelerators, which add up as fast as they read.
    """
    numbers = jax.lax.optimization_barrier(numbers.reshape(-1))
    while numbers.size > _LARGE and numbers.size % 2 == 0:
        first, second = jnp.split(numbers, 2)
        numbers = jax.lax.optimization_barrier(first + second)
    return numbers


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: checksum(leaf) for name, leaf in leaves.items()}


_folded_checksum = jax.jit(functools.partial(checksum, folded=True))


def checksums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """Of every array; all processes that hold a part of them call this together."""

    def on_one_cpu(leaf: jax.Array) -> bool:
        return [device.platform for device in leaf.devices()] == ["cpu"]

    folded = [name for name, leaf in leaves.items() if leaf.size > _LARGE and on_one_cpu(leaf)]
    found = jax.device_get(_checksums({name: leaf for name, leaf in leaves.items() if name not in folded}))
    for name in folded:  # one after the other: in one program their memory would be that of all of them
        found[name] = jax.device_get(_folded_checksum(leaves[name]))
    return {name: int(found[name]) for name in leaves}


def named(tree: PyTree) -> dict[str, Any]:
    """Leaves that are arrays, by a path that does not tell tuples, dicts and NamedTuples apart, as on disk."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    name = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
    return {".".join(map(name, path)): leaf for path, leaf in found if hasattr(leaf, "shape")}


def _of_json(value: Any) -> int:
    """CRC-32 of a JSON value, whatever the order of its keys and its white space."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":")).encode())


# ------------------------------------------------------------------------------------ writing, reading


def make(step: int, state: PyTree, progress: dict[str, Any], metric: float | None = None) -> dict[str, Any]:
    """A step's manifest as JSON; waits for the arrays, and passes once over them.

    Args:
        step: updates made.
        state: what is saved.
        progress: the JSON that is saved beside it.
        metric: left out when it is not finite, so that it can never be the best.
    """
    leaves = named(state)
    sums = checksums(leaves)
    body = {
        "format": FORMAT,
        "step": step,
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "leaves": {
            name: {"dtype": str(np.dtype(leaf.dtype)), "shape": list(leaf.shape), "checksum": sums[name]}
            for name, leaf in leaves.items()
        },
        "progress": _of_json(progress),
    }
    return body | {"checksum": _of_json(body)}


def text(step: epath.Path, item: str) -> str:
    """The JSON file of an item of a step.

    Raises:
        Damaged, OSError: it cannot be read, as `damage.judged`.
    """
    try:
        return (step / item / "metadata").read_text()
    except FileNotFoundError:
        raise Damaged(f"{item}/metadata is missing (or an older jaxkd wrote it)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise judged(error) from error


def read(text: str, step: int) -> Manifest:
    """A manifest from its JSON.

    Args:
        text: the file's.
        step: that it should be of.

    Raises:
        Damaged: it is not what was written, or is of another step.
        ValueError: a later jaxkd wrote it.
    """
    try:
        body = json.loads(text)
        form, written = body["format"], body.pop("checksum")
        if form != FORMAT:
            raise ValueError(f"its manifest has format {form}, this jaxkd reads {FORMAT}: use the jaxkd that wrote it")
        if _of_json(body) != written:
            raise Damaged("its manifest is not what was written")
        leaves = {name: Leaf(x["dtype"], tuple(x["shape"]), x["checksum"]) for name, x in body["leaves"].items()}
        found = Manifest(body["step"], body["metric"], leaves, body["progress"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise Damaged("its manifest is not the JSON that was written") from None
    if found.step != step:
        raise Damaged(f"it is a copy of step {found.step}")
    return found


def compare(leaves: dict[str, Leaf], wanted: dict[str, Any], whole: bool = False) -> None:
    """See that what was saved has the dtypes and shapes that are asked for: Orbax would cast a wrong dtype in silence.

    Args:
        leaves: what was saved.
        wanted: some of it, or all, with `shape` and `dtype`.
        whole: whether it must be all.

    Raises:
        ValueError: naming the first array that differs, or that is not wanted.
    """
    for name, leaf in wanted.items():
        asked, there = f"{np.dtype(leaf.dtype)}{list(leaf.shape)}", str(leaves.get(name, "nothing"))
        if there != asked:
            raise ValueError(f"{name} should be {asked}, there is {there}")
    if whole and (more := [name for name in leaves if name not in wanted]):
        raise ValueError(f"it holds {more[0]}, {leaves[more[0]]}, which this config has no place for")


def within(leaves: Iterable[str], *path: str) -> set[str]:
    """What the arrays that are below a path are called there."""
    found = [name.split(".") for name in leaves]
    return {keys[len(path)] for keys in found if tuple(keys[: len(path)]) == path and len(keys) > len(path)}


def portions(leaves: Mapping[str, Leaf], most: int) -> Iterator[list[str]]:
    """All names, those together whose arrays are at most so many bytes, or one."""
    together: list[str] = []
    size = 0
    for name, leaf in leaves.items():
        one = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if together and size + one > most:
            yield together
            together, size = [], 0
        together.append(name)
        size += one
    if together:
        yield together


def verify(leaves: dict[str, Leaf], arrays: dict[str, jax.Array]) -> None:
    """See that arrays are those that were saved, bit for bit.

    Args:
        leaves: what was saved.
        arrays: what was read.

    Raises:
        Damaged: naming arrays that are not.
    """
    wrong = [name for name, number in checksums(arrays).items() if number != leaves[name].checksum]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Damaged(f"{', '.join(wrong[:3])}{more} read from it differ from what was saved (checksum)")


def progress(manifest: Manifest, text: str) -> dict[str, Any]:
    """The JSON beside the state, from its file.

    Raises:
        Damaged: it is not what was saved.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        raise Damaged("its mixture is not the JSON that was written") from None
    if not isinstance(found, dict) or _of_json(found) != manifest.progress:
        raise Damaged("its mixture differs from what was saved (checksum)")
    return found
