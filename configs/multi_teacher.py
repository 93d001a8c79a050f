"""Several teachers: averaged, one per domain, through an assistant, or giving way to the labels.

    jaxkd train --config configs/multi_teacher.py:assistant --workdir runs/assistant
    jaxkd export --workdir runs/assistant --output models/assistant
    jaxkd train --config configs/multi_teacher.py:chain --workdir runs/chain       # large to middle to small
    jaxkd train --config configs/multi_teacher.py:blend --workdir runs/blend       # the default
    jaxkd train --config configs/multi_teacher.py:route --workdir runs/route
    jaxkd train --config configs/multi_teacher.py:annealed --workdir runs/annealed

assistant, chain: a 22-layer model learns from the 30-layer teacher, and the 15-layer student from it (teacher
assistants, arXiv 1902.03393). blend: p = 0.7 p_1 + 0.3 p_2; `--config.teacher.average=log_probabilities` averages
their logs; a weight may be a schedule, and `domains` gives a factor per domain. route: factors of 0 and 1; a
teacher is run on the micro-batches that have one of its rows. annealed: the target moves from the teacher to the
labels (arXiv 1907.04829), which for forward KL is the same as moving the weight. All but `annealed` and `assistant`
need models/assistant, made by the first two commands. Teacher and data as in configs/quickstart.py, 32 rows of each
domain.
"""

from ml_collections import ConfigDict

VARIANTS = ("assistant", "chain", "blend", "route", "annealed")
ASSISTANT = (0, 1, 2, 5, 6, 8, 9, 10, 11, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29)
"""The middle model's layers, of 30: those of the small one, and seven between."""


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; the argument is the variant."""
    variant = arg or "blend"
    if variant not in VARIANTS:
        raise ValueError(f"configs/multi_teacher.py takes {', '.join(VARIANTS)}, got '{arg}'")
    large: dict = {"path": "smollm2-135m-instruct", "dtype": "float32"}
    middle: dict = {"path": "models/assistant", "dtype": "float32"}
    served = {"dialogue": 1.0, "scripture": 1.0}
    rest = {"code": 1.0, "manual": 1.0, "legal": 1.0, "math": 1.0}
    teacher: dict = {
        "chain": middle,
        "blend": {
            "members": {"large": large | {"weight": 0.7}, "middle": middle | {"weight": 0.3}},
            "average": "probabilities",
        },
        "route": {"members": {"large": large | {"domains": rest}, "middle": middle | {"domains": served}}},
    }.get(variant, large)
    half = (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29)
    layers = {"assistant": ASSISTANT, "chain": tuple(ASSISTANT.index(n) for n in half)}.get(variant, half)
    weight: dict = {"kd": 1.0, "ce": 0.5}
    if variant == "annealed":
        weight = {
            "kd": {"schedule": "linear", "peak": 1.0, "warmup": 0, "end": 0.0},
            "ce": {"schedule": "linear", "peak": 0.0, "warmup": 0, "end": 1.0},
        }
    return ConfigDict(
        {
            "teacher": teacher,
            "student": {
                "path": "teacher",
                "layers": layers,
                "keep": 0,
            },
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": weight["kd"]},
                "ce": {"divergence": "next_token", "weight": weight["ce"]},
            },
            "data": {
                "domains": {
                    "code": "builtin:code",
                    "manual": "builtin:manual",
                    "legal": "builtin:legal",
                    "scripture": "builtin:scripture",
                    "dialogue": "builtin:dialogue",
                    "math": "builtin:math",
                },
                "directory": "rows",
                "tokenizer": "teacher",
                "text_key": "text",
                "mixture": "uniform",
                "interval": 12,
                "batch": 4,
                "length": 128,
                "train_rows": 32,
                "valid_rows": 4,
                "valid_share": 0.05,
            },
            "optim": {
                "lr": {"schedule": "cosine", "peak": 8e-4, "warmup": 3, "end": 4e-5},
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip": 1.0,
                "micro_batches": 1,
            },
            "run": {
                "steps": 48,
                "seed": 0,
                "dtype": "float32",
                "remat": "none",
                "mesh": {"data": -1, "model": 1},
                "eval_every": 0,
                "eval_batch": 4,
                "checkpoint_every": 48,
                "keep_checkpoints": 1,
                "log_every": 1,
            },
        }
    )
