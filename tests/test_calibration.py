"""Calibration of predicted probabilities against closed forms and planted truths; the SuperGLUE score."""

import math

import numpy as np
import pytest

from gptjax import report
from gptjax.errors import InputError
from gptjax.evals import calibration as cal
from gptjax.evals.classification import probabilities
from gptjax.evals.superglue import METRICS, superglue_score


def planted(items, temperature=1.0, seed=0):
    """(probabilities [N, 4], gold): answers drawn from softmax(scores), reported as softmax(scores / temperature)."""
    rng = np.random.default_rng(seed)
    scores = 1.5 * rng.standard_normal((items, 4))
    truth = probabilities(scores)
    gold = (truth.cumsum(1) < rng.random((items, 1))).sum(1)
    return probabilities(scores / temperature), gold, truth


def test_golden():
    """.5 |.5 - .9| + .5 |1 - .6| = .4"""
    confidence, correct = [0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1]
    assert cal.expected_calibration_error(confidence, correct) == pytest.approx(0.4, abs=1e-12)
    assert cal.expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0, abs=1e-12)
    assert math.isnan(cal.expected_calibration_error([], []))


@pytest.mark.parametrize("bins", [3, 10, 15])
def test_bins_contain_their_upper_edge(bins):
    edges = [k / bins for k in range(bins + 1)]
    rows = cal.reliability(edges, np.ones(bins + 1), bins)
    assert [row["items"] for row in rows] == [2] + [1] * (bins - 1)  # 0 and 1 / bins share the first
    assert [row["high"] for row in rows] == edges[1:] and [row["low"] for row in rows] == edges[:-1]
    assert cal.reliability([np.nextafter(0.1, 1)], [1], 10)[0]["low"] == 0.1


def test_empty_bins_are_left_out():
    rows = cal.reliability([0.25, 0.35, 0.38, 0.95], [0, 1, 0, 1])
    assert [(row["low"], row["items"], row["observed"]) for row in rows] == [(0.2, 1, 0), (0.3, 2, 0.5), (0.9, 1, 1)]
    assert rows[1]["predicted"] == pytest.approx(0.365)


def test_wilson_against_its_equation():
    """Its ends are the p with (share - p)^2 = z^2 p (1 - p) / n."""
    for successes, n in [(0, 10), (3, 10), (10, 10), (77, 100), (0.5, 3)]:
        for p in cal.wilson(successes, n):
            assert (successes / n - p) ** 2 == pytest.approx(1.959963985**2 * p * (1 - p) / n, abs=1e-9)
    low, high = cal.wilson(0, 10)
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)  # z^2 / (n + z^2)
    assert cal.wilson(0, 0) == (0, 1)


def test_a_calibrated_model_has_no_more_error_than_sampling_gives():
    for items in (500, 50_000):
        p, gold, _ = planted(items)
        found = cal.calibration(list(p), gold, resamples=300)
        assert found["ece"] <= found["ece_if_calibrated"]
        assert found["ece_low"] < 0.01 and found["items"] == items
    assert found["ece"] < 0.005
    inside = [row["observed_low"] <= row["predicted"] <= row["observed_high"] for row in found["reliability"]]
    assert sum(inside) >= len(inside) - 1


def test_planted_overconfidence_is_measured():
    """Confidence .9 in answers that are right with probability .7: an error of .2."""
    rng = np.random.default_rng(1)
    p = np.tile([0.9, 0.1], (4000, 1))
    found = cal.calibration(list(p), (rng.random(4000) > 0.7).astype(int))
    se = math.sqrt(0.7 * 0.3 / 4000)
    assert found["ece"] == pytest.approx(0.2, abs=4 * se)
    assert found["ece_low"] < 0.2 < found["ece_high"]
    assert found["ece_high"] - found["ece_low"] == pytest.approx(2 * 1.96 * se, rel=0.15)
    assert found["ece"] > 5 * found["ece_if_calibrated"]
    sharp, gold, _ = planted(4000, temperature=0.5)
    found = cal.calibration(list(sharp), gold)
    assert found["ece_low"] > found["ece_if_calibrated"] and found["confidence"] > found["accuracy"] + 0.05


def test_brier_and_nll_have_their_expected_values():
    """Of a calibrated model: E[1 - sum p^2] and the entropy."""
    p, gold, truth = planted(20_000, seed=2)
    found = cal.calibration(list(p), gold, resamples=10)
    for name, value in (("brier", 1 - (truth**2).sum(1).mean()), ("nll", -(truth * np.log(truth)).sum(1).mean())):
        assert abs(found[name] - value) < 4 * found[f"{name}_se"]
        spread = found[f"{name}_se"] * math.sqrt(20_000)
        assert 0.1 < spread < 1.5
    two = cal.calibration([np.array([0.7, 0.3]), np.array([0.2, 0.5, 0.3])], [0, 2])
    assert two["brier"] == pytest.approx((0.18 + 0.78) / 2) and two["accuracy"] == 0.5
    assert two["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    assert two["brier_se"] == pytest.approx(0.3)  # half the difference of two
    assert cal.calibration([np.array([0.7, 0.3])], [0])["nll_se"] is None
    assert cal.calibration([np.array([1.0, 0.0])], [1])["nll"] < 700


@pytest.mark.parametrize("truth", [0.9, 0.75])
def test_the_interval_covers_the_true_error(truth):
    """Confidences of .9 and .6, right with `truth` and .6: an error of half the difference. In 200 sets of 300 items
    the basic interval holds it in about 95 %; for a calibrated model too, thanks to the bias taken off."""
    rng, covered = np.random.default_rng(3), 0
    confidence = np.repeat([0.9, 0.6], 150)
    for seed in range(200):
        correct = (rng.random(300) < np.repeat([truth, 0.6], 150)).astype(float)
        _, low, high = cal._bootstrap(confidence, correct, 10, np.arange(300), seed, 200)
        covered += low <= (0.9 - truth) / 2 <= high
    assert covered >= 176  # below it with probability < 1e-3 at 94 %


def test_the_standard_error_of_the_calibration_error():
    """In a single bin the error is |mean gap|, whose standard error is known. Items of a cluster count as one: every
    item four times over is no more evidence."""
    rng = np.random.default_rng(4)
    p, gold = np.tile([0.9, 0.1], (400, 1)), (rng.random(400) > 0.6).astype(int)
    found = cal.calibration(list(p), gold, resamples=4000)
    assert found["ece_se"] == pytest.approx(np.std(gold, ddof=1) / 20, rel=0.05)
    p, gold, _ = planted(100)
    once = cal.calibration(list(p), gold)
    again = cal.calibration(list(np.repeat(p, 4, 0)), np.repeat(gold, 4), clusters=np.repeat(np.arange(100), 4))
    for name in ("ece_se", "ece_low", "ece_high", "nll_se", "brier_se", "accuracy_se"):
        assert again[name] == pytest.approx(once[name], rel=1e-9)
    assert cal.calibration([p[0]], gold[:1])["ece_se"] is None


def test_resampling_in_chunks_is_the_same_statistics(monkeypatch):
    p, gold, _ = planted(400, temperature=0.7)
    whole = cal.calibration(list(p), gold)
    monkeypatch.setattr(cal, "_CHUNK", 1000)
    parts = cal.calibration(list(p), gold)
    for name in ("ece_low", "ece_high", "ece_if_calibrated"):
        assert parts[name] == pytest.approx(whole[name], abs=0.01)


def test_a_picture_of_two_models(tmp_path):
    figures = {}
    for name, temperature in (("before RLHF", 1.0), ("after RLHF", 0.5)):
        p, gold, _ = planted(1000, temperature)
        figures[name] = cal.calibration(list(p), gold, resamples=20)
    cal.reliability_plot(tmp_path / "calibration.png", figures)
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    diagram = report.reliability_diagram({name: f["reliability"] for name, f in figures.items()})
    upper, lower = diagram.axes
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["calibrated", *figures]
    for container, found in zip(upper.containers, figures.values(), strict=True):
        x, y = (np.asarray(values, float) for values in container.lines[0].get_data())
        np.testing.assert_allclose(x, [row["predicted"] for row in found["reliability"]])
        np.testing.assert_allclose(y, [row["observed"] for row in found["reliability"]])
        bars = [segment[:, 1] for segment in container.lines[2][0].get_segments()]
        expected = [[row["observed_low"], row["observed_high"]] for row in found["reliability"]]
        np.testing.assert_allclose(bars, expected)
    for bars in lower.containers:
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)


GPT3 = (  # Brown et al. 2020, Table H.1, few-shot: BoolQ, CB acc and F1, COPA, RTE, WiC, WSC, MultiRC, ReCoRD
    (73.19, (77.5, 82.1, 57.2, 92.0, 72.9, 55.3, 75.0, 32.5, 74.8, 89.0, 90.1)),
    (50.15, (43.1, 42.9, 26.1, 67.0, 52.3, 49.8, 58.7, 6.09, 45.0, 69.8, 70.7)),
)


@pytest.mark.parametrize("score, row", GPT3, ids=["175B", "Small"])
def test_superglue_of_gpt3s_table(score, row):
    names = [(task, name) for task in METRICS for name in METRICS[task]]
    metrics = {task: {} for task in METRICS}
    for (task, name), value in zip(names, row, strict=True):
        metrics[task][name] = value
    assert superglue_score(metrics) == pytest.approx(score, abs=0.006)
    assert superglue_score(metrics | {"axb": {"matthews": 0.0}}) == superglue_score(metrics)
    del metrics["wsc"], metrics["cb"]["f1"]
    with pytest.raises(InputError, match="needs all eight tasks: cb f1, wsc accuracy missing"):
        superglue_score(metrics)
