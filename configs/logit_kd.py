"""Logit distillation, the template: copy this file, change what your experiment changes.

    jaxkd train --config configs/logit_kd.py --workdir runs/logit_kd
    jaxkd train --config "configs/logit_kd.py:generalized_jsd(beta=0.1)" --workdir runs/jsd \
        --config.teacher.path=models/Llama-3.1-8B \
        --config.student.path=models/Llama-3.2-1B --config.student.keep=0

The argument is the divergence, a call of jaxkd/losses/divergences.py (default: forward_kl). Loss: Hinton et al. 2015
(arXiv 1503.02531), alpha T^2 KL(p^(T) || q^(T)) + (1 - alpha) CE with alpha = 0.5 and T = 2. The models, SmolLM2-135M
and half its layers at 16,384 tokens a step, are meant for an accelerator (not measured on one yet); two CPU cores would
need minutes a step. Expected numbers: see configs/quickstart.py. A recipe states what differs from the defaults;
docs/config.md lists all keys, and any of them can be set on the command line.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "forward_kl") -> ConfigDict:
    """The keys that differ from the defaults (docs/config.md)."""
    return ConfigDict(
        {
            # A known name, a GGUF file, a Hugging Face directory (config.json and safetensors), or "random" with
            # `shape`. Its weights are stored and its activations computed in `dtype`.
            "teacher": {"path": "smollm2-135m-instruct", "dtype": "bfloat16"},
            # Cut from the teacher: the 15 layers whose removal raises the loss most; `layers` names them instead. With
            # `path` the student is a checkpoint of its own.
            "student": {"keep": 15},
            # Any number of named terms, computed in one kernel call. A weight or a temperature may be a schedule:
            # {"schedule": "linear", "peak": 1.0, "end": 0.1}.
            "objective": {
                "kd": {"divergence": arg, "weight": 0.5, "temperature": 2.0},
                "ce": {"divergence": "next_token", "weight": 0.5},
            },
            "data": {
                # builtin:NAME, a file, folder or glob of JSONL, text or Parquet, or tfds:NAME.
                "domains": {name: f"builtin:{name}" for name in ("code", "legal", "manual", "scripture")},
                "batch": 32,
                "length": 512,
                "valid_rows": 64,
                "valid_share": 0.02,
            },
            "optim": {
                "lr": {"schedule": "cosine", "peak": 3e-4, "warmup": 50, "end": 3e-5},
                "micro_batches": 4,
            },
            "run": {
                "steps": 1000,
                "dtype": "bfloat16",  # of activations and matmul operands; parameters are float32
                "remat": "layer",
                "eval_every": 250,
                "eval_batch": 16,
            },
        }
    )
