"""Fairness of binary predictions about groups of people: three definitions that in general exclude each other.

Definitions as in Hardt et al. 2016 (equalized odds) and Kleinberg et al. 2016 (calibration within groups; a predictor
that is not perfect has all of them only where the groups have the same base rates). Arrays are of N items: predicted
and gold 0 or 1, groups any hashable labels.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from gptjax.errors import InputError
from gptjax.evals.calibration import expected_calibration_error


def demographic_parity_gap(predicted: Sequence[int], groups: Sequence[Hashable]) -> float:
    """max_g P(predicted 1 | g) - min_g: 0 where every group is predicted 1 equally often. InputError: one group."""
    return _gap(np.asarray(predicted, np.float64), groups)


def equalized_odds_gap(predicted: Sequence[int], gold: Sequence[int], groups: Sequence[Hashable]) -> float:
    """The larger of the gaps between groups of P(predicted 1 | gold 1) and P(predicted 1 | gold 0). Groups without
    items of a class are left out of its gap. InputError: neither class has items of two groups."""
    predicted, gold = np.asarray(predicted, np.float64), np.asarray(gold)
    gaps = []
    for of_class in (gold == 1, gold == 0):
        members = [group for group, chosen in zip(groups, of_class, strict=True) if chosen]
        gaps += [_gap(predicted[of_class], members)] if len(set(members)) > 1 else []
    if not gaps:
        raise InputError("Equalized odds compares groups, and no class has items of two: give items of several groups.")
    return max(gaps)


def calibration_within_groups(confidence: Sequence[float], correct: Sequence[int], groups: Sequence[Hashable],
                              bins: int = 10) -> dict[Hashable, float]:  # fmt: skip
    """The expected calibration error of each group (calibration.expected_calibration_error), by group."""
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    return {group: expected_calibration_error(confidence[chosen], correct[chosen], bins)
            for group, chosen in _members(groups).items()}  # fmt: skip


def _gap(values: np.ndarray, groups: Sequence[Hashable]) -> float:
    means = [float(values[chosen].mean()) for chosen in _members(groups).values()]
    if len(means) < 2:
        raise InputError(f"Fairness compares groups, and there are {len(means)}: give items of at least two.")
    return max(means) - min(means)


def _members(groups: Sequence[Hashable]) -> dict[Hashable, np.ndarray]:
    """The indices of each group's items."""
    found: dict = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return {group: np.array(chosen) for group, chosen in found.items()}
