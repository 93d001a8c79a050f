"""Llama-3.1-8B teaches Llama-3.2-1B on one v5e-16 slice: online teacher, forward KL and cross-entropy.

    jaxkd plan --config configs/llama_8b_to_1b.py --topology v5litepod-16
    jaxkd train --config configs/llama_8b_to_1b.py --workdir runs/llama_8b_to_1b \
        --config.teacher.path=models/Llama-3.1-8B --config.student.path=models/Llama-3.2-1B

Planned, not run: 7.05 of 15.75 GiB a chip; at least 3.01 s a step of 262,144 tokens, bound by memory (products 2.21 s),
so at most 87 thousand tokens a second, MFU 65%; at least 6.7 hours for its 8,000 steps, 107 chip-hours. How these are
counted, and what changes them: docs/scaling.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    return ConfigDict(
        {
            # To plan, the name is enough; to train, give the directory that holds the weights.
            "teacher": {"path": "meta-llama/Llama-3.1-8B", "dtype": "bfloat16"},
            "student": {"path": "meta-llama/Llama-3.2-1B"},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 1.0},
                "ce": {"divergence": "next_token", "weight": 0.1},
            },
            "data": {
                "domains": {name: f"data/{name}/*.jsonl" for name in ("web", "code", "math")},
                "batch": 128,
                "length": 2048,
                "valid_rows": 128,
                "valid_share": 0.01,
            },
            "optim": {
                "lr": {"schedule": "cosine", "peak": 1e-4, "warmup": 200, "end": 1e-5},
                "micro_batches": 4,
                "spike": 6.0,
            },
            "run": {
                "steps": 8000,  # 2.1 billion tokens
                "dtype": "bfloat16",
                "remat": "layer",
                "eval_every": 1000,
                "eval_batch": 16,
                "checkpoint_every": 500,
                "keep_every": 2000,
                "log_every": 10,
            },
        }
    )
