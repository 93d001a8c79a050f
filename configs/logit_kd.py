"""Logit distillation, the template: copy this file, change what your experiment changes.

    jaxkd train --config configs/logit_kd.py --workdir runs/logit_kd
    jaxkd train --config "configs/logit_kd.py:generalized_jsd(beta=0.1)" --workdir runs/jsd \
        --config.teacher.path=models/Llama-3.1-8B \
        --config.student.path=models/Llama-3.2-1B --config.student.keep=0

The argument is the divergence, a call of jaxkd/losses/divergences.py (default: forward_kl). Loss: Hinton et al. 2015
(arXiv 1503.02531), alpha T^2 KL(p^(T) || q^(T)) + (1 - alpha) CE with alpha = 0.5 and T = 2. The
defaults, SmolLM2-135M and half its layers at 16,384 tokens a step, are meant for an accelerator (not measured on one
yet); two CPU cores would need minutes a step. For expected numbers see configs/quickstart.py.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; the argument is the divergence."""
    return ConfigDict(
        {
            # A known name, a GGUF file, a Hugging Face directory (config.json and safetensors), or "random"
            # with `shape`. Stored in `dtype`, which is also what its forward pass computes in.
            "teacher": {"path": "smollm2-135m-instruct", "dtype": "bfloat16"},
            # "teacher" cuts the student out of the teacher: `layers` names those to keep, or `keep` says how
            # many, and the loss when each is left out decides. Any other path is a checkpoint of its own.
            "student": {"path": "teacher", "layers": (), "keep": 15},
            # Any number of named terms, all in one kernel call. A weight or a temperature may be a schedule:
            # {"schedule": "linear", "peak": 1.0, "warmup": 0, "end": 0.1}.
            "objective": {
                "kd": {"divergence": arg or "forward_kl", "weight": 0.5, "temperature": 2.0},
                "ce": {"divergence": "next_token", "weight": 0.5},
            },
            "data": {
                # One domain per name: builtin:..., a file, folder or glob of JSONL, text or Parquet, or tfds:NAME.
                "domains": {
                    "code": "builtin:code",
                    "legal": "builtin:legal",
                    "manual": "builtin:manual",
                    "scripture": "builtin:scripture",
                },
                "directory": "rows",  # where prepared rows are kept, by fingerprint
                "tokenizer": "teacher",
                "text_key": "text",  # of JSONL, Parquet and TFDS records
                "mixture": "natural",  # a call of jaxkd/data/rules.py, or weights such as "code=2,legal=1"
                "interval": 100,
                "batch": 32,
                "length": 512,
                "train_rows": 0,  # no limit
                "valid_rows": 64,
                "valid_share": 0.02,
            },
            "optim": {
                "lr": {"schedule": "cosine", "peak": 3e-4, "warmup": 50, "end": 3e-5},
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,  # of matrices; norms and biases are left alone
                "clip": 1.0,
                "micro_batches": 4,
            },
            "run": {
                "steps": 1000,
                "seed": 0,
                "dtype": "bfloat16",  # of activations and matmul operands; parameters stay float32
                "remat": "layer",
                "mesh": {"data": -1, "model": 1},
                "eval_every": 250,
                "eval_batch": 16,
                "checkpoint_every": 100,
                "keep_checkpoints": 2,
                "log_every": 1,
            },
        }
    )
