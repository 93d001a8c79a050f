"""The program that writes a step's text: which rows a student or teacher continues, and the teacher's view of them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkd.config import resolve
from jaxkd.config.schema import Experiment, RolloutBlock, Schedule, TeacherBlock
from jaxkd.core import schedules, seeds
from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import Batch, Metrics, PyTree
from jaxkd.data import conversations
from jaxkd.data.tokenize import Tokenizer
from jaxkd.models import quantized
from jaxkd.run.batch import rows_batch
from jaxkd.run.open_models import Model, Models
from jaxkd.sampling.mixed import mixed, mixture, speculative
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.sampler import Decoder, decoder
from jaxkd.train import replay, view
from jaxkd.train.replay import Replay
from jaxkd.train.rollout import STUDENT, Limits, rollout, row_keys, unwritten

_AUTHOR = 2**31  # folded into a row's key, apart from its tokens' places


class Texts(NamedTuple):
    """What of rollouts the next steps depend on; None where a run has no such part."""

    window: Batch | None = None  # [steps of `run.rollout_every` B ...]
    replay: Replay | None = None


def block(e: Experiment) -> RolloutBlock | None:
    """The rollouts of an experiment, `teacher.signal=token` among them; None where rows are trained on as they are."""
    if e.teacher.signal == "token":
        return None if e.teacher.cache else _token_block(e.teacher)
    r = e.data.rollout
    return r if r.student or r.teacher or r.adaptive or r.context or e.data.context else None


def _token_block(t: TeacherBlock) -> RolloutBlock:
    return RolloutBlock(teacher=1.0, prompt=t.prompt, temperature=t.temperatures[0])


def rollout_options(r: RolloutBlock, models: Models, documents: bool = False) -> dict[str, Any]:
    """What `train.rollout.rollout` takes of a recipe; `documents` end with the tokenizer's own end alone."""
    tokenizer = models.tokenizer
    ends = tokenizer.ends if not documents else () if tokenizer.end is None else (tokenizer.end,)
    return {"limits": Limits(r.prompt, r.length), "vocab": models.vocab, "sampling": sampling_of(r), "ends": ends}


def teacher_text(t: TeacherBlock, models: Models) -> Callable[..., Batch]:
    """`rollout(params, rows, key) -> Batch` of the teacher's own text, for the signal "token"."""
    return partial(rollout, own_decoder(models.teacher), **rollout_options(_token_block(t), models, documents=True))


def abstract_texts(e: Experiment, mesh: Mesh) -> Texts | None:
    """Shapes and shardings of the part of the train state; None where no step depends on another's text."""
    r, count = block(e), e.run.rollout_every
    if r is None or (count == 1 and not r.buffer):
        return None
    by_rows, replicated = batch_sharding(mesh).spec, NamedSharding(mesh, PartitionSpec())
    texts = jax.eval_shape(lambda: _initial(e, r))
    of_window = NamedSharding(mesh, PartitionSpec(None, *by_rows))
    leaf = lambda sharding: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return Texts(jax.tree.map(leaf(of_window), texts.window), jax.tree.map(leaf(replicated), texts.replay))


def initial_texts(e: Experiment) -> Texts | None:
    """The part before the first step: nothing written."""
    r = block(e)
    return None if r is None or (e.run.rollout_every == 1 and not r.buffer) else _initial(e, r)


def _initial(e: Experiment, r: RolloutBlock) -> Texts:
    rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rows_batch(e.data))
    rows = rows._replace(aux=unwritten(rows))
    count, share = e.run.rollout_every, 0.0 if isinstance(r.student, Schedule) else r.student
    window = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), rows) if count > 1 else None
    return Texts(window, replay.init(r.buffer, rows, share) if r.buffer else None)


def sampling_of(r: RolloutBlock) -> Sampling:
    """The sampling settings of a rollout block."""
    return Sampling(r.temperature, r.top_k, r.top_p, r.min_p)


def own_decoder(model: Model) -> Decoder:
    """A model's decoder in its dtype and sharding."""
    return decoder(model.config, model.dtype, model.rules)


def student_decoder(r: RolloutBlock, models: Models) -> Decoder:
    """What writes the student's text: its decoder, or one over (student, teacher) parameters."""
    if not (r.mix or r.proposals):
        return own_decoder(models.student)
    combine = mixture(r.mix) if r.mix else speculative(r.proposals)
    return mixed(own_decoder(models.student), own_decoder(models.teacher), combine, models.vocab)


def params(e: Experiment, student: PyTree, teachers: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The parameters that `Rollouts.write` takes; {} where no text is written."""
    if (r := block(e)) is None:
        return {}
    return {"student": student} | ({"teacher": teachers["teacher"]} if r.teacher or r.mix or r.proposals else {})


def context_tokens(r: RolloutBlock, tokenizer: Tokenizer, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the teacher's context, and those at the beginning of a row whose place it takes.

    In conversations (`data.rollout.prompt=0`) both are what comes before the user's first turn, with the context as
    system prompt and without one; before other text the context stands as it is.
    """
    if r.prompt:
        return np.asarray(tokenizer.encode([r.context])[0][0], np.int32), np.zeros(0, np.int32)
    turn = [{"role": "user", "content": "x"}]
    system = [{"role": "system", "content": r.context}]
    texts = [conversations.prompt(tokenizer, messages, source) for messages in (system + turn, turn)]
    privileged, plain = (np.asarray(encoding[0], np.int32) for encoding in tokenizer.encode_rendered(texts))
    shared = 0
    while shared < min(len(privileged), len(plain)) and privileged[-shared - 1] == plain[-shared - 1]:
        shared += 1
    if len(privileged) == shared:
        raise ValueError(f"data.rollout.context: the chat template of {source} leaves a system prompt out")
    return privileged[: len(privileged) - shared], plain[: len(plain) - shared]


class Rollouts(NamedTuple):
    """Jitted programs.

    `write(params, rows, step, texts) -> ((batch, metrics), texts)`: `params` are those of `params`, `rows` the batches
    of `run.rollout_every` steps from `step` on. With more than one the first result is None, and
    `pick(texts.window, number) -> (batch, metrics)` gives a step's.
    """

    write: Any
    pick: Any


def jitted(e: Experiment, models: Models, mesh: Mesh) -> Rollouts | None:
    """The programs of a step's rows, or None where rows are trained on as they are."""
    r = block(e)
    if r is None:
        return None
    count = e.run.rollout_every
    options = rollout_options(r, models, documents=e.teacher.signal == "token") | {
        "micro_batches": e.optim.micro_batches
    }
    named = {"student": r.student, "teacher": r.teacher}
    shares = [resolve.scalar(share, e.run.steps, f"data.rollout.{name}") for name, share in named.items()]
    viewed = make_view(e, models)
    ends = options["ends"]

    def present(batch: Batch) -> tuple[Batch, Metrics]:
        measures = measured(batch, ends)
        return viewed(batch), measures

    def write(params: PyTree, rows: Sequence[Batch], step: jax.Array, texts: Texts | None) -> tuple[Any, Texts | None]:
        texts = texts or Texts()
        stacked = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *rows)
        batch = stacked._replace(aux=unwritten(stacked))
        steps = jnp.tile(step + jnp.arange(count), len(batch.row) // count)
        keys = row_keys(jax.vmap(partial(jax.random.fold_in, seeds.key(e.run.seed)))(steps), batch)
        own = jax.vmap(lambda key: jax.random.fold_in(key, _AUTHOR))(keys)
        draws = jax.vmap(jax.random.uniform)(own)
        buffer = texts.replay
        student, teacher = (schedules.value(share, step) for share in shares)
        if buffer is not None and r.adaptive:
            student = buffer.share
        fresh = draws < student
        if buffer is not None:
            again = fresh & (draws >= student * (1 - step / e.run.steps)) & (buffer.added > 0)
            fresh &= ~again
        if r.teacher:
            # The only author of all rows, as for `teacher.signal=token`, needs no choice.
            chosen = None if r.teacher == 1 else (draws >= student) & (draws < student + teacher)
            batch = rollout(own_decoder(models.teacher), params["teacher"], batch, keys, chosen=chosen, **options)
        if r.student or r.adaptive:
            own_params = quantized.quantize_traced(params["student"]) if r.int8 else params["student"]
            writer = (own_params, params["teacher"]) if r.mix or r.proposals else own_params
            batch = rollout(student_decoder(r, models), writer, batch, keys, author=STUDENT, chosen=fresh, **options)
        if buffer is not None:
            earlier = replay.draw(buffer, batch, again, own)
            buffer, batch = replay.add(buffer, batch, fresh), earlier
        if count == 1:
            return present(batch), None if buffer is None else Texts(replay=buffer)
        window = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)
        return None, Texts(window, buffer)

    def pick(window: Batch, number: jax.Array) -> tuple[Batch, Metrics]:
        batch, measures = present(
            jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), window)
        )
        return batch, measures | {"rollout_age": (jnp.float32(number), jnp.ones(()))}

    of_texts = jax.tree.map(lambda leaf: leaf.sharding, abstract_texts(e, mesh))
    of_rows = (batch_sharding(mesh), None)  # and their metrics
    return Rollouts(
        jax.jit(write, out_shardings=(of_rows if count == 1 else None, of_texts)), jax.jit(pick, out_shardings=of_rows)
    )


def abstract_written(rollouts: Rollouts, params: PyTree, batch: Batch, texts: Texts | None, e: Experiment) -> Batch:
    """Shapes of a step's rows once written; `batch` are those that are read, with shardings."""
    count, step = e.run.rollout_every, jax.ShapeDtypeStruct((), jnp.int32)
    written, texts = jax.eval_shape(rollouts.write, params, (batch,) * count, step, texts)
    if written is None:
        written = jax.eval_shape(rollouts.pick, texts.window, step)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch.row.sharding), written[0])


def make_view(e: Experiment, models: Models) -> Callable[[Batch], Batch]:
    """Gives rows the teacher's view of them, where `data.rollout.context` or `data.context` says that it is another."""
    r = e.data.rollout
    if r.context:
        context, opening = context_tokens(r, models.tokenizer, e.student.path)
        longest = e.data.length + max(len(context) - len(opening), 0)
        if len(opening) >= e.data.length or longest > models.teacher.config.max_length:
            raise ValueError(
                f"data.rollout.context: rows of {e.data.length} tokens become {longest} with it, and the teacher's "
                f"context is {models.teacher.config.max_length}: shorten it, or change data.length"
            )
        return lambda batch: view.in_context(view.first_documents(batch), jnp.asarray(context), jnp.asarray(opening))
    if e.data.context:
        return lambda batch: view.with_prompts(batch, batch.aux["context"], batch.aux["context_length"])
    return lambda batch: batch


def measured(batch: Batch, ends: tuple[int, ...]) -> Metrics:
    """Metrics of the student's text: tokens a row, share of rows that ended, share of rows that it wrote."""
    own = (batch.aux["author"] == STUDENT).astype(jnp.float32)
    ended = (jnp.isin(batch.targets, jnp.asarray(ends, jnp.int32)) & (batch.weights > 0)).any(-1)
    return {
        "rollout_tokens": ((own * batch.weights.sum(-1)).sum(), own.sum()),
        "rollout_ended": ((own * ended).sum(), own.sum()),
        "rollout_share": (own.sum(), jnp.float32(len(own))),
    }
