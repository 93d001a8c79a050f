"""DDK: domains re-weighted by the gap to the teacher while distilling (arXiv 2407.16154), and what it is compared with.

    jaxkd train --config configs/ddk.py --workdir runs/ddk
    jaxkd sweep --config configs/ddk.py --workdir runs/ddk --variants cpt kd minillm uniform no_smoothing ddk
    jaxkd sweep --config configs/ddk.py:small --workdir runs/ddk-small --seeds 0 1 2 \
        --variants cpt kd uniform no_smoothing ddk
    jaxkd compare runs/ddk-small

The argument is a pair of models and a method, either of them or both ("llama,kd"):

- `qwen` (default): Qwen1.5-14B to Qwen1.5-1.8B on ten domains; `llama`: LLaMA2-13B to TinyLLaMA-1.1B on the same;
  `starcoder`: StarCoder-15.5B to 3B on four languages, an architecture that cannot be read here so far: set
  --config.teacher.path and --config.student.path to a code model of one that can; `small`: SmolLM2-135M to half its
  layers on six domains, for two CPU cores, with the teacher's 64 most probable tokens cached.
- `ddk` (default); `no_smoothing`: Eq. 1 in every interval; `uniform`: equal sampling; `kd`: the pool as it is, which is
  also the paper's KD; `minillm`: `kd` with reverse KL for forward KL, as the paper has it; `cpt`: no teacher;
  `doremi_proxy`, then `doremi`: the proxy, and `cpt` with its weights; `ted_filters`, then `ted`: TED in two stages.
  A second stage reads the first one's run in runs/ddk, as the sweep names it.

From the paper: loss CE + 0.2 KL(p || q) at T = 1, alpha = 0.5, 1,000 steps an interval, warm-up to 3e-5 over 1,000
steps and cosine to 3e-6 at 30,000, about 15B tokens, 500 held-out samples a domain. It states no batch, length or
optimiser: 256 rows of 2,048 tokens follow from 15B tokens in 30,000 steps; AdamW's values are the usual ones. Runtime:
16 A100-80G in the paper, not measured here. Expected, mean of its eleven tasks: ddk 55.4, kd 52.9, ted 52.6, minillm
52.6, doremi 51.0, cpt 50.5 (Table 1, no seeds given). `small`: five minutes a run on one core,
numbers in docs/results.md.
"""

from ml_collections import ConfigDict

TEN = (
    "commoncrawl",
    "c4",
    "stack",
    "wikipedia",
    "books",
    "arxiv",
    "stackexchange",
    "chinese_books",
    "chinese_commoncrawl",
    "openwebmath",
)
FOUR = ("python", "java", "typescript", "csharp")
SIX = ("code", "manual", "legal", "scripture", "dialogue", "math")

# Teacher and student by local path, domains as folders of .jsonl, and TED's map from student layers to teacher layers.
PAIRS = {
    "qwen": ("models/Qwen1.5-14B", "models/Qwen1.5-1.8B", TEN, {6: 10, 12: 20, 18: 30, 24: 40}),
    "llama": ("models/Llama-2-13b-hf", "models/TinyLlama-1.1B", TEN, {6: 10, 11: 20, 17: 30, 22: 40}),
    "starcoder": ("models/starcoderbase", "models/starcoderbase-3b", FOUR, {9: 10, 18: 20, 27: 30, 36: 40}),
    "small": ("smollm2-135m-instruct", "teacher", SIX, {5: 10, 10: 20, 15: 30}),
}
METHODS = {
    "ddk": "ddk(alpha=0.5)",
    "no_smoothing": "ddk(smooth=False)",
    "uniform": "uniform",
    "kd": "natural",
    "minillm": "natural",
    "cpt": "natural",
    "doremi_proxy": "doremi_proxy()",
    "doremi": 'doremi("runs/ddk/doremi_proxy/seed-0")',
    "ted_filters": "natural",
    "ted": "natural",
}

# What `small` changes. `natural` shares follow the whole text, whatever the limit of rows that are cached.
SMALL = {
    "teacher": {"dtype": "float32"},
    "student": {"layers": (0, 1, 2, 6, 8, 9, 10, 11, 20, 21, 23, 24, 27, 28, 29)},
    "data": {"interval": 8, "batch": 2, "length": 128, "train_rows": 80, "valid_rows": 6},
    "optim": {"lr": {"peak": 8e-4, "warmup": 4, "end": 4e-5}},
    "run": {
        "steps": 48,
        "dtype": "float32",
        "remat": "none",
        "eval_every": 0,
        "eval_batch": 6,
        "checkpoint_every": 48,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    words = [word for word in arg.split(",") if word]
    unknown = [word for word in words if word not in {**PAIRS, **METHODS}]
    pairs, methods = [w for w in words if w in PAIRS], [w for w in words if w in METHODS]
    if unknown or len(pairs) > 1 or len(methods) > 1:
        raise ValueError(f"configs/ddk.py takes one of {', '.join(PAIRS)} and one of {', '.join(METHODS)}, got '{arg}'")
    pair, method = (pairs or ["qwen"])[0], (methods or ["ddk"])[0]
    teacher, student, domains, layers = PAIRS[pair]
    config = ConfigDict(
        {
            "teacher": {"path": teacher, "dtype": "bfloat16"},
            "student": {"path": student},
            "objective": objective(method, layers),
            "data": {
                "domains": {name: f"data/{name}" for name in domains},
                "mixture": METHODS[method],
                "interval": 1000,
                "batch": 256,
                "length": 2048,
                "valid_rows": 500,
            },
            "optim": {"lr": {"schedule": "cosine", "peak": 3e-5, "warmup": 1000, "end": 3e-6}},
            "run": {
                "steps": 30_000,
                "dtype": "bfloat16",
                "remat": "layer",
                "eval_every": 5000,
                "eval_batch": 256,
                "checkpoint_every": 500,
                "keep_checkpoints": 1,
            },
        }
    )
    if method == "ted_filters":
        config.student.frozen = True
    if method == "ted":
        config.student.objective_from = "runs/ddk/ted_filters/seed-0"
    if pair == "small":
        config.update(SMALL)
        config.data.domains = {name: f"builtin:{name}" for name in domains}
        # TED's filters read the teacher's layers, and DoReMi's proxy its probability of every token: not cached.
        if "ted" not in method and method != "doremi_proxy":
            config.teacher.update({"signal": "top_k", "cache": "cache/ddk-small"})
    return config


def objective(method: str, layers: dict[int, int]) -> dict:
    """The loss of a method: DDK's Eq. 3 but where the method is another one."""
    ce = {"divergence": "next_token", "weight": 1.0}
    kd = {"divergence": "forward_kl", "weight": 0.2}
    if method == "ted_filters":
        return {"ted": {"feature": f"ted_filters(layers={layers})", "weight": 1.0}}
    if method in ("cpt", "doremi_proxy", "doremi"):
        return {"ce": ce}
    if method == "minillm":
        return {"ce": ce, "kd": {**kd, "divergence": "reverse_kl"}}
    if method == "ted":
        return {"ce": ce, "kd": kd, "ted": {"feature": f"ted_match(layers={layers})", "weight": 1.0}}
    return {"ce": ce, "kd": kd}
