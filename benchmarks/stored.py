"""How far a teacher that is stored in fewer bytes is from itself in float32: SmolLM2 on the quickstart's held-out rows.

    python benchmarks/stored.py --directory DIR

benchmarks/README.md says how to read its rows.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FORMS = (
    ("bfloat16", "bfloat16"),
    ("int8", "float32"),
    ("int8", "bfloat16"),
)  # weights, activations; the last as it runs


def table(where: Path, quick: bool) -> Iterator[dict]:
    """A row per form: nats per token from the float32 teacher, means over the domains.

    Args:
        where: rows go.
        quick: one domain alone.
    """
    import jax

    from jaxkd.config import validate
    from jaxkd.config.recipe import read_config
    from jaxkd.config.schema import experiment
    from jaxkd.core.sharding import batch_sharding
    from jaxkd.evals.compare import evaluate, make_comparison
    from jaxkd.models import heads
    from jaxkd.run import job, load, teacher

    def built(stored: str) -> job.Job:
        left_out = ("code", "manual", "legal", "scripture", "dialogue") if quick else ()
        recipe = [f"--config={REPOSITORY / 'configs' / 'quickstart.py'}", f"--config.data.directory={where / 'rows'}"]
        recipe += [f"--config.data.domains.{name}=" for name in left_out]
        return job.build(experiment(read_config([*recipe, f"--config.teacher.dtype={stored}"])))

    whole = built("float32")
    rows, host = (
        load.domains(whole.experiment.data, whole.models.tokenizer, False),
        load.host_params(whole.models.teacher),
    )
    exact = load.put(host, whole.models.teacher)
    hidden = jax.jit(lambda params, batch: whole.models.teacher.forward(params, batch).head.hidden)
    known = {  # the float32 teacher runs once, and is kept as a cache would keep it
        name: [(batch._replace(teacher=hidden(exact, batch)), size) for batch, size in batches]
        for name, batches in load.held_out(rows, whole.experiment.run.eval_batch, batch_sharding(whole.mesh)).items()
    }
    for stored, activations in FORMS:
        print(f"{stored} with {activations} activations", file=sys.stderr)
        model = built(stored).models.teacher
        params = load.put(host, model)
        forward = functools.partial(model.forward, dtype=validate.DTYPES[activations])
        told = lambda state, batch: heads.output(whole.models.teacher.config, state, batch.teacher)
        compare = jax.jit(make_comparison(forward, told, whole.models.vocab))
        found = evaluate(functools.partial(compare, params, exact), known, 0)[-1]
        yield {
            "weights": stored,
            "activations": activations,
            "mib": round(teacher.bytes_per_device({"teacher": params})["teacher"] / 2**20, 1),
            "kl": float(f"{found['kl']:.3g}"),
            "agreement": round(found["agreement"], 4),
            "nats": round(found["student_nats"], 4),
            "nats_float32": round(found["teacher_nats"], 4),
            "tokens": found["tokens"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one domain alone")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--directory", type=Path, help="for rows (default: a temporary one)")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(REPOSITORY))
    with tempfile.TemporaryDirectory() as temporary:
        for number, row in enumerate(table(options.directory or Path(temporary), options.quick)):
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            if number == 0:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(map(str, row.values()))} |", flush=True)


if __name__ == "__main__":
    main()
