"""Greedy text and cut-offs against transformers' on the same weights and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.sampling.processors import Sampling, penalised, sampling_logprobs
from jaxkd.sampling.sampler import Sampler, decoder, sample

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
NEW = 64


@pytest.fixture(scope="module")
def greedy(teacher, reference):
    """Eight prompts of unequal lengths, and 64 tokens after each by transformers, one prompt at a time."""
    starts = [(0, 5), (40, 12), (90, 1), (130, 30), (200, 7), (230, 18), (300, 3), (350, 25)]
    prompts = [teacher.tokens[start : start + size] for start, size in starts]
    options = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    texts = []
    for prompt in prompts:
        with torch.no_grad():
            ids = torch.tensor(prompt[None], dtype=torch.long)
            texts.append(reference.eval().generate(ids, attention_mask=torch.ones_like(ids), **options)[0].numpy())
    return prompts, [text[len(prompt) :] for prompt, text in zip(prompts, texts)]


@pytest.mark.parametrize("slots", [0, 1])
def test_greedy_text_of_mixed_lengths(teacher, greedy, slots):
    """All eight at once, and one after the other in one slot."""
    prompts, theirs = greedy
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((8, 30), np.int32)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    sampler = Sampler(decoder(teacher.config), teacher.tokenizer.vocab, NEW, Sampling(0.0), slots=slots)
    keys = jax.random.split(jax.random.key(0), 8)
    text = jax.jit(lambda *inputs: sample(sampler, *inputs))(teacher.params, padded, lengths, keys)
    np.testing.assert_array_equal(text.tokens, theirs)


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        (Sampling(0.7), lambda p: [p.TemperatureLogitsWarper(0.7)]),
        (Sampling(top_k=7), lambda p: [p.TopKLogitsWarper(7)]),
        (Sampling(top_p=0.8), lambda p: [p.TopPLogitsWarper(0.8)]),
        (Sampling(min_p=0.07), lambda p: [p.MinPLogitsWarper(0.07)]),
        (
            Sampling(1.5, 40, 0.9, 0.02, 1.3),
            lambda p: [
                p.RepetitionPenaltyLogitsProcessor(1.3), p.TemperatureLogitsWarper(1.5), p.TopKLogitsWarper(40),
                p.TopPLogitsWarper(0.9), p.MinPLogitsWarper(0.02),
            ],
        ),
    ],
)  # fmt: skip
def test_probabilities_are_those_of_their_processors(sampling, processors):
    rng = np.random.default_rng(0)
    z, ids = rng.normal(size=(20, 300)).astype(np.float32) * 3, rng.integers(0, 300, (20, 15))
    theirs = torch.tensor(z)
    for processor in processors(transformers.generation.logits_process):
        theirs = processor(torch.tensor(ids), theirs)
    theirs = torch.log_softmax(theirs, -1).numpy()
    seen = np.zeros(z.shape, bool)
    seen[np.arange(20)[:, None], ids] = True
    ours = np.asarray(sampling_logprobs(penalised(jnp.asarray(z), sampling, jnp.asarray(seen), None), sampling))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(np.exp(ours), np.exp(theirs), atol=1e-6)
