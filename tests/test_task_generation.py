"""Text written for tasks: a function of the seed and the item, and stop strings wherever they begin."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gptjax.data import bpe
from gptjax.generation.sampling import Sampling
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.tasks import generate
from gptjax.tasks.generate import Continuation, continue_texts, generate_texts, prompt_ids, sampling_keys
from gptjax.tasks.stop_strings import cut_at_stop
from gptjax.tasks.task import load_task
from gptjax.trained import Model


@pytest.fixture(scope="module")
def model():
    tokenizer = bpe.train_bpe(["the cat is in the house, it is red or blue. " * 5], 280)
    config = GPTConfig(tokenizer.vocab_size, 1, 2, 16, 64, attention="cpu")
    params = jax.jit(lambda key: gpt.init(config, key))(jax.random.key(0))
    params["wte"] = params["wte"].at[: 280 - 24].multiply(0.3)  # merged tokens are likelier: it writes text
    params = jax.tree.map(lambda p: p * 4, params)
    return Model(config, params, tokenizer, jnp.float32, 0, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def prompts(model):
    return [prompt_ids(model.tokenizer, "the cat is " * (1 + i % 2) + "abc"[i]) for i in range(3)]


TASK = dataclasses.replace(
    load_task("gsm8k_self_consistency"), max_new_tokens=40, temperature=1.0, samples=2, stop=("zq",)
)


def test_sampled_text_is_a_function_of_seed_and_item(model, prompts):
    """Whatever the batch size is, and how many items follow."""
    texts = generate_texts(model, prompts, TASK, rows=1, seed=3)
    for rows in (2, 64):
        assert generate_texts(model, prompts, TASK, rows=rows, seed=3) == texts
    assert generate_texts(model, prompts[:2], TASK, rows=64, seed=3) == texts[:2]
    assert len({text for of_item in texts for text in of_item}) == 6
    assert generate_texts(model, prompts[:1], TASK, rows=1, seed=4)[0] != texts[0]
    same = generate_texts(model, [prompts[0]] * 2, TASK, rows=64, seed=3)
    assert same[0] == texts[0] and len({*same[0], *same[1]}) == 4


def test_a_stop_string_of_several_tokens_ends_the_text(model, prompts):
    keys, sampling = sampling_keys(0, 0, range(2)), Sampling(1.0)
    whole = continue_texts(model, prompts[:2], keys, Continuation((), 32, sampling))
    singles = {model.tokenizer.decode([i]) for i in range(model.tokenizer.vocab_size)}
    stop = next(whole[0][i : i + 4] for i in range(8, 40) if not any(whole[0][i : i + 4] in text for text in singles))
    assert 0 < len(cut_at_stop(whole[0], (stop,))) < len(whole[0])
    stopped = continue_texts(model, prompts[:2], keys, Continuation((stop,), 40, sampling))
    assert stopped[0] == cut_at_stop(whole[0], (stop,))
    assert stopped[1].startswith(whole[1]) or stop in whole[1]


def test_a_token_with_a_stop_string_ends_its_row(model, prompts, monkeypatch):
    """One call of the decoder, whose rows end at the stop: nothing goes on to a second piece."""
    keys, sampling, calls = sampling_keys(0, 0, range(1)), Sampling(1.0), []
    (whole,) = continue_texts(model, prompts[:1], keys, Continuation((), 32, sampling))
    stop = next(c for c in whole if c.isascii() and c.isalpha())
    decode = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args, **kw: calls.append(decode(*args, **kw)) or calls[-1])
    (text,) = continue_texts(model, prompts[:1], keys, Continuation((stop,), 40, sampling))
    assert len(calls) == 1 and len(calls[0][0]) < 32 and text == whole[: whole.index(stop)]


def test_end_of_text_is_no_part_of_an_answer(model):
    tokenizer = model.tokenizer
    assert generate._text(model, [*tokenizer.encode("red"), tokenizer.eot_id]) == "red"
    assert generate._text(model, [tokenizer.eot_id]) == generate._text(model, []) == ""
    assert set(tokenizer.stop_ids) < set(generate.stop_ids(tokenizer, (" ",)))
