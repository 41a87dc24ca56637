"""Calibration of predicted probabilities: is a model that says 70 % right in 70 % of such cases?

    figures = calibration(probabilities, gold)            of multiple-choice items
    reliability_plot(path, {"before RLHF": before, "after RLHF": after})

Figure 8 of the GPT-4 technical report is such a plot, before and after RLHF. Statistics are numpy over a whole set of
N items. Sources: expected calibration error and reliability diagrams as in Guo et al. 2017 §2 (equal-width bins,
(low, high]); score intervals of Wilson 1927; errors of a calibrated model by consistency resampling, Bröcker and Smith
2007.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gptjax import report
from gptjax.evals import standard_errors

_Z95 = 1.959963984540054  # the normal distribution's .975 quantile
_CHUNK = 1 << 22  # random numbers drawn at a time


def wilson(successes: float, count: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, by default at 95 %; (0, 1) without observations."""
    if not count:
        return 0.0, 1.0
    share, scale = successes / count, 1 + z * z / count
    center = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(center - half, 0.0), min(center + half, 1.0)


def expected_calibration_error(confidence, correct, bins: int = 10) -> float:
    """The mean of |accuracy - confidence| over equal-width bins, weighted by their items.

    confidence: probability of the predicted answer, in [0, 1], [N]. correct: 1 or 0, [N]. NaN without items.
    The estimate is biased upwards: it is above 0 for a calibrated model too (see `calibration`).
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if not confidence.size:
        return math.nan
    return float(_error(correct - confidence, _bin_of(confidence, bins), bins))


def _bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin (low, high] of each confidence; 0 is in the first."""
    return np.maximum(np.searchsorted(np.arange(bins + 1) / bins, confidence, side="left") - 1, 0)


def _error(gap: np.ndarray, bin_of: np.ndarray, bins: int) -> float:
    return np.abs(np.bincount(bin_of, gap, bins)).sum() / gap.size


def reliability(confidence, correct, bins: int = 10) -> list[dict]:
    """The bins that have items: `low`, `high`, `items`, `predicted` (mean confidence), `observed` (accuracy) and its
    95 % Wilson interval `observed_low`, `observed_high`."""
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    bin_of = _bin_of(confidence, bins)
    return [
        {"low": b / bins, "high": (b + 1) / bins, **bin_figures(confidence[bin_of == b], correct[bin_of == b])}
        for b in np.unique(bin_of).tolist()
    ]


def bin_figures(confidence: np.ndarray, correct: np.ndarray) -> dict:
    """`predicted`, `observed`, its Wilson interval and `items` of the items of one bin, which has some."""
    low, high = wilson(correct.sum(), correct.size)
    return {"predicted": float(confidence.mean()), "observed": float(correct.mean()), "observed_low": low,
            "observed_high": high, "items": int(correct.size)}  # fmt: skip


def calibration(probabilities: Sequence[np.ndarray], gold: Sequence[int], bins: int = 10, seed: int = 0,
                resamples: int = 1000, clusters: np.ndarray | None = None) -> dict:  # fmt: skip
    """Figures of multiple-choice predictions, whose number of choices may differ.

    Args:
        probabilities: of each item's choices, summing to 1 (`classification.probabilities` of their scores).
        gold: the right choice of each item.
        seed, resamples: of the two resampling figures.
        clusters: int [items], from 0, the same for items that depend on each other; None = none do.
    Returns:
        items, bins, accuracy; `ece` with its standard error `ece_se` and a 95 % interval `ece_low`, `ece_high`
        (bootstrap over clusters of items; the interval in its basic form, which takes the estimate's upward bias off);
        `ece_if_calibrated`: the 95th percentile that the same confidences would give a calibrated model, so that a
        smaller `ece` is no evidence of miscalibration; `brier` (the sum over choices of squared errors, in [0, 2]) and
        `nll` (nats), each with its standard error `_se`; `confidence`; `reliability`, the bins. With fewer than two
        clusters standard errors are None.
    """
    clusters = np.arange(len(gold)) if clusters is None else np.asarray(clusters)
    predicted = np.array([int(np.argmax(p)) for p in probabilities])
    confidence = np.array([p[i] for p, i in zip(probabilities, predicted, strict=True)], np.float64)
    correct = (predicted == np.asarray(gold)).astype(np.float64)
    brier = [float(np.square(p).sum() - 2 * p[i] + 1) for p, i in zip(probabilities, gold, strict=True)]
    nll = [-math.log(max(float(p[i]), 1e-300)) for p, i in zip(probabilities, gold, strict=True)]
    error = expected_calibration_error(confidence, correct, bins)
    spread, low, high = _bootstrap(confidence, correct, bins, clusters, seed, resamples)
    return {
        "items": confidence.size,
        "bins": bins,
        **_mean("accuracy", correct, clusters),
        "confidence": float(confidence.mean()) if confidence.size else math.nan,
        "ece": error,
        "ece_se": spread,
        "ece_low": low,
        "ece_high": high,
        "ece_if_calibrated": _if_calibrated(confidence, bins, seed, resamples),
        **_mean("brier", brier, clusters),
        **_mean("nll", nll, clusters),
        "reliability": reliability(confidence, correct, bins),
    }


def _mean(name: str, values, clusters) -> dict:
    value, spread = standard_errors.clustered_mean(values, clusters) if len(values) else (math.nan, math.nan)
    return {name: value, f"{name}_se": None if math.isnan(spread) else spread}


def _bootstrap(confidence, correct, bins, clusters, seed, resamples) -> tuple[float | None, float, float]:
    """(standard error, low, high) of the calibration error, over clusters drawn with replacement: the standard
    deviation of its draws, and the basic bootstrap's 95 % interval, 2 e - their upper and lower quantile, in [0, 1].
    """
    if not confidence.size:
        return None, math.nan, math.nan
    gap, bin_of, groups = correct - confidence, _bin_of(confidence, bins), int(clusters.max()) + 1
    sums_GB = np.bincount(clusters * bins + bin_of, gap, groups * bins).reshape(groups, bins)
    sizes_G, rng, errors = np.bincount(clusters, minlength=groups), np.random.default_rng(seed), []
    rows = max(_CHUNK // groups, 1)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, groups, (min(rows, resamples - start), groups))
        own = drawn + groups * np.arange(len(drawn))[:, None]
        times_RG = np.bincount(own.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        errors.append(np.abs(times_RG @ sums_GB).sum(1) / (times_RG @ sizes_G))
    errors, error = np.concatenate(errors), _error(gap, bin_of, bins)
    upper, lower = np.quantile(errors, [0.975, 0.025])
    spread = float(errors.std(ddof=1)) if groups > 1 else None
    return spread, *(float(np.clip(2 * error - q, 0, 1)) for q in (upper, lower))


def _if_calibrated(confidence, bins, seed, resamples) -> float:
    """95th percentile of the calibration error if each answer were right with its own confidence."""
    if not (n := confidence.size):
        return math.nan
    bin_of, rng, errors = _bin_of(confidence, bins), np.random.default_rng(seed), []
    rows = max(_CHUNK // n, 1)
    for start in range(0, resamples, rows):
        gaps = (rng.random((min(rows, resamples - start), n)) < confidence) - confidence
        own = bin_of + bins * np.arange(len(gaps))[:, None]
        sums = np.bincount(own.ravel(), gaps.ravel(), bins * len(gaps)).reshape(-1, bins)
        errors.append(np.abs(sums).sum(1) / n)
    return float(np.quantile(np.concatenate(errors), 0.95))


def reliability_plot(path, figures: Mapping[str, dict]) -> None:
    """Writes a picture (.png, .svg, .pdf) of one or more models' reliability diagrams and histograms of confidence.

    figures: {name of the model: what `calibration` returns}, in the order of the legend.
    """
    import matplotlib.pyplot as plt

    curves = {f"{name} (ECE {f['ece']:.3f})": f["reliability"] for name, f in figures.items()}
    figure = report.reliability_diagram(curves)
    figure.savefig(path, dpi=110)
    plt.close(figure)
