"""Responses to prompts that a template has turned into tokens."""

import numpy as np

from gptjax import console
from gptjax.data.chat import Template
from gptjax.generation.decode import Decoder, Stop, generate, row_keys
from gptjax.generation.sampling import Sampling

ROWS = 256  # prompts decoded together


def respond(params, decoder: Decoder, template: Template, prompts, *, max_new_tokens: int, temperature: float,
            seed: int, progress: str | None = None) -> list[list[int]]:  # fmt: skip
    """One response to each prompt, both as token ids; a response ends in end-of-text where the model produced it.

    A response that reaches the end of the context is truncated to it, so that it can be scored. progress: the text of
    a progress bar; None = no bar.
    """
    stop, out = Stop(max_new_tokens, template.eos_id), []
    for first in console.progress(range(0, len(prompts), ROWS), desc=progress, unit="batch", leave=False,
                                  disable=progress is None):  # fmt: skip
        some = prompts[first : first + ROWS]
        texts = generate(
            params, decoder, [list(map(int, p)) for p in some], stop, Sampling(temperature), keep_eot=True,
            keys=row_keys(seed, np.arange(first, first + len(some))),
        )  # fmt: skip
        out += [t[: decoder.config.context_length - len(p)] for p, t in zip(some, texts, strict=True)]
    return out
