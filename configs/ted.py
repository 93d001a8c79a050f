"""Task-aware layer-wise distillation (TED, arXiv 2210.01351), two runs on random models: seconds each.

    jaxkd train --config configs/ted.py:stage1 --workdir runs/ted1
    jaxkd train --config configs/ted.py:stage2 --workdir runs/ted2 --config.student.objective_from=runs/ted1

Stage 1: both models are frozen, and a linear filter per mapped layer learns to keep of its hidden state what predicts
the next token through the teacher's head. Stage 2: the student and its filters learn to match the output of the
teacher's frozen filters, beside next-token cross-entropy and forward KL at T = 2. Both stages need the same run.seed,
which decides the random models. For real models give both runs the same --config.teacher.path,
--config.student.layers, --config.data.tokenizer=teacher and map of layers, such as
"--config.objective.ted.feature=ted_match(layers={5: 10, 10: 20, 15: 30})" (ted_filters in stage 1). The paper's weight
of the third term is 100 to 7500 on GLUE, task by task: tune it. Expected after 20 steps: stage 1's loss falls from 5.5
by a tenth (a random head knows little), stage 2's to about 4.1.
"""

from ml_collections import ConfigDict

STAGES = {
    "stage1": {"ted": {"feature": "ted_filters(layers={1: 2, 2: 4})", "weight": 1.0}},
    "stage2": {
        "ce": {"divergence": "next_token", "weight": 1.0},
        "kd": {"divergence": "forward_kl", "weight": 1.0, "temperature": 2.0},
        "ted": {"feature": "ted_match(layers={1: 2, 2: 4})", "weight": 1.0},
    },
}


def get_config(arg: str = "stage1") -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    if arg not in STAGES:
        raise ValueError(f"configs/ted.py takes stage1 or stage2, got '{arg}'")
    shape = {"vocab": 257, "embed": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64}
    return ConfigDict(
        {
            "teacher": {"path": "random", "shape": shape},
            "student": {"layers": (0, 3), "frozen": arg == "stage1"},
            "objective": STAGES[arg],
            "data": {
                "domains": {"code": "builtin:code", "manual": "builtin:manual"},
                "tokenizer": "bytes",
                "interval": 5,
                "batch": 8,
                "length": 64,
                "train_rows": 64,
                "valid_rows": 8,
            },
            "optim": {"lr": {"schedule": "cosine", "peak": 1e-2, "warmup": 2, "end": 1e-3}},
            "run": {"steps": 20, "eval_every": 10, "checkpoint_every": 5},
        }
    )
