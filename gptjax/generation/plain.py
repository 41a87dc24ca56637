"""Autoregressive sampling without a KV cache: the model reads the whole text again for every token. Read this first;
decode.py gives the same tokens (tests/test_generation.py) from a cache, for a batch, in one program."""

import functools

import jax
import numpy as np

from gptjax.generation.sampling import Sampling, sample
from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig


def decode(params, config: ModelConfig, prompt: list[int], key, *, new_tokens: int, sampling: Sampling, eot_id=None):
    """The tokens that follow a prompt, up to and including end-of-text where the model produces it."""
    text = list(prompt)
    for i in range(new_tokens):
        text_T = np.pad(text, (0, len(prompt) + new_tokens - 1 - len(text)))  # of one length, so that it compiles once
        token = next_token(params, config, text_T, len(text), jax.random.fold_in(key, i), sampling)
        text.append(int(token))
        if text[-1] == eot_id:
            break
    return text[len(prompt) :]


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def next_token(params, config: ModelConfig, text_T, n, key, sampling: Sampling):
    """The token after the first n of a text. What comes after those is the future, which no position sees."""
    x_BTD = architecture.hidden(params, config, text_T[None])
    logits_V = architecture.logits(params, config, x_BTD[0, n - 1])
    return sample(logits_V, key, sampling)
