"""The manifest of a checkpoint: dtype, shape and checksum of every array, committed with the step."""

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
from jaxkd.train.checkpoint_errors import DamagedCheckpoint, classify

FORMAT = 1
_LARGE = 2**14  # elements above which a CPU sums an array by halves
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # an element of eight bytes is two words


class Leaf(NamedTuple):
    """A saved array of the train state."""

    dtype: str
    shape: tuple[int, ...]
    checksum: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Manifest(NamedTuple):
    """The contents of a step."""

    step: int
    metric: float | None  # lower is better; None if not measured
    leaves: dict[str, Leaf]  # by dotted path
    progress: int  # checksum of the JSON of mixture and counters


def checksum(array: jax.Array, folded: bool = False) -> jax.Array:
    """[] uint32: sum_i mix(w_i XOR mix(i + 1)) mod 2^32, independent of the array's sharding.

    w_i is the element at index i in C order as an unsigned integer, mix the 32-bit finaliser of MurmurHash3. Both are
    bijective, so one changed element always changes the sum; any other change is missed once in 2^32. `folded` sums by
    `_fold`, with the same result.
    """
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = _mix(words ^ _mix(index + jnp.uint32(1)))
    return jnp.sum(_fold(mixed) if folded else mixed, dtype=jnp.uint32)


def _fold(numbers: jax.Array) -> jax.Array:
    """At most `_LARGE` numbers (or an odd count) with the same sum: the second half is added to the first repeatedly.

    XLA's CPU reduction is a scalar loop with the producer fused into it. Adding whole arrays is vectorised and
    parallel, three times as fast, and the barriers prevent fusion. It takes the array's memory once more, so it is not
    for accelerators, whose reductions already run at memory speed.
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
    """`checksum` of every array; a collective call of all processes that hold shards."""

    def on_one_cpu(leaf: jax.Array) -> bool:
        return [device.platform for device in leaf.devices()] == ["cpu"]

    folded = [name for name, leaf in leaves.items() if leaf.size > _LARGE and on_one_cpu(leaf)]
    sums = jax.device_get(_checksums({name: leaf for name, leaf in leaves.items() if name not in folded}))
    for name in folded:  # one program each, so that only one has temporaries at a time
        sums[name] = jax.device_get(_folded_checksum(leaves[name]))
    return {name: int(sums[name]) for name in leaves}


def arrays_by_path(tree: PyTree) -> dict[str, Any]:
    """Array leaves by dotted path, the same path for tuples, dicts and NamedTuples, as on disk."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    name = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
    return {".".join(map(name, path)): leaf for path, leaf in leaves if hasattr(leaf, "shape")}


def _json_checksum(value: Any) -> int:
    """CRC-32 of a JSON value with sorted keys and no white space."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":")).encode())


def build(step: int, state: PyTree, progress: dict[str, Any], metric: float | None = None) -> dict[str, Any]:
    """A step's manifest as JSON values; waits for the arrays. A metric that is not finite is stored as None."""
    leaves = arrays_by_path(state)
    sums = checksums(leaves)
    body = {
        "format": FORMAT,
        "step": step,
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "leaves": {
            name: {"dtype": str(np.dtype(leaf.dtype)), "shape": list(leaf.shape), "checksum": sums[name]}
            for name, leaf in leaves.items()
        },
        "progress": _json_checksum(progress),
    }
    return body | {"checksum": _json_checksum(body)}


def item_text(step: epath.Path, item: str) -> str:
    """The JSON file of an item ("manifest" or "mixture") in a step's directory; errors: see `classify`."""
    try:
        return (step / item / "metadata").read_text()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{item}/metadata is missing (or an older jaxkd wrote it)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise classify(error) from error


def parse(text: str, step: int) -> Manifest:
    """The manifest in a file's text.

    Raises:
        DamagedCheckpoint: it was changed, or is of another step.
        ValueError: a later jaxkd wrote it.
    """
    try:
        body = json.loads(text)
        form, written = body["format"], body.pop("checksum")
        if form != FORMAT:
            raise ValueError(f"its manifest has format {form}, this jaxkd reads {FORMAT}: use the jaxkd that wrote it")
        if _json_checksum(body) != written:
            raise DamagedCheckpoint("its manifest fails its checksum")
        leaves = {name: Leaf(x["dtype"], tuple(x["shape"]), x["checksum"]) for name, x in body["leaves"].items()}
        manifest = Manifest(body["step"], body["metric"], leaves, body["progress"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint("its manifest is not valid JSON of a manifest") from None
    if manifest.step != step:
        raise DamagedCheckpoint(f"it is a copy of step {manifest.step}")
    return manifest


def check_shapes(leaves: dict[str, Leaf], wanted: dict[str, Any], complete: bool = False) -> None:
    """Check that saved dtypes and shapes are the wanted ones, since Orbax casts silently.

    Raises ValueError: naming the first array that differs, or with `complete` one that is not wanted.
    """
    for name, leaf in wanted.items():
        expected, saved = f"{np.dtype(leaf.dtype)}{list(leaf.shape)}", str(leaves.get(name, "nothing"))
        if saved != expected:
            raise ValueError(f"{name} should be {expected}, it holds {saved}")
    if complete and (extra := [name for name in leaves if name not in wanted]):
        raise ValueError(f"it holds {extra[0]}, {leaves[extra[0]]}, which this config does not have")


def children(leaves: Iterable[str], *path: str) -> set[str]:
    """The next key of every dotted name below a path."""
    names = [name.split(".") for name in leaves]
    return {keys[len(path)] for keys in names if tuple(keys[: len(path)]) == path and len(keys) > len(path)}


def portions(leaves: Mapping[str, Leaf], limit: int) -> Iterator[list[str]]:
    """All names, in lists whose arrays have at most `limit` bytes in total or are a single array."""
    portion: list[str] = []
    size = 0
    for name, leaf in leaves.items():
        nbytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if portion and size + nbytes > limit:
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += nbytes
    if portion:
        yield portion


def verify_checksums(leaves: dict[str, Leaf], arrays: dict[str, jax.Array]) -> None:
    """Check that restored arrays equal the saved ones bit for bit; DamagedCheckpoint names those that do not."""
    wrong = [name for name, number in checksums(arrays).items() if number != leaves[name].checksum]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DamagedCheckpoint(f"{', '.join(wrong[:3])}{more} read from it differ from what was saved (checksum)")


def parse_progress(manifest: Manifest, text: str) -> dict[str, Any]:
    """The JSON values saved beside the train state; DamagedCheckpoint if they were changed."""
    try:
        progress = json.loads(text)
    except json.JSONDecodeError:
        raise DamagedCheckpoint("its mixture is not valid JSON") from None
    if not isinstance(progress, dict) or _json_checksum(progress) != manifest.progress:
        raise DamagedCheckpoint("its mixture differs from what was saved (checksum)")
    return progress
