"""One domain's gap is large: a real training, in which DDK must do what it is for.

The models are tables of what follows a token, which any `forward` that returns a `Head` may be: the teacher's is
counted from the text, and the student's is trained. What a domain has to be taught is then the number of its contexts.
"""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import recipe, tiny_arguments

from jaxkd.core.sharding import batch_sharding
from jaxkd.core.types import Batch, Head, Output
from jaxkd.data import loader
from jaxkd.evals import compare
from jaxkd.losses import divergences, objective
from jaxkd.run import job, load
from jaxkd.run.mixing import Mixing, make_losses
from jaxkd.teachers.online import online
from jaxkd.train.state import init_state
from jaxkd.train.step import make_step

VOCAB, BATCH, STEPS = 257, 8, 60


def forward(params, batch: Batch) -> Output:
    """Logits of the next token from the token alone."""
    return Output(Head(jax.nn.one_hot(batch.tokens, VOCAB), params), {})


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """`make(rule)`, the rows and the teacher: three domains of two to four letters, and one of fifty."""
    root, rng = tmp_path_factory.mktemp("case"), random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX"
    follow = {letter: rng.sample(letters, 2) for letter in letters}

    def walk(length, at):
        return at + "".join(at := rng.choice(follow[at]) for _ in range(length))

    texts = {"hard": write(root / "hard.jsonl", [walk(200, rng.choice(letters)) for _ in range(60)])}
    for name, unit in (("two", "01"), ("three", "345"), ("four", "6789")):
        texts[name] = write(root / f"{name}.jsonl", [unit * (60 + i) for i in range(60)])
    rows = ["data.valid_rows=8", "data.train_rows=64", f"data.batch={BATCH}"]
    arguments = tiny_arguments(texts, root / "rows", *(f"--config.{each}" for each in rows))

    def make(rule):
        built = job.build(recipe(*arguments, f"--config.data.mixture={rule}"))
        return built._replace(models=built.models._replace(student=built.models.student._replace(forward=forward)))

    built = make("uniform")
    with jax.set_mesh(built.mesh):
        rows = load.domains(built.experiment.data, built.models.tokenizer, progress=False)
    counts = np.full((VOCAB, VOCAB), 0.01)
    for domain in rows.train:
        read = domain.read(range(len(domain)))
        np.add.at(counts, (read["tokens"], read["targets"]), read["weights"])
    return make, rows, online(jnp.asarray(np.log(counts / counts.sum(1, keepdims=True)), jnp.float32), forward)


@pytest.fixture(scope="module")
def programs(case):
    """The step and the evaluation, compiled once for both rules."""
    _, rows, teacher = case
    tx = optax.sgd(20.0)
    terms = {"ce": (1.0, objective.next_token()), "kd": (0.2, objective.match(divergences.forward_kl()))}
    step = make_step(forward, teacher, objective.objective(terms, vocab=VOCAB, domains=rows.names), tx)
    return tx, jax.jit(step), jax.jit(compare.make_comparison(forward, forward, VOCAB))


def gaps(case, programs, rule, seed):
    """Student's less teacher's nats by domain after a training under a rule."""
    (make, rows, teacher), (tx, step, comparison) = case, programs
    built = make(rule)
    with jax.set_mesh(built.mesh):
        table = 0.1 * jax.random.normal(jax.random.key(seed), (VOCAB, VOCAB))
        state = init_state({"student": table, "objective": {}}, tx)

        def look(state):
            judged = lambda batch: comparison(state.params["student"], teacher.state, batch)
            return compare.evaluate(
                judged,
                load.held_out(rows, built.experiment.run.eval_batch, batch_sharding(built.mesh)),
                int(state.step),
            )

        measure = make_losses(built.models.student, VOCAB, rows, built.experiment.run, built.mesh)
        mixing = Mixing(built.rule, rows, built.experiment.data, built.lr, measure)
        mixing.first()
        mixing.begin(look(state))
        while mixing.start < STEPS:
            for batch in loader.batches(
                rows.train, mixing.mixture, seed, BATCH, mixing.start, mixing.end, mixing.start
            ):
                state, _ = step(state, {}, teacher.state, batch)
            mixing.advance(state.params["student"])
        last = {row["domain"]: row["student_nats"] - row["teacher_nats"] for row in look(state)}
    return {name: gap for name, gap in last.items() if name != "mean"}


@pytest.mark.slow
def test_the_worst_gap_ends_lower_than_with_equal_shares(case, programs):
    """Measured: 0.72 nats with equal shares and 0.32 under DDK; within 0.01 of it for other seeds."""
    equal, moved = (gaps(case, programs, rule, 0) for rule in ("uniform", "ddk()"))
    assert max(equal, key=equal.__getitem__) == "hard"
    assert max(moved.values()) < 0.6 * max(equal.values())
    assert programs[1]._cache_size() == 1  # the shares are no part of the program
