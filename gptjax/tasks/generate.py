"""Generated text for a task: greedy, sampled or by beam search, up to a stop string."""

import functools
from collections.abc import Sequence

import jax

from gptjax.console import progress
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


def generate_texts(model: Model, prompts: Sequence[str], task: Task, *, rows: int, seed: int) -> list[list[str]]:
    """task.samples texts for each prompt, each cut at the first of task.stop. A prompt longer than the context leaves
    is cut on the left. rows: prompts at a time, of similar length."""
    tokenizer, room = model.tokenizer, model.config.context_length - task.max_new_tokens
    ids = [prompt_ids(tokenizer, prompt)[-room:] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts: list[list[str]] = [[] for _ in ids]
    stops = tuple(dict.fromkeys((*tokenizer.stop_ids, *stop_tokens(tokenizer, task.stop))))
    with jax.set_mesh(model.mesh):
        params = frozen(model.params, model.dtype)
        for start in progress(range(0, len(order), rows), desc="generating", unit="batch", leave=False):
            chosen = order[start : start + rows]
            some = [ids[i] for i in chosen]
            for sample in range(task.samples):
                new = _new_tokens(model, params, some, task, stops, seed + sample * len(ids) + start)
                for i, tokens in zip(chosen, new, strict=True):
                    texts[i].append(cut_at_stop(tokenizer.decode(tokens), task.stop))
    return texts


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens, after beginning-of-text where the tokenizer adds it or there would be none. InputError: it is
    empty and the tokenizer has no such token."""
    ids = tokenizer.encode(prompt)
    return [prefix_token(tokenizer), *ids] if tokenizer.specials.adds_bos or not ids else ids


def _new_tokens(model: Model, params, prompts, task: Task, stops: tuple[int, ...], seed: int) -> list[list[int]]:
    stop = Stop(task.max_new_tokens, stops)
    if task.beams > 1:
        penalty = functools.partial(gnmt_penalty, alpha=task.length_penalty)
        found = beam_search(params, model.decoder, prompts, stop, width=task.beams, penalty=penalty, keep_eot=True)
        return [hypothesis.tokens for hypothesis in found]
    sampling = Sampling(task.temperature, task.top_k, task.top_p)
    return generate(params, model.decoder, prompts, stop, sampling, seed=seed, keep_eot=True)


def stop_tokens(tokenizer: Tokenizer, stops: Sequence[str]) -> list[int]:
    """Tokens whose text contains a stop string: a row that produces one can end there. The text is cut in any case, so
    where there are many such tokens only the first are used."""
    return [i for i in range(tokenizer.vocab_size) if find_stop(tokenizer.decode([i]), stops) is not None][
        :_MOST_STOP_TOKENS
    ]
