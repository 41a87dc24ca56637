"""The linear probe of the sentiment unit: the minimum by its own conditions, and a planted unit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_runs import on_one_device
from numerics import assert_close
from runs import main_of

from experiments.sentiment_unit import probe
from experiments.sentiment_unit.__main__ import features, prepared, read, study
from gptjax.errors import InputError
from gptjax.model import lstm
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
    tolerance = 2e-3  # the solver's 1e-3, and its sums in float32
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
    words = ("ba", "ko", "mi", "ru", "te")
    made = [(" ".join([words[k] for k in rng.integers(0, 5, i % 7 + 1)] + ["zu"] * (i % 2)), i % 2) for i in range(400)]
    path.write_text("label,sentence\n" + "".join(f"{label},{text}\n" for text, label in made))
    return path


def test_the_command_probes_a_gpt(pretrained, rows, tmp_path):
    """From a workdir and tables to results and a picture: whether the last word is 'zu' is in its hidden state."""
    with on_one_device():
        code, out, err = main_of(
            "experiments.sentiment_unit", f"--workdir={pretrained}", f"--train={rows}", f"--test={rows}",
            "--text_field=sentence", f"--output={tmp_path}",
        )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["accuracy"] > 0.9 and found["features"] == 32 and found["examples"] == [360, 40, 400]
    assert "test accuracy" in out and (tmp_path / "unit.png").stat().st_size > 1000
    texts, labels = read(str(rows), "sentence", "label")
    with on_one_device():
        model = load_model(pretrained)
        x = features(model, texts, 16)
        np.testing.assert_array_equal(features(model, texts[::-1], 16)[::-1], x)
    assert x.shape == (400, 32) and labels.tolist() == [0, 1] * 200
    (tmp_path / "bad.csv").write_text("label,text\n3,ba\n")
    with pytest.raises(InputError, match="the label '3' is neither 0 nor 1"):
        read(str(tmp_path / "bad.csv"), "text", "label")


def test_the_features_of_an_lstm_are_its_last_cell(pretrained):
    """Padding and the other rows of a batch change nothing."""
    import dataclasses

    with on_one_device():
        of_gpt = load_model(pretrained)
    config = lstm.LSTMConfig(of_gpt.config.vocab_size, 8, 8, 4)
    params = lstm.init(config, jax.random.key(0))
    model = dataclasses.replace(of_gpt, config=config, params=params, dtype=jnp.float32)
    texts = ["ba ko", "mi", "ru te ba ba ko " * 12]  # longer than the context
    x = features(model, texts, 2)
    for text, found in zip(texts, x, strict=True):
        ids = np.array([model.tokenizer.encode(f"\n {text.strip()} ")])
        assert_close(found, np.tanh(lstm.states(params, config, ids)[1][0, -1]), terms=200)
