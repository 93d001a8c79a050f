"""On-policy distillation: the student writes, and the teacher corrects every token (docs/on_policy.md).

    jaxkd train --config configs/on_policy.py:sft,small --workdir runs/on_policy/sft
    jaxkd export --workdir runs/on_policy/sft --output runs/on_policy/start
    jaxkd train --config configs/on_policy.py:gkd,small --workdir runs/on_policy/gkd

Arguments: a method, and `small`. All methods but sft and seqkd start from a fine-tuned student, as their papers do:
the export of the sft run.

    sft        cross-entropy on the data
    seqkd      cross-entropy on text of the teacher (arXiv 1606.07947)
    imitkd     forward KL, the student's share of the rows rising from 0 to 1 (arXiv 2009.07253)
    gkd        Jensen-Shannon divergence, half of the rows the student's (arXiv 2306.13649)
    opd        sampled reverse KL as an advantage (Thinking Machines 2025)
    vopd       the same with the exact KL as baseline (arXiv 2605.07865)
    reverse    the whole reverse KL of every token
    topk       generalised reverse KL on the teacher's top 32, the tail sampled (arXiv 2606.30406)
    minillm    exact next step and sampled later ones, text from the mixture with the teacher (arXiv 2306.08543)
    distillm   skewed KL with adaptive replay (arXiv 2402.03898)
    distillm2  the teacher's text under skewed KL, the student's under skewed reverse KL (arXiv 2503.07067)
    skd        forward KL on speculative text (arXiv 2410.11325)
    opcd       the same weights with a system prompt as teacher (arXiv 2602.12275)
    sdft       the same weights, their average, with each record's demonstration as teacher (arXiv 2601.19897)
    opsd       the first student with each record's solution as teacher (arXiv 2601.18734)
    entropy    opd, and forward KL where the teacher is uncertain (arXiv 2603.07079)
    prefix     opd on the first 30% of a text (arXiv 2606.22600)

The large form distils Qwen3-32B into Qwen3-4B on conversations in data/chat; `small` SmolLM2-135M-Instruct into its
fifteen most important layers on text that comes with Python packages, some minutes a run on two CPU cores. Learning
rates, alpha, buffer and K are the papers' where they state them (four times the rate in `small`); batch and steps are
ours.
"""

from typing import Any

from ml_collections import ConfigDict

KL = {"divergence": "reverse_kl", "weight": 1.0}
CE = {"divergence": "next_token", "weight": 1.0}
OPD = {"divergence": "sampled_reverse_kl", "weight": 1.0}
STUDENT = {"student": 1.0}
RISING = {"schedule": "constant", "peak": 1.0}  # with the warm-up of a method's own

# Per method: rollouts, objective, peak of the learning rate.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "sft": ({}, {"ce": CE}, 5e-5),
    "seqkd": ({"teacher": 1.0}, {"ce": CE}, 5e-5),
    "imitkd": ({"student": RISING}, {"kd": {"divergence": "forward_kl", "weight": 1.0}}, 5e-5),
    "gkd": ({"student": 0.5}, {"kd": {"divergence": "generalized_jsd(beta=0.5)", "weight": 1.0}}, 5e-5),
    "opd": (STUDENT, {"kd": OPD}, 5e-5),
    "vopd": (STUDENT, {"kd": {**OPD, "divergence": "sampled_reverse_kl(baseline=True)"}}, 5e-5),
    "reverse": (STUDENT, {"kd": KL}, 5e-5),
    "topk": (
        STUDENT,
        {"kd": {"divergence": "generalized_reverse_kl(k=32, sampled_tail=True)", "weight": 1.0}},
        5e-5,
    ),
    "minillm": (
        {"student": 0.5, "mix": 0.2},
        {
            "kd": {"feature": "minillm", "weight": 1.0},
            "ce": {**CE, "token_weights": 'author("data")'},
        },
        5e-6,
    ),
    "distillm": (
        {"buffer": 1000, "adaptive": 0.1},
        {"kd": {"divergence": "skew_kl(alpha=0.1)", "weight": 1.0}},
        5e-4,
    ),
    "distillm2": (
        {"student": 0.5, "teacher": 0.5},
        {
            "kd": {"divergence": "skew_kl(alpha=0.1)", "weight": 1.0, "token_weights": 'author("teacher")'},
            "own": {"divergence": "skew_reverse_kl(alpha=0.1)", "weight": 1.0, "token_weights": 'author("student")'},
        },
        5e-5,
    ),
    "skd": (
        {"student": 1.0, "proposals": 25},
        {"kd": {"divergence": "forward_kl", "weight": 1.0}},
        5e-5,
    ),
    "opcd": (
        {"student": 1.0, "context": "Answer truthfully, in plain words, and say so where you are not sure."},
        {"kd": KL},
        2e-5,
    ),
    "sdft": (STUDENT, {"kd": {"divergence": "forward_kl", "weight": 1.0}}, 2e-5),
    "opsd": (
        {"student": 1.0, "temperature": 1.1, "top_p": 0.95},
        {"kd": {"divergence": "generalized_jsd(beta=0.5)", "weight": 1.0}},
        2e-5,
    ),
    "entropy": (
        STUDENT,
        {
            "kd": OPD,
            "uncertain": {"divergence": "forward_kl", "weight": 1.0, "token_weights": "teacher_entropy(above=0.8)"},
        },
        5e-5,
    ),
    "prefix": (STUDENT, {"kd": {**OPD, "token_weights": "prefix(share=0.3)"}}, 5e-5),
}
DECAY = {"opcd": 1.0, "opsd": 1.0, "sdft": 0.99}  # of the student's average as its teacher; 1: the student at the start
LAYERS = (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29)


def get_config(arg: str = "gkd") -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    words = arg.split(",")
    methods, small = [word for word in words if word != "small"], "small" in words
    if len(methods) != 1 or methods[0] not in METHODS:
        raise ValueError(f"configs/on_policy.py takes one of {', '.join(METHODS)}, and small, got '{arg}'")
    [method] = methods
    rollout, terms, peak = METHODS[method]
    steps = 24 if small else 500
    if method == "imitkd":
        rollout = {"student": {**RISING, "warmup": steps}}
    if small:
        peak *= 4
        rollout = rollout and {**rollout, "prompt": 16}
    start = method in ("sft", "seqkd")
    config: dict[str, Any] = {
        "teacher": {"path": "smollm2-135m-instruct" if small else "Qwen/Qwen3-32B"},
        "student": {"path": "teacher" if small else "Qwen/Qwen3-4B"} if start else {"path": "runs/on_policy/start"},
        "objective": terms,
        "data": {
            "domains": {"chat": "data/chat"},
            "packs": False,
            "batch": 128,
            "length": 4096,
            "interval": 50,
            "rollout": rollout and {**rollout, "length": 2048},
        },
        "optim": {"lr": {"schedule": "constant", "peak": peak, "warmup": 10}},
        "run": {
            "steps": steps,
            "dtype": "bfloat16",
            "remat": "layer",
            "eval_every": 50,
            "eval_batch": 64,
            "samples": 8,
        },
    }
    if small:
        config["data"] = {
            "domains": {name: f"builtin:{name}" for name in ("dialogue", "math")},
            "mixture": "uniform",
            "interval": 12,
            "batch": 4,
            "length": 64,
            "train_rows": 200,
            "valid_rows": 8,
            "rollout": rollout,
        }
        config["optim"]["lr"]["warmup"] = 3
        config["run"] = {"steps": 72 if start else steps, "eval_every": 12, "eval_batch": 4, "samples": 4}
        if start:
            config["student"] = {"layers": LAYERS}
            config["optim"]["lr"] = {"schedule": "cosine", "peak": 8e-4, "warmup": 3, "end": 4e-5}
    else:
        config["teacher"] |= {"dtype": "bfloat16"}
    if method in DECAY:
        config["teacher"] = {"path": "self", "decay": DECAY[method]}
    if method in ("sdft", "opsd"):
        config["data"] |= {"context": 512 if small else 4096}
        if small:  # conversations with teacher_context, of your own
            config["data"] |= {"domains": {"chat": "data/chat"}, "rollout": {**rollout, "prompt": 0, "length": 48}}
            config["data"] |= {"length": 256}
    if not rollout:
        del config["data"]["rollout"]
    return ConfigDict(config)
