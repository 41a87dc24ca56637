"""`python -m gptjax.convert`: a Hugging Face directory becomes a whole workdir, and goes out again."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gptjax import convert
from gptjax.data.tokenizer import train_bpe
from gptjax.errors import InputError
from gptjax.generation.sampling import Sampling
from gptjax.interop import huggingface
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.sample import continue_texts
from gptjax.workdir import load_model

TEXT = ["the cat sat on the mat and the dog lay on the rug\n" * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXT, 300)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """(directory in Hugging Face's layout, its config, its parameters)."""
    config = GPTConfig(tokenizer.vocab_size, 2, 2, 32, 32)
    params = jax.tree.map(np.asarray, jax.jit(lambda k: gpt.init(config, k))(jax.random.key(5)))
    directory = tmp_path_factory.mktemp("hf") / "model"
    huggingface.write(directory, config, params, tokenizer)
    return directory, config, params


def test_in_and_out_again_is_bitwise_and_the_workdir_is_whole(exported, tokenizer, tmp_path):
    directory, config, params = exported
    convert.import_weights(directory, tmp_path / "w")
    model = load_model(tmp_path / "w")
    assert dataclasses.replace(model.config, attention="auto") == config
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.tokenizer.fingerprint == tokenizer.fingerprint

    text = continue_texts(model, ["the cat"], max_new_tokens=8, sampling=Sampling(0.0), seed=0)[0]
    convert.export_weights(tmp_path / "w", tmp_path / "out")
    _, again = huggingface.read(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    convert.import_weights(tmp_path / "out", tmp_path / "w2")
    second = load_model(tmp_path / "w2")
    assert continue_texts(second, ["the cat"], max_new_tokens=8, sampling=Sampling(0.0), seed=0)[0] == text


def test_folders_with_characters_of_patterns(exported, tmp_path):
    directory, _, params = exported
    convert.import_weights(shutil.copytree(directory, tmp_path / "in[1]"), tmp_path / "[2026] a*" / "w")
    assert not (tmp_path / "[2026] a*" / "w" / "lock").exists()
    convert.export_weights(tmp_path / "[2026] a*" / "w", tmp_path / "out[1]")
    jax.tree.map(np.testing.assert_array_equal, huggingface.read(tmp_path / "out[1]")[1], params)


def test_a_single_file_takes_a_given_tokenizer(exported, tokenizer, tmp_path):
    directory, config, _ = exported
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    (bare / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(InputError, match="--tokenizer"):
        convert.import_weights(bare / "model.safetensors", tmp_path / "w")
    assert not (tmp_path / "w" / "config.json").exists()
    tokenizer.save(tmp_path / "tok")
    convert.import_weights(bare / "model.safetensors", tmp_path / "w", str(tmp_path / "tok"))
    assert load_model(tmp_path / "w").step == 0


def test_a_tokenizer_too_large_for_the_model_is_refused(exported, tmp_path):
    directory, *_ = exported
    other = train_bpe(["abcdefghij klmnop qrstuv wxyz " * 50 + TEXT[0]], 400)
    other.save(tmp_path / "tok")
    if other.vocab_size <= 300:
        pytest.fail("the planted tokenizer should be larger than the model's vocabulary")
    with pytest.raises(InputError, match="do not belong together"):
        convert.import_weights(directory, tmp_path / "w", str(tmp_path / "tok"))


def test_a_workdir_in_use_is_not_overwritten(exported, tmp_path):
    directory, *_ = exported
    convert.import_weights(directory, tmp_path / "w")
    before = json.loads((tmp_path / "w" / "config.json").read_text())
    with pytest.raises(InputError, match="already holds a run"):
        convert.import_weights(directory, tmp_path / "w")
    assert json.loads((tmp_path / "w" / "config.json").read_text()) == before
