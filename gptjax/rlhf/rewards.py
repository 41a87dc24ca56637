"""Rewards from Python: any callable on texts or tokens, alone or added to the reward model's score.

    def reward(prompts: list[str], responses: list[str]) -> Sequence[float]      on='text'
    def reward(prompts: list[list[int]], responses: list[list[int]]) -> ...      on='tokens'

One float for each response. The tokens of a response include end-of-text if the policy produced it; its text does not.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence

import numpy as np

from gptjax.data.chat import Template
from gptjax.distributed import hosts
from gptjax.errors import InputError


def load_callable(name: str) -> Callable:
    """The function that 'package.module:function' names. Raises InputError if there is none."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(f"The reward function {name!r} is malformed: write package.module:function.")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"The reward function {name!r} cannot be imported ({error}): check its name and the Python path."
        ) from error
    if not callable(found):
        raise InputError(f"The reward function {name!r} is a {type(found).__name__}, not a function: give its name.")
    return found


def call(function: Callable, on: str, template: Template, prompts: Sequence, prompt_texts: Sequence[str],
         responses: Sequence) -> np.ndarray:  # fmt: skip
    """Calls the function and checks its values: float32 [B]. Raises InputError for another shape or non-finite values.

    With several hosts process 0 alone calls it, on the whole batch, and sends the values to the others: each response
    is scored once, and a function that compares responses, keeps state or calls a service works as on one host.
    """
    once = lambda: _values(function, on, template, prompts, prompt_texts, responses).tolist()
    return np.array(hosts.from_first(once), np.float32)


def _values(function, on, template, prompts, prompt_texts, responses) -> np.ndarray:
    if on == "text":
        values = function(list(prompt_texts), [template.decode(ids) for ids in responses])
    else:
        values = function([list(map(int, ids)) for ids in prompts], [list(map(int, ids)) for ids in responses])
    try:
        values = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The reward function gave no numbers ({error}): it must return one float for each response."
        ) from error
    if values.shape != (len(responses),):
        raise InputError(
            f"The reward function returned the shape {values.shape} for {len(responses)} responses: it must return "
            f"({len(responses)},), one float for each."
        )
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(
            f"The reward function gave {values[row]} for response {row} ({template.decode(responses[row])[:60]!r}): "
            "rewards must be finite."
        )
    return values


def split_rows(tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray) -> tuple[list, list]:
    """(prompts, responses) as lists of ids. tokens: [B, T], lengths: [B], mask: [B, R] (networks.py)."""
    slots = tokens.shape[1] - mask.shape[1]
    counts = mask.sum(1).astype(int)
    prompts = [row[slots - n : slots].tolist() for row, n in zip(tokens, lengths, strict=True)]
    responses = [row[slots : slots + n].tolist() for row, n in zip(tokens, counts, strict=True)]
    return prompts, responses


@dataclasses.dataclass(frozen=True)
class Rule:
    """Makes a callable the `rule` of rollout.collect. on: what it is called with, 'text' or 'tokens'."""

    function: Callable
    on: str
    template: Template

    def of(self, prompt_texts: Sequence[str]):
        """A function (tokens, lengths, mask) -> float32 [B] that scores responses to these prompts."""

        def score(tokens, lengths, mask) -> np.ndarray:
            prompts, responses = split_rows(*map(hosts.whole, (tokens, lengths, mask)))
            return call(self.function, self.on, self.template, prompts, prompt_texts, responses)

        return score
