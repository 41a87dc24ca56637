"""Generated text for a task: greedy, sampled or by beam search, up to a stop string."""

from collections.abc import Sequence

import jax

from gptjax.console import progress
from gptjax.generation.decode import generate
from gptjax.generation.sampling import Sampling
from gptjax.tasks.stop_strings import cut_at_stop, find_stop
from gptjax.tasks.task import Task
from gptjax.trained import Model
from gptjax.training.precision import frozen

_MOST_STOP_TOKENS = 64  # each is compared with every new token


def generate_texts(model: Model, prompts: Sequence[str], task: Task, *, rows: int, seed: int) -> list[list[str]]:
    """task.samples texts for each prompt, each cut at the first of task.stop. A prompt longer than the context leaves
    is cut on the left. rows: prompts at a time, of similar length."""
    tokenizer, room = model.tokenizer, model.config.context_length - task.max_new_tokens
    bos = [tokenizer.bos_id] if tokenizer.specials.adds_bos else []
    ids = [[*bos, *tokenizer.encode(prompt)[-(room - len(bos)) :]] for prompt in prompts]
    ids = [tokens or [tokenizer.bos_id] for tokens in ids]
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


def _new_tokens(model: Model, params, prompts, task: Task, stops: tuple[int, ...], seed: int) -> list[list[int]]:
    options = {"max_new_tokens": task.max_new_tokens, "eot_id": stops, "vocab": model.tokenizer.vocab_size,
               "dtype": model.dtype, "mesh": model.mesh}  # fmt: skip
    if task.beams > 1:
        raise NotImplementedError
    sampling = Sampling(task.temperature, task.top_k, task.top_p)
    return generate(params, model.config, prompts, sampling=sampling, seed=seed, keep_eot=True, **options)


def stop_tokens(tokenizer, stops: Sequence[str]) -> list[int]:
    """Tokens whose text contains a stop string: a row that produces one can end there. The text is cut in any case, so
    where there are many such tokens only the first are used."""
    return [i for i in range(tokenizer.vocab_size) if find_stop(tokenizer.decode([i]), stops) is not None][
        :_MOST_STOP_TOKENS
    ]
