"""What writing text costs on TPUs that are not here: a decoded token against HBM, and its share of an on-policy step.

The step of one token is compiled like the train step and read from its program. Rollouts follow from it: prefill and
`tokens` such steps, before each training step, at peak rates: a lower bound. A token of mixed and speculative text is
one of the student and one of the teacher; `int8` is not counted. Of rows that both models write it is that of all rows
by the student.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxkd.config.schema import RolloutBlock
from jaxkd.core import seeds
from jaxkd.core.sharding import batch_sharding, spec
from jaxkd.core.types import Batch, Head, PyTree
from jaxkd.kernels.attention import Cache
from jaxkd.kernels.pointwise import logits
from jaxkd.models import flops, transformer
from jaxkd.planning import oom
from jaxkd.planning.plan import Estimate, Plan, compiled_or_short, device_bytes, estimate_of, peak_bytes, progress
from jaxkd.planning.plan_report import binary, digits
from jaxkd.planning.topology import Topology
from jaxkd.run import rollouts
from jaxkd.run.open_models import Model
from jaxkd.run.teacher import abstract_batch
from jaxkd.sampling.sampler import Decoder
from jaxkd.train.rollout import rollout


class SamplingPlan(NamedTuple):
    """A batch's rollout on a slice; bytes are those of one device, numbers of rows and tokens those of all."""

    planned: Plan  # of the training step
    writer: str  # "student", "teacher" where the recipe has it write, or "student and teacher" of mixed text
    rows: int  # decoded together
    prompt: int  # tokens of a row that are given
    tokens: int  # most tokens that are written after them
    weights: int  # that a token reads, in the dtype that they are decoded in
    cache: int  # keys and values at the mean length of a row
    peak: int  # of the rollout beside the training state
    decode: Estimate  # one token of `rows` rows
    prepare_s: float  # weights are cast, and gathered where that pays
    prefill_s: float  # of `rows` prompts

    @property
    def rollout_s(self) -> float:
        """Seconds of a step's rollout, in as many parts as the step has micro-batches; one for `run.rollout_every`."""
        parts = self.planned.job.experiment.data.batch / self.rows
        return parts * (self.prepare_s + self.prefill_s + self.tokens * self.decode.step_s)

    def json(self) -> dict[str, Any]:
        """As a JSON object; `share` is that of rollout and step together, None where the step does not fit."""
        e, step, chip = self.planned.job.experiment, self.planned.estimate, self.planned.topology.chip
        return {
            **{name: getattr(self, name) for name in ("writer", "rows", "prompt", "tokens")},
            "fits": self.peak <= chip.hbm,
            "hbm_bytes": {"weights": self.weights, "cache": self.cache, "peak": self.peak},
            "moved_bytes": round(self.decode.memory * chip.bandwidth),
            "least_decode_s": (self.weights + self.cache) / chip.bandwidth,
            "decode_s": self.decode.step_s,
            "bound": self.decode.bound,
            "prepare_s": self.prepare_s,
            "prefill_s": self.prefill_s,
            "rollout_s": self.rollout_s,
            "tokens_per_s_chip": e.data.batch * self.tokens / self.rollout_s / self.planned.topology.chips,
            "share": None if step is None else self.rollout_s / (self.rollout_s + step.step_s),
        }

    def lines(self) -> list[str]:
        """For the console."""
        values, limit = self.json(), self.planned.topology.chip.hbm
        text = [
            f"rollout   by the {self.writer}: {self.tokens} tokens after {self.prompt}, {self.rows} rows at a time",
            f"          memory {binary(self.peak)} of {binary(limit)} a device, "
            f"{'fits' if values['fits'] else 'DOES NOT FIT'}",
            f"decode    a token of all rows moves {binary(values['moved_bytes'])} between a device and its HBM; "
            f"weights {binary(self.weights)} and cache at its mean length {binary(self.cache)} alone take "
            f"{digits(values['least_decode_s'] * 1e3)} ms",
            f"          at least {digits(self.decode.step_s * 1e3)} ms, bound by {self.decode.bound}: hbm "
            f"{digits(self.decode.memory * 1e3)}, ici {digits(self.decode.links * 1e3)}, compute "
            f"{digits(self.decode.compute * 1e3)}",
            f"          at most {values['tokens_per_s_chip']:,.0f} tokens/s a chip; a rollout takes at least "
            f"{digits(self.rollout_s)} s (weights are made ready in {digits(self.prepare_s * 1e3)} ms)",
        ]
        if values["share"] is not None:
            text.append(f"share     the rollout is {values['share']:.0%} of an on-policy step")
        return text


def plan(planned: Plan) -> SamplingPlan:
    """Compiles the rollout of a planned job and the step of one token. OnChipOom as in `plan.plan`."""
    built, topology = planned.job, planned.topology
    e, models, mesh = built.experiment, built.models, built.mesh
    r = rollouts.block(e) or RolloutBlock(student=1.0, prompt=e.teacher.prompt)
    by_teacher = bool(r.teacher) and not (r.student or r.adaptive)
    mixed = bool(r.mix or r.proposals) and not by_teacher
    names = ("teacher",) if by_teacher else ("student", "teacher") if mixed else ("student",)
    writers = [getattr(models, name) for name in names]
    writes = rollouts.own_decoder(models.teacher) if by_teacher else rollouts.student_decoder(r, models)
    abstract = tuple(model.abstract for model in writers) if mixed else writers[0].abstract
    length = e.data.length
    width, room = min(r.prompt or length - 1, length - 1), min(r.length or length - 1, length - 1)
    tokens = min(room, length - r.prompt if r.prompt else length // 2)
    prompt = r.prompt or length - tokens
    count = e.run.rollout_every
    rows = count * e.data.batch // e.optim.micro_batches

    def written(params: PyTree, batch: Batch, step: jax.Array) -> Batch:
        key = jax.random.fold_in(seeds.key(e.run.seed), step)
        options = rollouts.rollout_options(r, models)
        return rollout(writes, params, batch, key, micro_batches=e.optim.micro_batches, **options)

    with jax.set_mesh(mesh), progress(f"compiling a rollout for {topology.name}"):
        batch, own = abstract_batch(e, models, mesh), device_bytes(abstract)
        of_window = lambda x: jax.ShapeDtypeStruct((count * x.shape[0], *x.shape[1:]), x.dtype, sharding=x.sharding)
        batch = jax.tree.map(of_window, batch)
        whole = jax.jit(written, out_shardings=batch_sharding(mesh)).lower(abstract, batch, built.state.step)
        compiled = compiled_or_short(whole)
        beside = planned.memory.params + planned.memory.optimizer + planned.memory.teacher - own
        if isinstance(compiled, oom.Oom):
            peak = beside + max(compiled.used or 0, topology.chip.hbm + 1)
        else:
            peak = beside + peak_bytes(compiled)
        tokens_of = [_token(model, rows, prompt, tokens, width + room, mesh, topology) for model in writers]
    steps, others = zip(*tokens_of)
    estimate, (read, at_mean, prepare_s, prefill_s) = Estimate(*map(sum, zip(*steps))), map(sum, zip(*others))
    sizes = (rows, prompt, tokens, read, at_mean, peak)
    return SamplingPlan(planned, " and ".join(names), *sizes, estimate, prepare_s, prefill_s)


def _token(
    model: Model, rows: int, prompt: int, tokens: int, slots: int, mesh: Any, topology: Topology
) -> tuple[Estimate, tuple[int, int, float, float]]:
    """A model's token of `rows` rows; bytes of weights and cache, seconds of `prepare` and of the prefill."""
    writes = rollouts.own_decoder(model)
    prepare = jax.jit(writes.prepare).lower(model.abstract).compile()
    struct = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    params = jax.tree.map(struct, jax.eval_shape(writes.prepare, model.abstract), prepare.output_shardings)
    cache = _cache(writes, model, params, rows, slots, mesh)
    last = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=batch_sharding(mesh))

    def decode(params: PyTree, last: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        head, cache = writes.decode(params, last, cache)
        head = cast(Head, head)
        return jnp.argmax(logits(head, head.hidden[:, 0]), -1), cache

    step = jax.jit(decode, donate_argnums=2).lower(params, last, cache).compile()
    mean = prompt + tokens // 2
    count = rows * (flops.body(model.config, 2 * mean) + flops.head(model.config))  # attends to `mean` tokens
    estimate, _ = estimate_of(step, count, mesh, topology)
    # Of an embedding that is not the head as well a token reads one row.
    read = device_bytes({name: leaf for name, leaf in params.items() if name != "embed" or model.config.tied})
    # A prefill gathers and reads what a step does, for `prompt` times the products.
    products = rows * prompt * flops.body(model.config, prompt) / mesh.size / topology.chip.flops
    prefill_s = max(products, estimate.links + estimate.network, read / topology.chip.bandwidth)
    at_mean = device_bytes((cache.keys, cache.values)) * mean // slots
    return estimate, (read, at_mean, estimate_of(prepare, 0, mesh, topology)[0].step_s, prefill_s)


def _cache(writes: Decoder, model: Model, params: PyTree, rows: int, slots: int, mesh: Any) -> Any:
    """An abstract cache of all rows, sharded as the decoder shards it."""
    cache = jax.eval_shape(writes.prefill, params, jax.ShapeDtypeStruct((rows, slots), jnp.int32))

    def placed(leaf: Any, axes: tuple) -> Any:
        sharding = jax.NamedSharding(mesh, spec(axes, leaf.shape, mesh, model.rules))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    keys, values = (placed(leaf, transformer.CACHE_AXES) for leaf in (cache.keys, cache.values))
    return Cache(keys, values, placed(cache.length, ("batch",)))
