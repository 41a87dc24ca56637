"""The stages that take an LSTM: it learns, resumes, is sampled from and fine-tuned; its presets; what is refused."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_runs import on_one_device, overridden
from conftest import ROOT
from runs import assert_same_run, lines, until_sigterm

from gptjax.aot.check import Request, build_program
from gptjax.config import build, config_dict
from gptjax.convert import export_weights
from gptjax.cost.topology import parse
from gptjax.data.corpus import pretraining_text
from gptjax.describe import describe
from gptjax.errors import InputError
from gptjax.evaluate import score
from gptjax.finetune import FinetuneConfig, finetune
from gptjax.generation import plain
from gptjax.generation.decode import Decoder, Stop, generate
from gptjax.generation.sampling import Sampling
from gptjax.model import architecture, heads
from gptjax.model.architecture import ModelConfig
from gptjax.model.lstm import LSTMConfig
from gptjax.model.spec import GPTConfig
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.sft import SFTConfig, sft
from gptjax.trained import load_model

V = 17
MLSTM = LSTMConfig(V, units=8, d_embed=6, context_length=10, cell="mlstm", tied_head=False)
init = jax.jit(architecture.init, static_argnums=0)

# --- the stages ---------------------------------------------------------------------------------------------

SMALL = dict(cell="mlstm", units=32, d_embed=16, context_length=48, tied_head=False, dropout=0.1)
V_SMALL = 270


def pretrain_config(source, **overrides):
    c = config_dict(PretrainConfig)
    c.model = config_dict(LSTMConfig, **SMALL)
    c.data.update(source=str(source), tokenizer=f"bpe:{V_SMALL}")
    c.steps, c.batch_size, c.optimizer.learning_rate = 60, 8, 2e-2
    c.eval.update(batches=2, every=30)
    c.checkpoint.every = 20
    return overridden(c, overrides)


@pytest.fixture(scope="module")
def learned(alignment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lstm") / "run"
    with on_one_device():
        assert pretrain(pretrain_config(alignment["text"], samples__prompts=("ba ko",)), str(workdir)).finished
    return workdir


def test_it_learns_and_is_opened_again(learned):
    """config.json says what it is; evaluate scores it, sampling from the state is sampling from the whole text."""
    first, *_, last = lines(learned, "evaluations")
    assert first["loss"] > 5.5 and last["loss"] < 3.0
    run = json.loads((learned / "config.json").read_text())
    assert run["model"] == {**SMALL, "vocab_size": V_SMALL} and run["kind"] == "lm"
    with on_one_device():
        model = load_model(learned)
        assert model.config == LSTMConfig(vocab_size=V_SMALL, **SMALL)
        assert score(model, pretraining_text(learned), 8)["loss"] == pytest.approx(last["loss"], rel=0.1)  # 2 batches
        prompts = [model.tokenizer.encode(text) for text in ("ba ko mi", "zu")]
        sampling = Sampling(0.8)
        drawn = generate(model.params, Decoder(model.config), prompts, Stop(6), sampling, seed=1)
        for i, (prompt, out) in enumerate(zip(prompts, drawn, strict=True)):
            key = jax.random.fold_in(jax.random.key(1), i)
            assert out == plain.decode(model.params, model.config, prompt, key, new_tokens=6, sampling=sampling)
    assert len(lines(learned, "samples")) == 2


def test_killed_and_resumed_it_is_the_same_run(learned, alignment, tmp_path):
    c = pretrain_config(alignment["text"], samples__prompts=("ba ko",))
    with on_one_device():
        assert not until_sigterm(pretrain, c, tmp_path / "run", 31).finished
        assert pretrain(c, str(tmp_path / "run")).finished
    assert_same_run(tmp_path / "run", learned, 60)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Texts labeled by whether they end in 'zu'."""
    rng, words = np.random.default_rng(0), ("ba", "ko", "mi", "ru", "te")
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = []
    for i in range(160):
        text = [words[k] for k in rng.integers(0, 5, 5)]
        text[-1] = "zu" if i % 2 else "ba"
        made.append({"text": " ".join(text), "label": ("no", "yes")[i % 2]})
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def finetune_config(init_from, rows, **overrides):
    c = config_dict(FinetuneConfig)
    c.init_from, c.data.train, c.data.valid = str(init_from), str(rows), "0.2"
    c.steps, c.batch_size, c.optimizer.learning_rate, c.eval.every = 60, 16, 2e-2, 60
    return overridden(c, overrides)


def test_it_is_fine_tuned_like_gpt_1(learned, rows, tmp_path):
    with on_one_device():
        assert finetune(finetune_config(learned, rows), tmp_path / "run").finished
    first, *_, last = lines(tmp_path / "run", "evaluations")
    assert first["accuracy"] < 0.8 and last["accuracy"] > 0.9
    assert lines(tmp_path / "run")[-1]["lm_loss"] > 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["units"] == 32 and saved["model"]["vocab_size"] == V_SMALL + 3


def test_what_is_transferred_and_new():
    old, fresh = (init(MLSTM, jax.random.key(i)) for i in range(2))
    for layers, parts in {None: (old, old), 1: (old, old), 0: (old, fresh), -1: (fresh, fresh)}.items():
        found = heads.transferred(old, fresh, MLSTM, layers)
        assert found["wte"] is parts[0]["wte"] and found["cell"] is parts[1]["cell"]
    made = heads.classifier(old, dataclasses.replace(MLSTM, vocab_size=V + 3), 2, jax.random.key(0))["trunk"]
    grown = dataclasses.replace(MLSTM, vocab_size=V + 3)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(made) == shapes(init(grown, jax.random.key(0)))
    assert not made["lm_bias"][V:].any()


# --- presets and what is refused ----------------------------------------------------------------------------


def preset(*argument, file="lstm"):
    spec = importlib.util.spec_from_file_location("preset", ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def test_the_baseline_is_trained_as_gpt_1():
    ours, gpt1 = preset().to_dict(), preset(file="gpt1").to_dict()
    assert ours.pop("model") == dict(
        cell="lstm", units=2048, d_embed=2048, vocab_size=None, context_length=512, tied_head=True, dropout=0.1
    )
    gpt1.pop("model")
    assert ours == gpt1
    assert describe(preset().to_dict())["params"] == 116_461_568


def test_the_mlstm_is_the_studys():
    c = preset("mlstm").to_dict()
    assert describe(c)["params"] == 86_323_521  # with end-of-text
    c["model"]["vocab_size"] = 256
    found = describe(c)
    assert found["params"] == 86_319_360 and found["steps"] == 10**6 and found["batch_tokens"] == 128 * 256
    assert found["flops_per_token"]["6n"] == 6 * 86_319_360 and found["peak_per_tpu_chip"] is None


def test_the_keys_of_a_section_say_what_it_is():
    assert build(ModelConfig, {"units": 4, "d_embed": 4, "vocab_size": 9, "context_length": 8}).cell == "lstm"
    assert isinstance(build(ModelConfig, {"n_layer": 1, "n_head": 1, "d_model": 4, "vocab_size": 9,
                                          "context_length": 8, "dropout": 0.1}), GPTConfig)  # fmt: skip
    with pytest.raises(InputError, match="Unknown key config.model.unit: did you mean 'units'"):
        build(PretrainConfig, {"model": {"unit": 4, "cell": "lstm", "vocab_size": 9, "context_length": 8}})


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model__cell": "gru"}, "choose lstm or mlstm"),
        ({"model__tied_head": True}, "as wide as the state: model.d_embed=16, model.units=32"),
        ({"model__units": 0}, "config.model.units=0 must be at least 1"),
        ({"model__dropout": 1.0}, "config.model.dropout=1.0 must be"),
        ({"mesh__tensor": 2}, "mesh.tensor=2: an LSTM is one layer"),
        ({"mesh__seq": 2}, "mesh.seq=2: an LSTM"),
        ({"mesh__stage": 2}, "mesh.stage=2: an LSTM"),
        ({"mesh__fsdp": 8, "batch_size": 12}, "batch_size=12 is not divisible"),
    ],
)
def test_bad_pretraining(alignment, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        pretrain(pretrain_config(alignment["text"], **overrides), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_needs_a_gpt_says_so(learned, rows, alignment, tmp_path):
    c = config_dict(SFTConfig)
    c.init_from, c.data.source, c.steps, c.batch_size = str(learned), str(alignment["demonstrations"]), 2, 8
    with on_one_device():
        with pytest.raises(InputError, match="The model is an LSTM.*: SFT needs a GPT"):
            sft(c, str(tmp_path / "sft"))
        with pytest.raises(InputError, match="Hugging Face's format needs a GPT"):
            export_weights(learned, tmp_path / "hf")
        with pytest.raises(InputError, match="model.attention is an option of GPTs"):
            finetune(finetune_config(learned, rows, model__attention="cpu"), tmp_path / "finetuned")
        with pytest.raises(InputError, match="has model.n_layer=None, this run 1"):
            pretrain(other_model(alignment["text"], learned), str(tmp_path / "gpt"))
    with pytest.raises(InputError, match="aot needs a GPT"):
        build_program(preset("mlstm").to_dict(), parse("v5e-1"), Request())


def other_model(source, init_from):
    c = config_dict(PretrainConfig)
    c.model.update(n_layer=1, n_head=1, d_model=8, context_length=48)
    c.data.update(source=str(source), tokenizer=f"bpe:{V_SMALL}")
    c.steps, c.batch_size, c.init_from = 2, 8, str(init_from)
    return c
