"""Responses to prompts that a template has turned into tokens."""

from gptjax import console
from gptjax.data.chat import Template
from gptjax.generation.decode import generate
from gptjax.generation.sampling import Sampling


def respond(params, model, prompts, template: Template, *, max_new_tokens, temperature, seed, dtype, mesh, rows=256,
            progress: str | None = None) -> list[list[int]]:  # fmt: skip
    """One response to each prompt, both as token ids; a response ends in end-of-text where the model produced it.

    A response that reaches the end of the context is truncated to it, so that it can be scored. rows: prompts decoded
    together. progress: the text of a progress bar; None = no bar.
    """
    out = []
    for first in console.progress(range(0, len(prompts), rows), desc=progress, unit="batch", leave=False,
                                  disable=progress is None):  # fmt: skip
        some = prompts[first : first + rows]
        texts = generate(
            params, model, [list(map(int, p)) for p in some], max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature), seed=seed + first, eot_id=template.eos_id, keep_eot=True,
            vocab=template.vocab_size, dtype=dtype, mesh=mesh,
        )  # fmt: skip
        out += [t[: model.context_length - len(p)] for p, t in zip(some, texts, strict=True)]
    return out
