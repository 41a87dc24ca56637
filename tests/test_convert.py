"""`python -m gptjax.convert`: a Hugging Face directory becomes a complete workdir, and is exported again."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tokenizer_files import END, write_legacy

from gptjax import convert, sample
from gptjax.data.bpe import character_tokenizer, make_tokenizer, train_bpe
from gptjax.data.chat import chat_tokenizer
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.generation.decode import Decoder, Stop, generate
from gptjax.generation.sampling import Sampling
from gptjax.interop import huggingface
from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.pretrain import check_same_tokenizer
from gptjax.sample import continue_texts
from gptjax.trained import load_model

TEXT = ["the cat sat on the mat and the dog lay on the rug\n" * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXT, 300)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """(directory in Hugging Face's format, its config, its parameters)."""
    config = GPTConfig(tokenizer.vocab_size, 2, 2, 32, 32)
    params = jax.tree.map(np.asarray, jax.jit(lambda k: gpt.init(config, k))(jax.random.key(5)))
    directory = tmp_path_factory.mktemp("hf") / "model"
    huggingface.write(directory, config, params, tokenizer)
    return directory, config, params


def test_import_and_export_are_bitwise_and_the_workdir_is_complete(exported, tokenizer, tmp_path):
    directory, config, params = exported
    convert.import_weights(directory, tmp_path / "w")
    model = load_model(tmp_path / "w")
    assert dataclasses.replace(model.config, attention="auto") == config
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.tokenizer.fingerprint == tokenizer.fingerprint

    convert.export_weights(tmp_path / "w", tmp_path / "out")
    _, again = huggingface.read(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    convert.import_weights(tmp_path / "out", tmp_path / "w2")
    second = load_model(tmp_path / "w2")
    jax.tree.map(np.testing.assert_array_equal, second.params, params)
    assert (second.config, second.tokenizer.fingerprint) == (model.config, tokenizer.fingerprint)


def test_folders_with_glob_characters(exported, tmp_path):
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
    with pytest.raises(InputError, match="There is no usable tokenizer next to the weights.*with --tokenizer=DIR"):
        convert.import_weights(bare / "model.safetensors", tmp_path / "w")
    assert not (tmp_path / "w" / "config.json").exists()
    tokenizer.save(tmp_path / "tok")
    convert.import_weights(bare / "model.safetensors", tmp_path / "w", str(tmp_path / "tok"))
    assert load_model(tmp_path / "w").step == 0


def test_a_tokenizer_too_large_for_the_model_is_rejected(exported, tmp_path):
    directory, *_ = exported
    other = train_bpe(["abcdefghij klmnop qrstuv wxyz " * 50 + TEXT[0]], 400)
    other.save(tmp_path / "tok")
    if other.vocab_size <= 300:
        pytest.fail("the planted tokenizer should be larger than the model's vocabulary")
    with pytest.raises(InputError, match="The tokenizer has .* tokens and the model .*--tokenizer=DIR"):
        convert.import_weights(directory, tmp_path / "w", str(tmp_path / "tok"))


def test_a_workdir_in_use_is_not_overwritten(exported, tmp_path):
    directory, *_ = exported
    convert.import_weights(directory, tmp_path / "w")
    before = json.loads((tmp_path / "w" / "config.json").read_text())
    with pytest.raises(InputError, match="already holds a run: give a new --workdir"):
        convert.import_weights(directory, tmp_path / "w")
    assert json.loads((tmp_path / "w" / "config.json").read_text()) == before


# --- token ids in the directory, and what is not preserved ----------------------------------------------


def edit_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def copied(exported, tmp_path):
    """A copy of the exported directory without our own metadata of the tokenizer."""
    shutil.copytree(exported[0], tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_meta.json").unlink()
    return tmp_path / "hf"


def written(model, prompt="the cat", n=12):
    ids = model.tokenizer.encode(prompt)
    return generate(model.params, Decoder(model.config, mesh=model.mesh), [ids], Stop(n), Sampling(0.0))[0]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_sampling_stops_at_the_models_own_eos(exported, tmp_path, name, capsys):
    """At the id in config.json, or any of those in generation_config.json; both are exported again."""
    source = copied(exported, tmp_path)
    convert.import_weights(source, tmp_path / "free")
    model = load_model(tmp_path / "free")
    free = written(model)
    stop = next(i for i in free[3:] if i not in free[:3])
    if name == "config.json":
        (source / "generation_config.json").unlink()
        edit_json(source / name, eos_token_id=stop)
    else:
        edit_json(source / name, eos_token_id=[model.tokenizer.eot_id, 9999, stop], temperature=0.7, do_sample=True)
    capsys.readouterr()
    convert.import_weights(source, tmp_path / "w")
    printed = capsys.readouterr().out
    note = "Not imported from generation_config.json: do_sample=True, temperature=0.7. Use the flags of sample."
    assert (note in printed) == (name == "generation_config.json")
    model = load_model(tmp_path / "w")
    text = continue_texts(model, ["the cat"], max_new_tokens=12, sampling=Sampling(0.0), seed=0)[0]
    assert text == model.tokenizer.decode(free[: free.index(stop)])
    convert.export_weights(tmp_path / "w", tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [model.tokenizer.eot_id, stop]
    (tmp_path / "out/tokenizer_meta.json").unlink()
    convert.import_weights(tmp_path / "out", tmp_path / "again")
    assert load_model(tmp_path / "again").tokenizer.stop_ids == model.tokenizer.stop_ids


def test_an_empty_prompt_begins_with_the_models_own_token(exported, tmp_path, monkeypatch):
    """So does every prompt, if the tokenizer adds that token."""
    _, config, params = exported
    ids = write_legacy(tmp_path / "hf", [END, "<s>"], {"eos_token": END, "bos_token": "<s>"}, add_bos_token=True)
    tokenizer = make_tokenizer(str(tmp_path / "hf"), list)
    assert config.vocab_size == tokenizer.vocab_size
    huggingface.write(tmp_path / "out", config, params, tokenizer)
    convert.import_weights(tmp_path / "out", tmp_path / "w")
    model = load_model(tmp_path / "w")
    given = []
    monkeypatch.setattr(sample, "generate", lambda params, decoder, ids, *_, seed: given.extend(ids) or ids)
    continue_texts(model, ["", "the"], max_new_tokens=4, sampling=Sampling(0.0), seed=0)
    assert given == [[ids["<s>"]], [ids["<s>"], *tokenizer.encode("the")]]
    plain = dataclasses.replace(tokenizer.specials, adds_bos=False)
    model = dataclasses.replace(model, tokenizer=Tokenizer(tokenizer._engine, tokenizer.kind, plain))
    continue_texts(model, ["", "the"], max_new_tokens=4, sampling=Sampling(0.0), seed=0)
    assert given[2:] == [[ids["<s>"]], tokenizer.encode("the")]


def test_without_a_tokenizer(exported, tmp_path, capsys):
    """--tokenizer=none: import and export work, text is an error that names the fix, pre-training can start from it."""
    directory, config, params = exported
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(directory / name, bare / name)
    with pytest.raises(InputError, match="--tokenizer=DIR, or import none with --tokenizer=none"):
        convert.import_weights(bare, tmp_path / "w")
    convert.import_weights(bare, tmp_path / "w", "none")
    assert "Without a tokenizer this workdir cannot read or write text." in capsys.readouterr().out
    with pytest.raises(InputError, match="imported without a tokenizer.*--tokenizer=DIR.*gptjax.pretrain"):
        load_model(tmp_path / "w")
    convert.export_weights(tmp_path / "w", tmp_path / "out")
    assert "The workdir has no tokenizer, so none is exported." in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, huggingface.read(tmp_path / "out")[1], params)
    assert not (tmp_path / "out/tokenizer.json").exists()
    check_same_tokenizer(str(tmp_path / "w"), train_bpe(TEXT, 270))  # any will do
    with pytest.raises(InputError, match="another tokenizer"):
        convert.import_weights(directory, tmp_path / "w2")
        check_same_tokenizer(str(tmp_path / "w2"), train_bpe(TEXT, 270))


def test_padded_rows_and_a_foreign_template_are_noted(exported, tmp_path, capsys, tokenizer):
    directory, config, params = exported
    padded = dataclasses.replace(config, vocab_size=config.vocab_size + 4)
    rows, ids = padded.vocab_size, tokenizer.vocab_size
    tables = {"wte": np.concatenate([params["wte"], np.zeros((4, config.d_model), np.float32)])}
    huggingface.write(tmp_path / "hf", padded, params | tables, tokenizer)
    edit_json(tmp_path / "hf/tokenizer_config.json", chat_template="{{ messages }}")
    convert.import_weights(tmp_path / "hf", tmp_path / "w")
    printed = capsys.readouterr().out
    assert f"note: The model has {rows} vocabulary rows and the tokenizer {ids} ids" in printed
    assert "note: Its chat template is not used" in printed
    assert load_model(tmp_path / "w").template is None
    convert.export_weights(tmp_path / "w", tmp_path / "out")
    assert f"note: config.json has vocab_size {rows} and the tokenizer {ids} ids" in capsys.readouterr().out


@pytest.mark.parametrize("stage, template", [("sft", "plain"), ("ppo", "chat")])
def test_a_fine_tuned_model_keeps_its_template(exported, tmp_path, capsys, stage, template):
    directory, config, params = exported
    convert.import_weights(directory, tmp_path / "w")
    tuned = chat_tokenizer(load_model(tmp_path / "w").tokenizer)
    shutil.rmtree(tmp_path / "w")
    grown = heads.grow_vocabulary(params, tuned.vocab_size)
    huggingface.write(tmp_path / "hf", dataclasses.replace(config, vocab_size=tuned.vocab_size), grown, tuned)
    convert.import_weights(tmp_path / "hf", tmp_path / "w")  # now a workdir as that stage leaves it
    edit_json(tmp_path / "w/config.json", stage=stage, template=template, optimizer={}, data={"source": "rows.jsonl"})
    if stage == "ppo":
        base = {"stage": "pretrain", "data": {"source": "stdlib", "tokenizer": "char", "isolate_documents": True}}
        (tmp_path / "base").mkdir()
        (tmp_path / "base/config.json").write_text(json.dumps(base))
        edit_json(tmp_path / "w/config.json", rollout={"temperature": 0.7, "max_new_tokens": 24},
                  policy=str(tmp_path / "base"))  # fmt: skip
    capsys.readouterr()
    convert.export_weights(tmp_path / "w", tmp_path / "out")
    printed = capsys.readouterr().out
    assert ("The optimizer state is not exported" in printed) == (stage == "sft")
    assert ("value network" in printed) == ("isolated documents" in printed) == (stage == "ppo")
    assert ("adds nothing to a prompt" in printed) == (template == "plain")
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert ("chat_template" in settings) == (template == "chat")
    assert settings["eos_token"] == "<|endoftext|>" and settings["pad_token"] == "<|pad|>"
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (tuned.eot_id, tuned.pad_id)
    sampled = {key: generation[key] for key in generation if not key.endswith("_id")}
    expected = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24}
    assert sampled == (expected if stage == "ppo" else {})
    (tmp_path / "out/tokenizer_meta.json").unlink()
    convert.import_weights(tmp_path / "out", tmp_path / "again")
    back = load_model(tmp_path / "again")
    assert back.template == (template if template == "chat" else None)
    assert back.tokenizer.fingerprint == tuned.fingerprint


def test_invalid_prompts(exported, tmp_path, monkeypatch, capsys):
    directory, config, _ = exported
    convert.import_weights(directory, tmp_path / "w")
    model = load_model(tmp_path / "w")
    capsys.readouterr()
    monkeypatch.setattr(sample, "generate", lambda params, decoder, ids, *_, seed: ids)

    def write(prompt, n, model=model):
        return continue_texts(model, [prompt, prompt], max_new_tokens=n, sampling=Sampling(0.0), seed=0)

    with pytest.raises(InputError, match="has 45 tokens and the model's context is 32, which leaves no room"):
        write("q" * 45, 4)
    with pytest.raises(InputError, match=r"--prompt='a\\udcff': .*lone surrogate"):
        write("a\udcff", 4)
    none = dataclasses.replace(model, tokenizer=character_tokenizer(TEXT))
    with pytest.raises(InputError, match="--prompt='q': The character 'q'"):
        write("q", 4, none)
    with pytest.raises(InputError, match="no end-of-text to start from"):
        write("", 4, none)
    write("q" * 30, 4)
    out, error = capsys.readouterr()
    assert not out and error.count("note: ") == 1 and "leaves room for 3 of 4 new tokens" in error
    write("q" * 29, 4)
    assert capsys.readouterr() == ("", "")
