"""Several teachers: averaged, one per domain, through an assistant, or annealed to the labels.

    jaxkd train --config configs/multi_teacher.py:assistant --workdir runs/assistant
    jaxkd export --workdir runs/assistant --output models/assistant
    jaxkd train --config configs/multi_teacher.py:chain --workdir runs/chain       # large to middle to small
    jaxkd train --config configs/multi_teacher.py:blend --workdir runs/blend       # the default
    jaxkd train --config configs/multi_teacher.py:route --workdir runs/route
    jaxkd train --config configs/multi_teacher.py:annealed --workdir runs/annealed

assistant, chain: a 22-layer model learns from the 30-layer teacher, and the 15-layer student from it (teacher
assistants, arXiv 1902.03393). blend: p = 0.7 p_1 + 0.3 p_2; `--config.teacher.average=log_probabilities` averages
log-probabilities; a weight may be a schedule, and `domains` gives a factor per domain. route: factors of 0 and 1; a
teacher runs only on micro-batches with one of its rows. annealed: the target moves from the teacher to the labels
(arXiv 1907.04829), which for forward KL is the same as moving the weight. All but `annealed` and `assistant` need
models/assistant, written by the first two commands. Teacher and data as in configs/quickstart.py, 32 rows of each
domain.
"""

from ml_collections import ConfigDict

DOMAINS = ("code", "manual", "legal", "scripture", "dialogue", "math")
LAYERS = (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29)
# Layers of the 30-layer teacher: of the 15-layer student, and of the 22-layer assistant.
ASSISTANT = (0, 1, 2, 5, 6, 8, 9, 10, 11, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29)
VARIANTS = ("assistant", "chain", "blend", "route", "annealed")


def get_config(arg: str = "blend") -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    if arg not in VARIANTS:
        raise ValueError(f"configs/multi_teacher.py takes {', '.join(VARIANTS)}, got '{arg}'")
    large: dict = {"path": "smollm2-135m-instruct"}
    middle: dict = {"path": "models/assistant"}
    rest = {"code": 1.0, "manual": 1.0, "legal": 1.0, "math": 1.0}
    teachers: dict = {
        "chain": middle,
        "blend": {"members": {"large": large | {"weight": 0.7}, "middle": middle | {"weight": 0.3}}},
        "route": {
            "members": {
                "large": large | {"domains": rest},
                "middle": middle | {"domains": {"dialogue": 1.0, "scripture": 1.0}},
            }
        },
    }
    layers = {"assistant": ASSISTANT, "chain": tuple(ASSISTANT.index(n) for n in LAYERS)}
    kd, ce = (
        ({"schedule": "linear", "peak": 1.0}, {"schedule": "linear", "peak": 0.0, "end": 1.0})
        if arg == "annealed"
        else (1.0, 0.5)
    )
    return ConfigDict(
        {
            "teacher": teachers.get(arg, large),
            "student": {"layers": layers.get(arg, LAYERS)},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": kd},
                "ce": {"divergence": "next_token", "weight": ce},
            },
            "data": {
                "domains": {name: f"builtin:{name}" for name in DOMAINS},
                "mixture": "uniform",
                "interval": 12,
                "batch": 4,
                "length": 128,
                "train_rows": 32,
                "valid_rows": 4,
            },
            "optim": {"lr": {"schedule": "cosine", "peak": 8e-4, "warmup": 3, "end": 4e-5}},
            "run": {"steps": 48, "eval_batch": 4, "checkpoint_every": 48, "keep_checkpoints": 1},
        }
    )
