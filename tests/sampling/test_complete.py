"""`kd.generate`: completions of token sequences with a model that `kd.load_model` gives."""

import numpy as np
import pytest
from harness import random_params

import jaxkd as kd
from jaxkd.models.transformer import CausalLM, Config

CONFIG = Config(vocab=90, embed=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=32, max_length=64)


def test_completions_depend_on_their_own_prompt():
    model, params = CausalLM(CONFIG), random_params(CONFIG, 0)
    both = kd.generate(model, params, [[5, 6, 7], [9]], max_new_tokens=6, vocab=80)
    assert [len(ids) for ids in both] == [6, 6]
    assert max(ids.max() for ids in both) < 80
    np.testing.assert_array_equal(kd.generate(model, params, [[9]], max_new_tokens=6, vocab=80)[0], both[1])
    ended = kd.generate(model, params, [[9]], max_new_tokens=6, vocab=80, end=int(both[1][2]))[0]
    first = int(np.flatnonzero(both[1] == both[1][2])[0])
    np.testing.assert_array_equal(ended, both[1][: first + 1])
    with pytest.raises(ValueError, match="prompt"):
        kd.generate(model, params, [[]])
