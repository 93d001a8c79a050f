"""Llama-3.1-70B teaches Llama-3.1-8B on two v5p-512 slices: online teacher, forward KL and cross-entropy.

    bash launch/host.sh --chip v5p -- plan --config configs/llama_70b_to_8b.py --topology v5p-512 --slices 2
    jaxkd train --config configs/llama_70b_to_8b.py --workdir runs/llama_70b_to_8b \
        --config.teacher.path=models/Llama-3.1-70B --config.student.path=models/Llama-3.1-8B

Planned with a launcher's flags, not run, on two slices (512 chips): 11.1 of 95.7 GiB a chip; at least 4.02 s a step of
4,194,304 tokens, bound by compute (memory 1.96 s, links 0.68 s, network between slices 0.04 s), so at most 1.04 million
tokens a second, MFU 86%; at least 5.6 hours for its 5,000 steps, 2,856 chip-hours. On one slice: 7.89 s. How these are
counted, and what changes them: docs/scaling.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    return ConfigDict(
        {
            # To plan, the name is enough; to train, give the directory that holds the weights.
            "teacher": {"path": "meta-llama/Llama-3.1-70B", "dtype": "bfloat16"},
            "student": {"path": "meta-llama/Llama-3.1-8B"},
            "objective": {
                "kd": {"divergence": "forward_kl", "weight": 1.0},
                "ce": {"divergence": "next_token", "weight": 0.1},
            },
            "data": {
                "domains": {name: f"data/{name}/*.jsonl" for name in ("web", "code", "math")},
                "batch": 1024,
                "length": 4096,
                "valid_rows": 512,
                "valid_share": 0.01,
            },
            "optim": {
                "lr": {"schedule": "cosine", "peak": 3e-5, "warmup": 200, "end": 3e-6},
                "micro_batches": 2,
            },
            "run": {
                "steps": 5000,  # 21 billion tokens
                "dtype": "bfloat16",
                "remat": "layer",
                "eval_every": 1000,
                "eval_batch": 512,
                "checkpoint_every": 500,
                "log_every": 10,
            },
        }
    )
