"""LSTM and mLSTM: the recurrence against numpy, its gradients, resets, dropout, and the stages that take it."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_runs import on_one_device, overridden
from conftest import ROOT
from numerics import assert_close, tolerance
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
from gptjax.generation.decode import generate
from gptjax.generation.sampling import Sampling
from gptjax.model import architecture, heads, lstm
from gptjax.model.architecture import ModelConfig
from gptjax.model.lstm import LSTMConfig
from gptjax.model.spec import GPT1, GPTConfig
from gptjax.objectives.lm import causal_lm_loss, lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import parameter_shardings
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.sft import SFTConfig, sft
from gptjax.trained import load_model

V, T, B = 17, 10, 4
LSTM = LSTMConfig(V, units=8, d_embed=8, context_length=T)
MLSTM = LSTMConfig(V, units=8, d_embed=6, context_length=T, cell="mlstm", tied_head=False)
BOTH = pytest.mark.parametrize("c", [LSTM, MLSTM], ids=["lstm", "mlstm"])
TERMS = T * (8 + 8 + 8 + 8 + 20)  # of a step: the sums over inputs, m and state, the columns' norms, the gates


def params(c, seed=0):
    """Not as they are initialized: gains other than the columns' norms, biases other than 0."""
    made = architecture.init(c, jax.random.key(seed))
    noisy = lambda a, i: a + 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(seed + 1), i), a.shape)
    leaves, structure = jax.tree.flatten(made)
    return structure.unflatten(noisy(a, i) for i, a in enumerate(leaves))


def tokens(seed=0, rows=B, time=T):
    return np.random.default_rng(seed).integers(0, V, (rows, time)).astype(np.int32)


states = jax.jit(lstm.states, static_argnames=("config", "dtype"))


# --- the definition -----------------------------------------------------------------------------------------


def by_numpy(p, c, row):
    """(h, c) after each token of one row, in float64, written from the papers' equations."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    sigmoid, U = lambda x: 1 / (1 + np.exp(-x)), c.units

    def matrix(part):
        w = part["kernel"].reshape(len(part["kernel"]), -1)
        return w / np.linalg.norm(w, axis=0) * part["gain"].reshape(-1) if c.cell == "mlstm" else w

    wx, wh, b = matrix(p["cell"]["x"]), matrix(p["cell"]["h"]), p["cell"]["x"]["bias"].reshape(-1)
    h, cell, out = np.zeros(U), np.zeros(U), []
    for token in row:
        x = p["wte"][token]
        m = (x @ matrix(p["cell"]["mx"])) * (h @ matrix(p["cell"]["mh"])) if c.cell == "mlstm" else h
        i, f, o, u = np.split(x @ wx + m @ wh + b, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(u)
        h = sigmoid(o) * np.tanh(cell)
        out.append((h, cell))
    return tuple(np.array(a) for a in zip(*out, strict=True))


@BOTH
def test_the_states_are_numpys(c):
    p, x = params(c), tokens()
    h_BTU, c_BTU = states(p, c, x)
    for row, h_TU, c_TU in zip(x, h_BTU, c_BTU, strict=True):
        assert_close((h_TU, c_TU), by_numpy(p, c, row), terms=TERMS)
    head, bias = (p["wte"], 0) if c.tied_head else (p["lm_head"], p["lm_bias"])
    assert_close(architecture.logits(p, c, h_BTU), np.asarray(h_BTU) @ np.asarray(head).T + np.asarray(bias), terms=16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_16_bits_it_is_the_same_function(dtype):
    p, x = params(MLSTM), tokens()
    (h, _), (h32, _) = states(p, MLSTM, x, dtype=dtype), states(p, MLSTM, x)
    assert h.dtype == dtype and np.abs(np.asarray(h, np.float32) - h32).max() < tolerance(T, dtype)


def test_parameter_counts():
    """Radford et al. 2017's, with its gains; GPT-1's baseline; and the closed form is what there is."""
    assert lstm.parameter_count(LSTMConfig(256, 4096, 64, 256, cell="mlstm", tied_head=False)) == 86_319_360
    assert 86_319_360 == 86_278_400 + 40_960
    baseline = LSTMConfig(GPT1.vocab_size, 2048, 2048, 512)
    assert lstm.parameter_count(baseline) == 116_461_568
    assert abs(lstm.parameter_count(baseline) / architecture.parameter_count(GPT1) - 1) < 1e-3
    for c in (LSTM, MLSTM, dataclasses.replace(LSTM, tied_head=False, d_embed=3)):
        shapes = jax.tree.map(jnp.shape, architecture.init(c, jax.random.key(0)))
        of = lambda tree: sum(int(np.prod(s)) for s in jax.tree.leaves(tree, is_leaf=lambda s: isinstance(s, tuple)))
        assert of(shapes) == lstm.parameter_count(c)
        assert of(shapes["cell"]) == lstm.non_embedding_count(c)


def test_initialization():
    """Columns of 1/sqrt(inputs), gains that change nothing, and a forget gate that is open."""
    c = LSTMConfig(300, 200, 100, 8, cell="mlstm", tied_head=False)
    p = architecture.init(c, jax.random.key(0))
    for name, inputs in {"x": 100, "h": 200, "mx": 100, "mh": 200}.items():
        part = p["cell"][name]
        sd = float(part["kernel"].std() * np.sqrt(inputs))
        assert abs(sd - 1) < 4 / np.sqrt(2 * part["kernel"].size), name
        np.testing.assert_allclose(lstm._kernel(part), part["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(p["cell"]["x"]["bias"], np.eye(4)[1][:, None] * np.ones(200))
    assert abs(float(p["wte"].std()) / 0.02 - 1) < 4 / np.sqrt(2 * p["wte"].size)


# --- what it must not see -----------------------------------------------------------------------------------


@BOTH
def test_no_state_depends_on_what_comes_after(c):
    p, x = params(c), tokens()
    other = x.copy()
    other[:, 6:] = (other[:, 6:] + 1) % V
    one, two = states(p, c, x)[0], states(p, c, other)[0]
    np.testing.assert_array_equal(one[:, :6], two[:, :6])
    assert (np.abs(one[:, 6:] - two[:, 6:]).max(-1) > 0).all()


@BOTH
def test_a_segment_begins_with_a_state_of_0(c):
    p, x = params(c), tokens()
    whole = states(p, c, x, segment_ids=np.array([[1] * 4 + [2] * 6] * B))
    assert_close([a[:, :4] for a in whole], [*states(p, c, x[:, :4])], terms=TERMS)
    assert_close([a[:, 4:] for a in whole], [*states(p, c, x[:, 4:])], terms=TERMS)


def test_a_state_goes_on():
    p, x = params(MLSTM), tokens()
    h, c = states(p, MLSTM, x[:, :4])
    rest = states(p, MLSTM, x[:, 4:], state=lstm.State(h[:, -1], c[:, -1]))
    assert_close(list(rest), [a[:, 4:] for a in states(p, MLSTM, x)], terms=TERMS)


# --- gradients ----------------------------------------------------------------------------------------------


def plainly(p, c, tokens_BT, segments_BT):
    """The sum of squares of h and of tanh(c), differentiated through a loop that has no derivative of its own."""
    kernels = {name: lstm._kernel(part) for name, part in p["cell"].items()}
    h_BU = c_BU = jnp.zeros((len(tokens_BT), c.units))
    total = 0.0
    for t in range(tokens_BT.shape[1]):
        keep = segments_BT[:, t] == segments_BT[:, t - 1] if t else jnp.ones(len(tokens_BT), bool)
        h_BU, c_BU = jnp.where(keep[:, None], h_BU, 0), jnp.where(keep[:, None], c_BU, 0)
        x = p["wte"][tokens_BT[:, t]]
        m = (x @ kernels["mx"]) * (h_BU @ kernels["mh"]) if "mx" in kernels else h_BU
        z = jnp.einsum("be,egu->bgu", x, kernels["x"]) + jnp.einsum("bu,ugv->bgv", m, kernels["h"])
        h_BU, c_BU = lstm._gates(z + p["cell"]["x"]["bias"], c_BU)
        total += (h_BU**2).sum() + (jnp.tanh(c_BU) ** 2).sum()
    return total


@BOTH
def test_gradients_are_those_of_the_plain_loop(c):
    p, x = params(c), tokens()
    segments = np.array([[1] * 4 + [2] * 6, [1] * T, [1] * T, [1] + [2] * 9])

    def scanned(p):
        h, cell = lstm.states(p, c, x, segment_ids=segments)
        return (h**2).sum() + (jnp.tanh(cell) ** 2).sum()

    value, grads = jax.jit(jax.value_and_grad(scanned))(p)
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda p: plainly(p, c, x, segments)))(p)
    assert_close(value, expected, terms=TERMS + B * T * 8)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_grads))
    assert_close(grads, expected_grads, terms=2 * TERMS + B * T, scale=largest)


@BOTH
def test_gradients_by_finite_differences(c):
    """Central differences of the loss along random directions, in float64."""
    batch = {"tokens": tokens(time=T + 1), "weights": np.ones((B, T), np.float32)}
    p = params(c)
    loss = lambda p: causal_lm_loss(c, jnp.float32, 4)(p, batch, None)[0]
    grads = jax.jit(jax.grad(loss))(p)
    direction = jax.tree.map(lambda a: jnp.sign(a), grads)
    along = jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)
    move = lambda eps: jax.tree.map(lambda a, d: np.float64(a) + eps * np.float64(d), p, direction)

    def by_hand(p):
        total = 0.0
        for row in batch["tokens"]:
            h, _ = by_numpy(p, c, row[:-1])
            z = h @ (p["wte"] if c.tied_head else p["lm_head"]).T + (0 if c.tied_head else p["lm_bias"])
            z = z - z.max(-1, keepdims=True)
            total -= (z - np.log(np.exp(z).sum(-1, keepdims=True)))[np.arange(T), row[1:]].sum()
        return total

    eps = 1e-5
    slope = (by_hand(move(eps)) - by_hand(move(-eps))) / (2 * eps)
    np.testing.assert_allclose(sum(map(float, jax.tree.leaves(along))), slope, rtol=1e-4)


@BOTH
def test_the_loss_that_is_trained_is_the_plain_one(c):
    """With the head's bias as a column of the matrix."""
    p = params(c)
    batch = {"tokens": tokens(time=T + 1), "weights": np.ones((B, T), np.float32)}
    batch["segment_ids"] = np.array([[1] * 4 + [2] * 6] * B)
    one = jax.jit(jax.value_and_grad(lambda p: causal_lm_loss(c, jnp.float32, 4)(p, batch, None)[0]))(p)
    two = jax.jit(jax.value_and_grad(lambda p: lm_loss(p, c, batch)[0]))(p)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(two[1]))
    assert_close(one, two, terms=2 * TERMS + B * T, scale=largest)


def test_dropout_depends_on_the_row_alone_and_leaves_the_recurrence():
    """The state is what a step gets, undropped: with embeddings undropped h is h without dropout, scaled or 0."""
    c = dataclasses.replace(LSTM, dropout=0.25)
    p, x, keys = params(LSTM), tokens(), jax.random.split(jax.random.key(3), B)
    run = jax.jit(lambda keys, x: architecture.hidden(p, c, x, dropout_keys=keys))
    out, other = run(keys, x), run(keys[::-1], x[::-1])[::-1]
    np.testing.assert_array_equal(out, other)
    h, _ = lstm.states(p, c, x, dropout_keys=keys)
    kept = np.asarray(out) != 0
    np.testing.assert_allclose(out, np.where(kept, h / 0.75, 0), rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / kept.size)
    assert np.abs(h - states(p, LSTM, x)[0]).max() > 0.01  # the embeddings' dropout
    np.testing.assert_array_equal(architecture.hidden(p, c, x), states(p, c, x)[0])


# --- on a mesh ----------------------------------------------------------------------------------------------


@BOTH
def test_data_2_fsdp_2_is_one_device(c):
    """Loss and gradients, documents and dropout included; and the parameters are where fsdp wants them."""
    c = dataclasses.replace(c, dropout=0.2)
    p, keys = params(c), jax.random.split(jax.random.key(5), B)
    batch = {"tokens": tokens(time=T + 1), "weights": np.ones((B, T), np.float32)}
    batch["segment_ids"] = np.array([[1] * 4 + [2] * 6] * B)
    found = []
    for devices, axes in ((1, {}), (4, {"data": 2, "fsdp": 2})):
        mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
        shardings = parameter_shardings(architecture.abstract_params(c), mesh)
        loss = causal_lm_loss(c, jnp.float32, 4, mesh)
        gradient = jax.jit(jax.value_and_grad(lambda p, k, loss=loss: loss(p, batch, k)[0]))
        with jax.set_mesh(mesh):
            found.append(jax.device_get(gradient(jax.device_put(p, shardings), keys)))
    assert shardings["cell"]["h"]["kernel"].shard_shape((8, 4, 8)) == (4, 4, 8)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(found[0][1]))
    assert_close(found[1], found[0], terms=2 * TERMS + B * T, scale=largest)


# --- the stages ---------------------------------------------------------------------------------------------

SMALL = dict(cell="mlstm", units=32, d_embed=16, context_length=48, tied_head=False, dropout=0.1)


def pretrain_config(source, **overrides):
    c = config_dict(PretrainConfig)
    c.model = config_dict(LSTMConfig, **SMALL)
    c.data.update(source=str(source), tokenizer="bpe:300")
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
    assert first["loss"] > 5.5 and last["loss"] < 3.2
    run = json.loads((learned / "config.json").read_text())
    assert run["model"] == {**SMALL, "vocab_size": 300} and run["kind"] == "lm"
    with on_one_device():
        model = load_model(learned)
        assert model.config == LSTMConfig(vocab_size=300, **SMALL)
        assert score(model, pretraining_text(learned), 8)["loss"] == pytest.approx(last["loss"], rel=0.1)  # 2 batches
        prompts = [model.tokenizer.encode(text) for text in ("ba ko mi", "zu")]
        sampling = Sampling(0.8)
        drawn = generate(model.params, model.config, prompts, max_new_tokens=6, sampling=sampling, seed=1)
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
    """Texts labeled by whether they have a 'zu'."""
    rng, words = np.random.default_rng(0), ("ba", "ko", "mi", "ru", "te")
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = []
    for i in range(160):
        text = [words[k] for k in rng.integers(0, 5, 5)]
        text[rng.integers(2, 5)] = "zu" if i % 2 else "ba"
        made.append({"text": " ".join(text), "label": ("no", "yes")[i % 2]})
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def finetune_config(init_from, rows, **overrides):
    c = config_dict(FinetuneConfig)
    c.init_from, c.data.train, c.data.valid = str(init_from), str(rows), "0.2"
    c.steps, c.batch_size, c.optimizer.learning_rate, c.eval.every = 40, 16, 1e-2, 40
    return overridden(c, overrides)


def test_it_is_fine_tuned_like_gpt_1(learned, rows, tmp_path):
    with on_one_device():
        assert finetune(finetune_config(learned, rows), tmp_path / "run").finished
    first, *_, last = lines(tmp_path / "run", "evaluations")
    assert first["accuracy"] < 0.8 and last["accuracy"] > 0.9
    assert lines(tmp_path / "run")[-1]["lm_loss"] > 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["units"] == 32 and saved["model"]["vocab_size"] == 303


def test_what_is_transferred_and_new():
    old, fresh = (architecture.init(MLSTM, jax.random.key(i)) for i in range(2))
    for layers, parts in {None: (old, old), 1: (old, old), 0: (old, fresh), -1: (fresh, fresh)}.items():
        found = heads.transferred(old, fresh, MLSTM, layers)
        assert found["wte"] is parts[0]["wte"] and found["cell"] is parts[1]["cell"]
    made = heads.classifier(old, dataclasses.replace(MLSTM, vocab_size=V + 3), 2, jax.random.key(0))["trunk"]
    grown = dataclasses.replace(MLSTM, vocab_size=V + 3)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(made) == shapes(architecture.init(grown, jax.random.key(0)))
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
        with pytest.raises(InputError, match="model.vocab_size=300, this run 310|has model.n_layer=None, this run 1"):
            pretrain(other_model(alignment["text"], learned), str(tmp_path / "gpt"))
    with pytest.raises(InputError, match="aot needs a GPT"):
        build_program(preset("mlstm").to_dict(), parse("v5e-1"), Request())


def other_model(source, init_from):
    c = config_dict(PretrainConfig)
    c.model.update(n_layer=1, n_head=1, d_model=8, context_length=48)
    c.data.update(source=str(source), tokenizer="bpe:300")
    c.steps, c.batch_size, c.init_from = 2, 8, str(init_from)
    return c
