"""A model as lm-eval's `LM`, so that its tasks run on it:  python -m jaxkd.evals.lm_eval --model jaxkd ..."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxkd.data import chat
from jaxkd.evals.scoring import score
from jaxkd.evals.subject import Subject, of_model, prefix_id, start_ids
from jaxkd.runtime import extras
from jaxkd.sampling.processors import Sampling
from jaxkd.sampling.text import Settings

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise extras.explain(error) from None

_NEW_TOKENS = 256  # where a task sets none, as lm-eval's own models have it
_MARK = "END OF THE LAST TURN "  # put after it to find where it ends; its space shows whether the template strips turns


@register_model("jaxkd")
class LM(TemplateLM):
    """lm-eval's interface over a model of this machine; its figures are those of lm-eval's `hf` on the same files.

    Args:
        path: as for `load_model`, or a `Subject`.
        batch_size: rows that are scored at a time, and completions that are written at a time.
        max_batch_size, device: what lm-eval gives to every model, without effect here.
    """

    def __init__(
        self, path: str | Subject, batch_size: int | str = 8, max_batch_size: Any = None, device: str | None = None
    ):
        super().__init__()
        self.subject = of_model(path) if isinstance(path, str) else path
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self._own = self.subject.writer.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The first of the model's end tokens, or what stands for one."""
        return next(iter(self._own.generation.eos), self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return prefix_id(self._own)

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.subject.writer.context

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's cache of requests."""
        return self._own.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template: the default one, or one by its name."""
        name = chat_template if isinstance(chat_template, str) else "default"
        return self._own.generation.templates.get(name) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The rendered conversation; without a generation prompt it ends within its last turn."""
        if self._own.chat_template is None:
            raise ValueError(f"{self.subject.writer.name} has no chat template: run the task without one")
        turns = [dict(turn) for turn in chat_history]
        if not add_generation_prompt:
            turns[-1]["content"] += _MARK
        rendered = chat.render(
            self._own.chat_template, turns, tokens=self._own.generation.tokens, source=self.subject.writer.name,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip
        if add_generation_prompt:
            return rendered
        end = rendered.rindex(_MARK.strip())
        return rendered[:end] if rendered.startswith(_MARK, end) else rendered[:end].rstrip()  # the template strips

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, control tokens in the text as such, after the start token where transformers gives one."""
        ids, first = self.subject.encode(string, rendered=True).tolist(), start_ids(self._own)
        stands = add_special_tokens is None and ids[: len(first)] == first
        return ids if stands or add_special_tokens is False else [*first, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        writer = self.subject.writer
        scores = score(self.subject.forward, writer.params, pairs, vocab=writer.vocab, batch=self.batch_size)
        answers = [(one.total, one.greedy) for one in scores]
        for (request, _, _), answer in zip(requests, answers):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: each token is scored once, in windows that are as long as the model's context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(window)) for window in parts]
            counts.append(len(windows))
        totals = [total for total, _ in self._loglikelihood_tokens(windows)]
        return [sum(totals[start:stop]) for start, stop in zip([0, *counts], counts)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions up to a stop text, greedy unless a task samples; a long context loses its first tokens."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for group in groups.values():
            settings = self._settings(requests[group[0]].args[1])
            if (room := self.max_length - settings.max_new_tokens) < 1:
                raise ValueError(f"max_gen_toks={settings.max_new_tokens} fills the context, {self.max_length} tokens")
            contexts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in group]
            prompts = [np.asarray(ids[-room:], np.int32) for ids in contexts]
            for i, [completion] in zip(group, self.subject.write(prompts, settings)):
                texts[i] = completion.text
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _settings(self, given: dict[str, Any]) -> Settings:
        values: dict[str, Any] = dict(normalize_gen_kwargs(given, _NEW_TOKENS))
        sampling = Sampling(0.0)
        if values["do_sample"]:
            sampling = Sampling(**{name: values[name] for name in Sampling._fields if name in values})
        elif "repetition_penalty" in values:
            sampling = sampling._replace(repetition_penalty=values["repetition_penalty"])
        stop = tuple(text for text in values["until"] if text)
        return Settings(sampling, values["max_gen_toks"], stop=stop, slots=self.batch_size)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
