"""Generated text for a task or for lm-evaluation-harness: greedy, sampled or by beam search, up to a stop string."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from gptjax.console import progress
from gptjax.data.chat import Template
from gptjax.data.tokenizer import Tokenizer
from gptjax.generation.beam import beam_search, gnmt_penalty
from gptjax.generation.decode import Stop, generate
from gptjax.generation.sampling import Sampling
from gptjax.tasks.requests import prefix_token
from gptjax.tasks.stop_strings import cut_at_stop, find_stop
from gptjax.tasks.task import Task
from gptjax.trained import Model
from gptjax.training.precision import frozen

_MOST_STOP_TOKENS = 64  # each is compared with every new token
_FIRST_PIECE = 32  # new tokens between looks for a stop string, at first


@dataclasses.dataclass(frozen=True)
class Continuation:
    """until: stop strings; a text ends before the first of them. max_new_tokens, sampling: of it."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


def generate_texts(model: Model, prompts: Sequence[Sequence[int]], task: Task, *, rows: int,
                   seed: int) -> list[list[str]]:  # fmt: skip
    """task.samples texts for each prompt (`prompt_ids`), each cut at the first of task.stop: a function of the prompt,
    its place and the seed. A prompt longer than the context leaves is cut on the left. rows: prompts at a time, of
    similar length."""
    room = model.config.context_length - task.max_new_tokens
    ids = [prompt[-room:] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts: list[list[str]] = [[] for _ in ids]
    continuation = Continuation(task.stop, task.max_new_tokens, Sampling(task.temperature, task.top_k, task.top_p))
    model = with_frozen_params(model)
    for start in progress(range(0, len(order), rows), desc="generating", unit="batch", leave=False):
        chosen = order[start : start + rows]
        some = [ids[i] for i in chosen]
        for sample in range(task.samples):
            if task.beams > 1:
                new = _search(model, some, task)
            else:
                new = continue_texts(model, some, sampling_keys(seed, sample, chosen), continuation)
            for i, text in zip(chosen, new, strict=True):
                texts[i].append(text)
    return texts


def continue_texts(model: Model, prompts: Sequence[Sequence[int]], keys_B, continuation: Continuation) -> list[str]:
    """The text that follows each prompt, sampled with its key: what the other prompts are changes it by rounding only.

    A row ends with a token that has a stop string in it. Those that several tokens make are looked for in the text, in
    pauses at 32, 64, 128, ... new tokens: after each the rows that have none go on, from a new prefill.
    model: with `with_frozen_params`, once for many calls.
    """
    until, limit = continuation.until, continuation.max_new_tokens
    ends = stop_ids(model.tokenizer, until)
    new: list[list[int]] = [[] for _ in prompts]
    going, written = list(range(len(prompts))), 0
    piece = _FIRST_PIECE if until else limit
    with jax.set_mesh(model.mesh):
        while going and written < limit:
            piece = min(piece, limit - written)
            rows = going + going[:1] * ((1 << (len(going) - 1).bit_length()) - len(going))  # few shapes to compile
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B[np.array(rows)], written)
            pieces = generate(model.params, model.decoder, [[*prompts[i], *new[i]] for i in rows], Stop(piece, ends),
                              continuation.sampling, keys=keys, keep_eot=True)  # fmt: skip
            for i, ids in zip(going, pieces, strict=False):
                new[i] += ids
            written += piece
            going = [i for i in going if len(new[i]) == written and new[i][-1] not in ends
                     and find_stop(_text(model, new[i]), until) is None]  # fmt: skip
            piece = written  # as much again, so that a text is prefilled a few times only
    return [cut_at_stop(_text(model, ids), until) for ids in new]


def _search(model: Model, prompts: Sequence[Sequence[int]], task: Task) -> list[str]:
    """Beam search; a hypothesis ends with a token that has a stop string in it."""
    penalty = functools.partial(gnmt_penalty, alpha=task.length_penalty)
    stop = Stop(task.max_new_tokens, stop_ids(model.tokenizer, task.stop))
    with jax.set_mesh(model.mesh):
        found = beam_search(model.params, model.decoder, prompts, stop, width=task.beams, penalty=penalty,
                            keep_eot=True)  # fmt: skip
    return [cut_at_stop(_text(model, hypothesis.tokens), task.stop) for hypothesis in found]


def sampling_keys(seed: int, sample: int, places: Sequence[int]):
    """Typed keys [places], one for a sample of the prompt in each place."""
    key = jax.random.fold_in(jax.random.key(seed), sample)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(places))


def with_frozen_params(model: Model) -> Model:
    """At 16 bits half the bytes are read for each token."""
    return dataclasses.replace(model, params=frozen(model.params, model.dtype))


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens, after beginning-of-text where the tokenizer adds it or there would be none. InputError: it is
    empty and the tokenizer has no such token."""
    ids = tokenizer.encode(prompt)
    return [prefix_token(tokenizer), *ids] if tokenizer.specials.adds_bos or not ids else ids


def _text(model: Model, ids: Sequence[int]) -> str:
    """Text of new tokens, without the end-of-text that ends it; of a chat model without role tokens."""
    if ids and ids[-1] in model.tokenizer.stop_ids:
        ids = ids[:-1]
    return (Template(model.tokenizer, "chat") if model.template == "chat" else model.tokenizer).decode(ids)


@functools.lru_cache(maxsize=16)
def stop_ids(tokenizer: Tokenizer, until: Sequence[str]) -> tuple[int, ...]:
    """Tokens that end a row: end-of-text, and those whose text contains a stop string. The text is cut in any case, so
    where there are many such tokens only the first are used."""
    with_stop = (i for i in range(tokenizer.vocab_size) if find_stop(tokenizer.decode([i]), until) is not None)
    found = [i for i, _ in zip(with_stop, range(_MOST_STOP_TOKENS), strict=False)]
    return tuple(dict.fromkeys((*tokenizer.stop_ids, *found)))
