"""The linear probe of the sentiment unit: the minimum by its own conditions, and a planted unit."""

import json

import jax
import numpy as np
import pytest
from alignment_runs import on_one_device
from numerics import assert_close, model_terms
from runs import main_of

from experiments.sentiment_unit import probe
from experiments.sentiment_unit.__main__ import features, prepared, read, study
from gptjax.config import config_dict
from gptjax.errors import InputError
from gptjax.model import gpt, lstm
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.trained import load_model

N, D, UNIT = 300, 40, 7


def planted(seed=0, n=N):
    """Labels that unit 7 has, turned over in a tenth, and 39 units of noise of the same spread."""
    rng = np.random.default_rng(seed)
    y_N = rng.integers(0, 2, n)
    x_ND = rng.normal(0, 0.5, (n, D)).astype(np.float32)
    told = np.where(rng.random(n) < 0.1, 1 - y_N, y_N)
    x_ND[:, UNIT] = 0.3 - (0.4 * (2 * told - 1) + 0.1 * rng.normal(size=n))
    return x_ND, y_N


def objective(x, y, w, b, C):
    z = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + float(b)
    return np.abs(np.asarray(w)).sum() + C * np.logaddexp(0, -(2 * y - 1) * z).sum()


@pytest.mark.parametrize("C", [2.0**-6, 0.25, 1.0])
def test_the_fit_meets_the_conditions_of_a_minimum(C):
    """0 in the subdifferential, computed here in float64; and no nearby point is better."""
    x, y = planted()
    found = probe.path(x, y, x, y, [C])[0][1]
    w, b = np.asarray(found.w_D, np.float64), float(found.b)
    error = C * (1 / (1 + np.exp(-(x.astype(np.float64) @ w + b))) - y)
    g = x.T.astype(np.float64) @ error
    tolerance = 6e-3  # the solver's 5e-3, and its sums in float32
    assert np.abs(g + np.sign(w))[w != 0].max(initial=0) < tolerance
    assert np.abs(g)[w == 0].max(initial=0) < 1 + tolerance and abs(error.sum()) < tolerance
    assert abs(float(probe.violation(x, y, found.w_D, found.b, C)) - float(found.violation)) < 1e-3
    best, rng = objective(x, y, w, b, C), np.random.default_rng(1)
    for _ in range(20):
        assert objective(x, y, w + 0.01 * rng.normal(size=D), b + 0.01 * rng.normal(), C) > best


def test_the_smaller_c_the_fewer_weights():
    x, y = planted()
    counts = [int((np.asarray(f.w_D) != 0).sum()) for _, f, _ in probe.path(x, y, x, y)]
    assert counts == sorted(counts) and counts[0] <= 1 < counts[-1]
    strong = 2 * np.abs(x.T @ (y - y.mean())).max()  # below its inverse all weights are 0
    none, some = (probe.path(x, y, x, y, [k / strong * 2])[0][1] for k in (0.98, 1.05))
    assert not np.asarray(none.w_D).any() and np.flatnonzero(some.w_D).tolist() == [UNIT]


def test_a_planted_unit_is_found():
    figures, unit = study(planted(), planted(1), planted(2, 2000))
    assert unit == figures["unit"] == UNIT and figures["unit_weight"] < 0
    assert figures["nonzero"] < D and 0.87 < figures["accuracy"] < 0.93
    assert 0.87 < figures["unit_accuracy"] < 0.93 and abs(figures["unit_threshold"] - 0.3) < 0.3
    assert figures["C"] == max(figures["path"], key=lambda row: row["valid_accuracy"])["C"]


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_the_best(seed):
    """Against every threshold and side, equal values among them."""
    rng = np.random.default_rng(seed)
    values, y = rng.integers(0, 6, 15) / 4, rng.integers(0, 2, 15)
    found = probe.best_threshold(values, y)
    every = [probe.Threshold(at, sign).accuracy(values, y) for at in np.arange(-1, 3, 0.125) for sign in (1, -1)]
    assert found.accuracy(values, y) == max(every)


def test_a_text_is_prepared_as_in_the_study():
    assert prepared(" It's &amp; that\nis \n") == "\n It's & that is "


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("rows") / "rows.csv", np.random.default_rng(0)
    words = (("ba", "ko", "mi"), ("zu", "ge", "ni"))  # of label 0 and 1
    made = [(" ".join(words[i % 2][k] for k in rng.integers(0, 3, i % 7 + 1)), i % 2) for i in range(400)]
    path.write_text("label,sentence\n" + "".join(f"{label},{text}\n" for text, label in made))
    return path


@pytest.fixture(scope="module")
def hardly_trained(alignment, tmp_path_factory):
    """Which words a text has had is in any LSTM's cell."""
    c, workdir = config_dict(PretrainConfig), tmp_path_factory.mktemp("lstm") / "run"
    c.model = config_dict(lstm.LSTMConfig, cell="mlstm", units=32, d_embed=16, context_length=16, tied_head=False)
    c.data.update(source=str(alignment["text"]), tokenizer="bpe:270")
    c.steps, c.batch_size, c.log.tensorboard = 1, 8, False
    with on_one_device():
        pretrain(c, str(workdir))
    return workdir


def test_the_command(hardly_trained, rows, tmp_path):
    """From a workdir and tables to results and a picture."""
    with on_one_device():
        code, out, err = main_of(
            "experiments.sentiment_unit", f"--workdir={hardly_trained}", f"--train={rows}", f"--test={rows}",
            "--text_field=sentence", f"--output={tmp_path}",
        )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["accuracy"] > 0.9 and found["features"] == 32 and found["examples"] == [360, 40, 400]
    assert "test accuracy" in out and (tmp_path / "unit.png").stat().st_size > 1000
    (tmp_path / "bad.csv").write_text("label,text\n3,ba\n")
    with pytest.raises(InputError, match="the label '3' is neither 0 nor 1"):
        read(str(tmp_path / "bad.csv"), "text", "label")


@pytest.mark.parametrize("which", ["pretrained", "hardly_trained"])
def test_features_are_those_after_the_last_token(which, request):
    """Of an LSTM the cell, of a GPT the hidden state. Padding and the other rows of a batch change nothing."""
    with on_one_device():
        model = load_model(request.getfixturevalue(which))
    texts = ["ba ko", "ru te ba ba ko " * 12]  # longer than the context
    hidden = jax.jit(gpt.hidden, static_argnums=1)
    states = jax.jit(lstm.states, static_argnums=1)
    for text, found in zip(texts, features(model, texts, 2), strict=True):
        ids = np.array([model.tokenizer.encode(f"\n {text.strip()} ")])
        if which == "pretrained":
            expected = hidden(model.params, model.config, ids[:, -48:])[0, -1]
            assert_close(found, expected, terms=model_terms(model.config))
        else:
            assert_close(found, np.tanh(states(model.params, model.config, ids)[1][0, -1]), terms=10 * 60)
