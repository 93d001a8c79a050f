"""A model under evaluation: it writes completions, and it scores given ones."""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import PyTree
from jaxkd.data import conversations
from jaxkd.data.load_model import load_model
from jaxkd.evals.scoring import Score, score
from jaxkd.models.transformer import CausalLM
from jaxkd.sampling import text
from jaxkd.sampling.sampler import decoder
from jaxkd.sampling.text import Completion, Settings, Writer

_BLOCK = 64  # prompts that are sampled at a time: their caches are held together

Prompt = str | list[dict[str, Any]]
"""A text to continue, or the turns of a conversation to answer."""


class Subject(NamedTuple):
    """A model with its tokenizer, in both its forms."""

    writer: Writer
    forward: CausalLM

    def render(self, prompt: Prompt, system: str = "") -> str:
        """The text of a prompt; a conversation's by the chat template, with `system` where it has no such turn."""
        if isinstance(prompt, str):
            return prompt
        first = [{"role": "system", "content": system}] if system and prompt[0]["role"] != "system" else []
        return conversations.prompt(self.writer.tokenizer, [*first, *prompt], self.writer.name)

    def encode(self, content: str, rendered: bool = False) -> np.ndarray:
        """Token ids of a text: with the start token that transformers would give it or, if `rendered`, as it is."""
        tokenizer = self.writer.tokenizer
        if rendered:
            return tokenizer.encode_rendered([content])[0][0]
        [(ids, _)] = tokenizer.encode([content])
        return np.concatenate([np.asarray(start_ids(tokenizer), np.int32), ids])

    def pair(self, context: str, continuation: str, rendered: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a context and of what follows it, split from those of the whole text.

        White space at the context's end belongs to the continuation, whose first token usually holds it. An empty
        context is the start token, or else an end token.
        """
        bare = context.rstrip()
        before, whole = self.encode(bare, rendered), self.encode(context + continuation, rendered)
        if not len(before):
            return np.asarray([prefix_id(self.writer.tokenizer)], np.int32), whole
        return before, whole[len(before) :]

    def fingerprint(self) -> str:
        """Of its tokenizer and of its weights by their sums."""
        sums = jax.device_get(_sums(self.writer.params))
        parts = [self.writer.tokenizer.fingerprint.encode(), *(np.asarray(x).tobytes() for x in jax.tree.leaves(sums))]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def write(self, prompts: Sequence[np.ndarray], settings: Settings) -> list[list[Completion]]:
        """The completions of each prompt, token ids [P]: some prompts at a time, in blocks of one size.

        A text depends on the seed, its prompt's place and its own alone.
        """
        blocks = -(-len(prompts) // _BLOCK)
        size = -(-len(prompts) // max(blocks, 1))
        written: list[list[Completion]] = []
        for block in range(blocks):
            part = list(prompts[block * size : (block + 1) * size])
            part += part[-1:] * (size - len(part))  # all blocks share a program
            seed = int(np.random.SeedSequence([settings.seed, block]).generate_state(1)[0]) >> 1
            written += text.write(self.writer, part, settings._replace(seed=seed))
        return written[: len(prompts)]

    def score(self, pairs: Sequence[tuple[Any, Any]]) -> list[Score]:
        """See `scoring.score`."""
        return score(self.forward, self.writer.params, pairs, vocab=self.writer.vocab)


@jax.jit
def _sums(params: PyTree) -> PyTree:
    """Of each array's rows, so that values which only change places are told apart."""
    return jax.tree.map(lambda x: x.astype(jnp.float32).sum(tuple(range(1, x.ndim))), params)


def start_ids(tokenizer: Any) -> list[int]:
    """What transformers puts before a text: by `add_bos_token`, or else by the tokenizer's own post-processor."""
    generation = tokenizer.generation
    stated = generation.tokenizer_config.get("add_bos_token")
    if stated is None:
        encoding = tokenizer.tokenizer.encode("a")
        marked = zip(encoding.ids, encoding.special_tokens_mask)
        return [token for token, special in itertools.takewhile(lambda pair: pair[1], marked)]
    return [generation.bos] if stated and generation.bos is not None else []


def prefix_id(tokenizer: Any) -> int:
    """The token that stands before a text without context: the start token, or else an end token."""
    generation = tokenizer.generation
    first = next((i for i in (generation.bos, *generation.eos) if i is not None), None)
    if first is None:
        raise ValueError("the tokenizer has no start and no end token to stand for an empty prompt: give it a prompt")
    return first


def of_model(path: str) -> Subject:
    """Any model on this machine; FileNotFoundError where it has no tokenizer."""
    model = load_model(path)
    if model.tokenizer is None:
        raise FileNotFoundError(f"{path} has no tokenizer.json: put the model's own beside its weights")
    config = model.forward.config
    vocab = min(model.tokenizer.vocab, config.vocab)
    writer = Writer(str(path), decoder(config), model.params, model.tokenizer, config.max_length, vocab)
    return Subject(writer, model.forward)
