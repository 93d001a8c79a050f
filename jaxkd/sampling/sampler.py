"""Autoregressive sampling from any decoder: a prefill of all prompts, then one token at a time in some slots.

A slot decodes one completion. When it has ended, the next one of the queue takes its place, so that one long text does
not hold the others up, and nothing is compiled again: shapes are those of the slots and the queue. Each slot is at a
position of its own, so prompts of unequal lengths waste nothing.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxkd.core.sharding import RULES, Rules, shardings, table
from jaxkd.core.types import Head, PyTree
from jaxkd.kernels.attention import Cache
from jaxkd.kernels.pointwise import logits
from jaxkd.kernels.tiling import current_chip
from jaxkd.models import quantized, transformer
from jaxkd.models.transformer import Config
from jaxkd.sampling.processors import Sampling, penalised, sampling_logprobs


class Decoder(NamedTuple):
    """A model as the sampler runs it: the counterpart of `Forward` for one token at a time.

    `prefill(params, tokens [B P]) -> cache` of all P tokens, each row one document. Its leaves have rows on axis 1 and
    slots, one per position, on axis 3; `cache.length` [B], the tokens of each row, may be set back.
    `decode(params, tokens [B 1], cache) -> (head, cache)`: the next token of every row, as a `Head` with hidden [B 1 D]
    or as logits [B V].
    `prepare(params) -> params`: what both take, computed once before the loop.
    """

    prefill: Callable[[PyTree, jax.Array], Any]
    decode: Callable[[PyTree, jax.Array, Any], tuple[Head | jax.Array, Any]]
    prepare: Callable[[PyTree], PyTree] = lambda params: params


def decoder(config: Config, dtype: Any = jnp.float32, rules: Rules = RULES) -> Decoder:
    """The `Decoder` of a transformer.

    Args:
        dtype: of activations, matmul operands and the cache; logits and sampling are float32.
        rules: logical to mesh axes of its parameters and activations.
    """

    def prefill(params: PyTree, tokens: jax.Array) -> Cache:
        with table(rules):
            return transformer.prefill(config, params, tokens, dtype=dtype)[1]

    def decode(params: PyTree, tokens: jax.Array, cache: Cache) -> tuple[Head, Cache]:
        with table(rules):
            return transformer.extend(config, params, tokens, cache, dtype=dtype)

    def prepare(params: PyTree) -> PyTree:
        params = jax.tree_util.tree_map_with_path(partial(_operand, dtype), params)
        return _gathered(config, rules, params)

    return Decoder(prefill, decode, prepare)


def unrolled(decoder: Decoder) -> Decoder:
    """A transformer's decoder with a program of each layer's own instead of a scan over them.

    On a CPU a scan copies each layer's matrices for each token: at batch 1 the unrolled program takes 0.6 times as long
    per token (SmolLM2-135M, jax 0.10, docs/log.md), at batch 8 no less, and some seconds more to compile.
    """
    return decoder._replace(prepare=lambda params: transformer.unstacked(decoder.prepare(params)))


class Completions(NamedTuple):
    """What was written after each prompt, the prompts' `n` completions one after the other."""

    tokens: Int[jax.Array, "M C"]  # 0 from a completion's length on
    lengths: Int[jax.Array, " M"]  # tokens written, the end token included
    logprobs: Float[jax.Array, "M C"]  # of these tokens under the model, at temperature 1 and without penalties
    drawn_logprobs: Float[jax.Array, "M C"]  # under the distribution they were drawn from; 0 when greedy
    ended: Bool[jax.Array, " M"]  # by an end token, not by the limit


class Queue(NamedTuple):
    """The completions to write, and what each starts from; nothing here changes while they are written."""

    prompts: jax.Array  # [N P]
    lengths: jax.Array  # [N] tokens of each prompt
    limits: jax.Array  # [M] most tokens of each completion
    keys: jax.Array  # [M]
    cache: Any  # the prompts' [N]


class State(NamedTuple):
    """A sampler between two tokens."""

    output: Completions
    cache: Any
    entry: jax.Array  # [B] the completion that a slot writes
    last: jax.Array  # [B] the token that a slot decodes next
    taken: jax.Array  # completions that have had a slot
    seen: jax.Array | None  # [B V] bool: ids of the prompt and the completion, where a penalty needs them
    written: jax.Array | None  # [B V] bool: of the completion


class Sampler(NamedTuple):
    """How completions are written: `queue`, `start`, then `advance` while they are `unfinished`; under `jit` or not."""

    decoder: Decoder
    vocab: int  # ids at and above it are never drawn
    length: int  # room for a completion
    sampling: Sampling = Sampling()
    ends: tuple[int, ...] = ()
    n: int = 1  # completions of each prompt, from one prefill
    slots: int = 0  # completions that are written at a time; 0: all of them

    def queue(
        self, params: PyTree, prompts: jax.Array, lengths: jax.Array, keys: jax.Array, limits: jax.Array | None = None
    ) -> Queue:
        """Prefill of the prompts [N P].

        The token at place t of a completion is drawn with fold_in(key, t); completion j > 0 of a prompt has the key
        fold_in(key, 2^32 - j). So a text depends on its prompt and key, not on slots, other rows or devices.

        Args:
            params: prepared ones.
            lengths: [N]; clipped to [1, P].
            keys: [N], one a prompt.
            limits: [N] most tokens of each prompt's completions; None: `length` for all.
        """
        lengths = jnp.clip(lengths, 1, prompts.shape[1])
        limits = jnp.full_like(lengths, self.length) if limits is None else jnp.minimum(limits, self.length)
        # One token is set back, so that the first decoded one is the prompt's last.
        cache = self.decoder.prefill(params, prompts)._replace(length=lengths - 1)
        if self.n > 1:
            more = jnp.uint32(2**32 - 1) - jnp.arange(self.n - 1, dtype=jnp.uint32)
            rest = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(more))(keys)
            keys = jnp.concatenate([keys[:, None], rest], 1).reshape(-1)
        return Queue(prompts, lengths, jnp.repeat(limits, self.n), keys, cache)

    def start(self, queue: Queue) -> State:
        """The first completions in their slots, nothing written yet."""
        total = len(queue.keys)
        count = min(self.slots or total, total)
        tokens, numbers = jnp.zeros((total, self.length), jnp.int32), jnp.zeros((total, self.length))
        output = Completions(tokens, jnp.zeros(total, jnp.int32), numbers, numbers, jnp.zeros(total, bool))
        entry = jnp.arange(count)
        prompt = slice(None) if count == total and self.n == 1 else entry // self.n
        # Room for the completion behind each prompt.
        pads = lambda x: [(0, self.length if axis == 3 else 0, 0) for axis in range(x.ndim)]
        cache = jax.tree.map(
            lambda x: jax.lax.pad(x[:, prompt], jnp.zeros((), x.dtype), pads(x)), slots_of(queue.cache)
        )
        cache = queue.cache._replace(**cache, length=queue.cache.length[prompt])
        last = _last(queue, prompt)
        seen = self._marks(queue, prompt) if self.sampling.repetition_penalty != 1 else None
        written = jnp.zeros((count, self.vocab), bool) if self.sampling.presence_penalty else None
        return State(output, cache, entry, last, jnp.int32(count), seen, written)

    def unfinished(self, queue: Queue, state: State) -> jax.Array:
        """Whether `advance` would write anything."""
        return self._writing(queue, state).any() | (state.taken < len(queue.keys))

    def advance(self, params: PyTree, queue: Queue, state: State, steps: int | None = None) -> State:
        """All slots decode up to so many tokens, or until every completion is finished."""

        def more(carry: tuple[jax.Array, State]) -> jax.Array:
            count, state = carry
            goes_on = self.unfinished(queue, state)
            return goes_on if steps is None else goes_on & (count < steps)

        def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            count, state = carry
            return count + 1, self._step(params, queue, state)

        return jax.lax.while_loop(more, step, (jnp.int32(0), state))[1]

    def _fixed(self, queue: Queue) -> bool:
        """Whether every completion has its own slot; then a row stays where it is, on a mesh too."""
        return not 0 < self.slots < len(queue.keys)

    def _writing(self, queue: Queue, state: State) -> jax.Array:
        take = (lambda x: x) if self._fixed(queue) else (lambda x: x[state.entry])
        return ~take(state.output.ended) & (take(state.output.lengths) < take(queue.limits))

    def _marks(self, queue: Queue, prompt: Any) -> jax.Array:
        """[B V] which ids a prompt has."""
        prompts, lengths = queue.prompts[prompt], queue.lengths[prompt]
        ids = jnp.where(jnp.arange(prompts.shape[1]) < lengths[:, None], prompts, self.vocab)
        rows = jnp.arange(len(ids))[:, None]
        return jnp.zeros((len(ids), self.vocab), bool).at[rows, ids].set(True, mode="drop")

    def _refilled(self, queue: Queue, state: State) -> State:
        """The next completions of the queue in the slots that have finished theirs."""
        free = ~self._writing(queue, state)
        number = state.taken + jnp.cumsum(free) - 1
        free &= number < len(queue.keys)

        def fill() -> State:
            entry = jnp.where(free, number, state.entry)
            prompt = entry // self.n
            where = lambda new, old: jnp.where(free.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            width = queue.prompts.shape[1]

            def put(old: jax.Array, new: jax.Array) -> jax.Array:
                rows = jnp.where(free[:, None, None, None], new[:, prompt], old[:, :, :, :width])
                return old.at[:, :, :, :width].set(rows)

            cache = jax.tree.map(put, slots_of(state.cache), slots_of(queue.cache))
            seen, written = state.seen, state.written
            return State(
                state.output,
                state.cache._replace(**cache, length=where(queue.cache.length[prompt], state.cache.length)),
                entry,
                where(_last(queue, prompt), state.last),
                state.taken + free.sum(),
                None if seen is None else where(self._marks(queue, prompt), seen),
                None if written is None else where(jnp.zeros_like(written), written),
            )

        return jax.lax.cond(free.any(), fill, lambda: state)

    def _step(self, params: PyTree, queue: Queue, state: State) -> State:
        fixed = self._fixed(queue)
        if not fixed:
            state = self._refilled(queue, state)
        output, rows = state.output, jnp.arange(len(state.entry))
        writing = self._writing(queue, state)
        take = (lambda x: x) if fixed else (lambda x: x[state.entry])
        at = take(output.lengths)
        head, cache = self.decoder.decode(params, state.last[:, None], state.cache)
        ids, logprobs, drawn = self._draw(head, take(queue.keys), at, state.seen, state.written)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            if fixed:
                place = writing if old.ndim == 1 else writing[:, None] & (jnp.arange(self.length) == at[:, None])
                return jnp.where(place, new.reshape(-1, *[1] * (old.ndim - 1)), old)
            entry = jnp.where(writing, state.entry, len(queue.keys))
            return old.at[entry if old.ndim == 1 else (entry, at)].set(new, mode="drop")

        ended = jnp.isin(ids, jnp.asarray(self.ends, jnp.int32))
        news = Completions(ids, at + 1, logprobs, drawn, ended)
        mark = lambda marks: None if marks is None else marks.at[rows, ids].set(True)
        output = jax.tree.map(put, output, news)
        return state._replace(output=output, cache=cache, last=ids, seen=mark(state.seen), written=mark(state.written))

    def _draw(self, head: Any, keys: jax.Array, at: jax.Array, seen: Any, written: Any) -> tuple[jax.Array, ...]:
        """Ids [B], and their log-probabilities under the model and under the distribution of the draw."""
        z = head if isinstance(head, jax.Array) else logits(head, head.hidden[:, 0])
        z = z[:, : self.vocab] if seen is not None or written is not None else z
        z = jnp.where(jnp.arange(z.shape[1]) < self.vocab, z, -jnp.inf)
        left = penalised(z, self.sampling, seen, written)
        of = lambda lp, ids: jnp.take_along_axis(lp, ids[:, None], 1)[:, 0]
        if self.sampling.temperature:
            lp = sampling_logprobs(left, self.sampling)
            own = jax.vmap(jax.random.fold_in)(keys, at)
            ids = jax.vmap(jax.random.categorical)(own, lp).astype(jnp.int32)
            drawn = of(lp, ids)
        else:
            ids = jnp.argmax(left, -1).astype(jnp.int32)
            drawn = jnp.zeros(len(ids))
        return ids, of(jax.nn.log_softmax(z, -1), ids), drawn


def sample(
    sampler: Sampler,
    params: PyTree,
    prompts: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    limits: jax.Array | None = None,
) -> Completions:
    """All completions of prompts [N P]; see `Sampler.queue`. Not differentiable."""
    params = sampler.decoder.prepare(params)
    queue = sampler.queue(params, prompts, lengths, keys, limits)
    return sampler.advance(params, queue, sampler.start(queue)).output


def slots_of(cache: Any) -> dict[str, Any]:
    """A cache without the rows' lengths: the arrays with a slot per position."""
    return {name: value for name, value in cache._asdict().items() if name != "length"}


def _last(queue: Queue, prompt: Any) -> jax.Array:
    return jnp.take_along_axis(queue.prompts[prompt], queue.lengths[prompt][:, None] - 1, 1)[:, 0]


def _operand(dtype: Any, path: tuple, leaf: jax.Array) -> jax.Array:
    """A parameter cast to the compute dtype once, before the loop; norms and int8 scales stay float32."""
    narrow = leaf.dtype == jnp.int8  # decoding is bound by reading the weights: int8 stays int8
    return leaf if narrow or path[-1].key.endswith(("norm", quantized.SCALE)) else leaf.astype(dtype)


def _gathered(config: Config, rules: Rules, params: PyTree) -> PyTree:
    """Parameters split as `model` splits them and no further, so that no step gathers them for its one token.

    Where they would then take more than a quarter of a TPU's memory they stay as they are.
    """
    mesh, chip = jax.sharding.get_abstract_mesh(), current_chip()
    if mesh.empty:
        return params
    shapes, axes = transformer.abstract(config)
    axes = quantized.abstract(shapes, axes)[1] if "q" + quantized.SCALE in params["layers"] else axes
    whole = shardings(axes, params, mesh, {**rules, "embed": ()})
    size = lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    if chip is not None and sum(jax.tree.leaves(jax.tree.map(size, params, whole))) > chip.hbm / 4:
        return params
    return jax.tree.map(lambda leaf, sharding: jax.lax.with_sharding_constraint(leaf, sharding.spec), params, whole)
