"""The real teacher in our decoder and in transformers, loaded once."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of


def _batch(tokens, segments=None, positions=None):
    fields = {"segments": segments, "positions": positions}
    return batch_of(np.atleast_2d(tokens), **{k: np.atleast_2d(v) for k, v in fields.items() if v is not None})


@pytest.fixture(scope="session")
def our_logits():
    """(config, params, tokens [L] or [B L], segments, positions) -> logits [B L vocab], float32."""
    from jaxkd.models import transformer

    def run(config, params, tokens, segments=None, positions=None):
        @jax.jit
        def logits(params, batch):
            head = transformer.forward(config, params, batch, dtype=jnp.float32).head
            return (head.hidden @ head.unembed)[..., : config.vocab]

        return np.asarray(logits(params, _batch(tokens, segments, positions)))

    return run


@pytest.fixture(scope="session")
def their_logits():
    """(transformers model, tokens [L] or [B L]) -> logits [B L vocab]."""
    import torch

    def run(model, tokens):
        with torch.no_grad():
            return model.eval()(torch.tensor(np.atleast_2d(tokens), dtype=torch.long)).logits.float().numpy()

    return run


@pytest.fixture(scope="session")
def teacher():
    """SmolLM2-135M-Instruct: checkpoint, config, params, tokenizer, and 512 `tokens` of plain English."""
    from pydoc_data import topics

    from jaxkd.data import tokenize
    from jaxkd.models import weights

    try:
        checkpoint = weights.open_checkpoint("smollm2-135m-instruct")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = tokenize.from_gguf(checkpoint.tokenizer_fields)
    [(ids, _)] = tokenizer.encode([topics.topics["exceptions"] + topics.topics["naming"]])
    tokens = np.concatenate([[tokenizer.start], ids])[:512]  # models of this family expect the start token
    return SimpleNamespace(
        checkpoint=checkpoint,
        config=checkpoint.config,
        params=jax.device_put(checkpoint.load()),
        tokenizer=tokenizer,
        tokens=tokens,
    )


@pytest.fixture(scope="session")
def reference(teacher):
    """transformers' Llama with the GGUF file's tensors, filled without our name table and layout code."""
    import torch
    import transformers

    from jaxkd.models import families, formats

    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_dict(families.to_hf(teacher.config))
    model = transformers.LlamaForCausalLM(config)
    _, entries = formats.read_gguf(teacher.checkpoint.path)
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    parts |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
    parts |= {"ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    parts |= {"ffn_down": "mlp.down_proj"}
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    state = {}
    for name, entry in entries.items():
        array = np.array(entry.read(), np.float32)
        if name in outer:
            state[outer[name]] = torch.from_numpy(array)
            continue
        _, layer, part, _ = name.split(".")
        if heads := {"attn_q": 9, "attn_k": 3}.get(part):
            array = array.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(array.shape)
        state[f"model.layers.{layer}.{parts[part]}.weight"] = torch.from_numpy(array)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model
