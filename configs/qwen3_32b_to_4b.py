"""Qwen3-32B teaches Qwen3-4B on a v5p-256 slice: online teacher, forward KL and cross-entropy.

    bash launch/host.sh --chip v5p -- plan --config configs/qwen3_32b_to_4b.py --topology v5p-256
    jaxkd train --config configs/qwen3_32b_to_4b.py --workdir runs/qwen3_32b_to_4b \
        --config.teacher.path=models/Qwen3-32B --config.student.path=models/Qwen3-4B

Planned with a launcher's flags, not run, on v5p-256 (128 chips): 20.3 of 95.7 GiB a chip; at least 4.13 s a step of
2,097,152 tokens, bound by compute (memory 3.73 s), so at most 508 thousand tokens a second, MFU 83%; at least 5.7 hours
for its 5,000 steps, 734 chip-hours. On v6e-256: 2.8 s, bound by memory. How these are counted, and what changes them:
docs/scaling.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    return ConfigDict(
        {
            # To plan, the name is enough; to train, give the directory that holds the weights.
            "teacher": {"path": "Qwen/Qwen3-32B", "dtype": "bfloat16"},
            "student": {"path": "Qwen/Qwen3-4B"},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 1.0},
                "ce": {"divergence": "next_token", "weight": 0.1},
            },
            "data": {
                "domains": {name: f"data/{name}/*.jsonl" for name in ("web", "code", "math")},
                "batch": 512,
                "length": 4096,
                "valid_rows": 512,
                "valid_share": 0.01,
            },
            "optim": {
                "lr": {"schedule": "cosine", "peak": 5e-5, "warmup": 200, "end": 5e-6},
                "micro_batches": 2,
            },
            "run": {
                "steps": 5000,  # 10.5 billion tokens
                "dtype": "bfloat16",
                "remat": "layer",
                "eval_every": 1000,
                "eval_batch": 256,
                "checkpoint_every": 500,
                "log_every": 10,
            },
        }
    )
