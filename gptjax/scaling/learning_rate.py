"""The best learning rate by size, from a sweep that varied it: lr = a N^b.

At each size (and number of tokens) the optimum is that of the parabola in log lr through the best rate and its two
neighbors; a and b are the straight line in logs through the optima.
"""

from typing import NamedTuple

import numpy as np

from gptjax.errors import InputError
from gptjax.scaling.points import Points


class RateRule(NamedTuple):
    """lr = a N^b. sizes, rates: the optima that it goes through. left_out: a sentence for each size without one."""

    a: float
    b: float
    sizes: np.ndarray
    rates: np.ndarray
    left_out: tuple[str, ...]

    def __call__(self, N: float) -> float:
        return self.a * N**self.b


def fit_rate(points: Points) -> RateRule:
    """The rule of a sweep's points, with columns N, loss and lr. InputError: the rates were not varied, or fewer than
    two sizes have an optimum inside of their grid."""
    where = points.path or "the points"
    if "lr" not in points.columns:
        raise InputError(
            f"{where} has no column of learning rates ('learning_rate' or 'lr', all positive): give the results of a "
            "sweep over optimizer.learning_rate."
        )
    runs = np.stack([points["N"], points.columns.get("D", np.ones(len(points))), points["lr"], points["loss"]], 1)
    groups = [runs[(runs[:, :2] == cell).all(1)] for cell in np.unique(runs[:, :2], axis=0)]
    groups = [group for group in groups if len(np.unique(group[:, 2])) >= 3]
    if not groups:
        raise InputError(
            f"No size in {where} was trained with three learning rates: sweep over optimizer.learning_rate, as with "
            "product(rate=[1e-3, 2e-3, 4e-3, 8e-3], …)."
        )
    sizes, rates, left_out = [], [], []
    for group in groups:
        best = _optimum(group[:, 2], group[:, 3])
        if best is None:
            left_out.append(f"N {group[0, 0]:.3g}: the best rate is at the edge of its grid; it is left out.")
        else:
            sizes.append(group[0, 0])
            rates.append(best)
    if len(set(sizes)) < 2:
        raise InputError(
            f"A rule needs the best learning rate of two sizes, and {where} has {len(set(sizes))} with one inside of "
            f"the grid of rates: add sizes or rates. {' '.join(left_out)}".rstrip()
        )
    b, log_a = np.polyfit(np.log(sizes), np.log(rates), 1)
    return RateRule(float(np.exp(log_a)), float(b), np.array(sizes), np.array(rates), tuple(left_out))


def _optimum(rates, losses) -> float | None:
    """The rate of the lowest loss; None if that is at an end. Losses of one rate (several seeds) are averaged."""
    grid = np.unique(rates)
    means = np.array([losses[rates == rate].mean() for rate in grid])
    i = int(means.argmin())
    if i in (0, len(grid) - 1):
        return None
    x = np.log(grid[i - 1 : i + 2] / grid[i])
    curvature, slope, _ = np.polyfit(x, means[i - 1 : i + 2], 2)
    return float(grid[i] * np.exp(-slope / (2 * curvature)))
