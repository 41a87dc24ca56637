"""Figures with 95 % intervals: what a task's [figures] are made of.

Shares have Wilson's score interval (1927), differences of two shares of the same items Newcombe's (1998, method 10),
correlations Fisher's (1921); other means and statistics are ± 1.96 standard errors. Where items come in clusters, as
sentences made of one template, the interval of a share is that of fewer items: their number divided by the design
effect, the variance over clusters by that over items (Kish 1965), where it is above 1.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data.rows import reach
from gptjax.errors import InputError
from gptjax.evals import standard_errors
from gptjax.evals.calibration import wilson
from gptjax.tasks.task import Item, Task, fields_of, fill, function

_Z95 = 1.959963984540054  # the normal distribution's .975 quantile


class Figure(NamedTuple):
    """value: with its standard error and 95 % interval, NaN where there is none; n: the items that it is of; notes:
    what a reader should see below the table."""

    value: float
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    notes: Mapping[str, str] = {}

    def scaled(self, factor: float, shift: float = 0.0) -> "Figure":
        """factor * value + shift, of a factor above 0."""
        value, low, high = (factor * x + shift for x in (self.value, self.low, self.high))
        return self._replace(value=value, stderr=factor * self.stderr, low=low, high=high)


def share(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Figure:
    """The mean of numbers in [0, 1], 1/2 of a tie; there is at least one."""
    n = len(values)
    mean, error = standard_errors.clustered_mean(values, range(n) if clusters is None else clusters)
    apart = standard_errors.mean(values)[1]
    if clusters is None or not apart > 0 or math.isnan(error):
        effective = len(set(clusters)) if clusters is not None else n
    else:
        effective = n / max(1.0, (error / apart) ** 2)
    return Figure(mean, error, *wilson(mean * effective, effective), n)


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Figure:
    """The mean of any numbers; there is at least one."""
    found = standard_errors.clustered_mean(values, range(len(values)) if clusters is None else clusters)
    return normal(*found, len(values))


def normal(value: float, error: float, n: int) -> Figure:
    """A statistic whose estimate is about normal."""
    return Figure(value, error, value - _Z95 * error, value + _Z95 * error, n)


def bootstrapped(statistic: Callable[[np.ndarray], float], clusters: Sequence[int]) -> Figure:
    """A statistic of the indices of items, of which whole clusters are drawn again; there is at least one item.
    clusters: int [items], their numbers, from 0."""
    error = standard_errors.clustered_bootstrap(statistic, np.asarray(clusters), resamples=200)
    return normal(float(statistic(np.arange(len(clusters)))), error, len(clusters))


def paired_difference(first: Sequence[int], second: Sequence[int]) -> Figure:
    """The share of ones in `first` minus that in `second`, 0 or 1 of the same items in the same order, at least one:
    Newcombe 1998, Statistics in Medicine 17, 2635, method 10 (Wilson's limits, with the phi coefficient of the pairs,
    corrected for continuity)."""
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    n = len(a)
    both, one, other, neither = (int(np.sum(x & y)) for x, y in ((a, b), (a, ~b), (~a, b), (~a, ~b)))
    p, q = a.mean(), b.mean()
    (p_low, p_high), (q_low, q_high) = wilson(a.sum(), n), wilson(b.sum(), n)
    cross = both * neither - one * other
    cross = max(cross - n / 2, 0) if cross > 0 else cross
    margins = math.prod((both + one, other + neither, both + other, one + neither))
    phi = cross / math.sqrt(margins) if margins else 0.0
    width = lambda u, v: math.sqrt(max(u * u - 2 * phi * u * v + v * v, 0.0))
    error = standard_errors.mean(a.astype(float) - b.astype(float))[1]
    low, high = p - q - width(p - p_low, q_high - q), p - q + width(p_high - p, q - q_low)
    return Figure(float(p - q), error, float(low), float(high), n)


def correlation(x: Sequence[float], y: Sequence[float]) -> Figure | None:
    """Pearson's r of pairs, with Fisher's interval tanh(atanh r ± 1.96 / sqrt(n - 3)); None of fewer than four pairs,
    or where one of the two is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1.0, 1.0))
    if abs(r) == 1.0:
        return Figure(r, 0.0, r, r, len(x))
    half = _Z95 / math.sqrt(len(x) - 3)
    low, high = (math.tanh(math.atanh(r) + side * half) for side in (-1, 1))
    return Figure(r, (1 - r * r) / math.sqrt(len(x) - 3), low, high, len(x))


def task_figures(task: Task, items: Sequence[Item], samples: Sequence[dict]) -> dict[str, Figure]:
    """Every figure of task.figures, of all items as NAME and of each of task.subsets as NAME/SUBSET, where it exists.
    Rows without a template's fields are in none of its subsets. InputError: the task's metric does not exist of these
    items."""
    parts: dict[str, list[int]] = {"": list(range(len(items)))}
    for i, item in enumerate(items):
        for template in task.subsets:
            if all(reach(item.row, field) is not None for field in fields_of({"subset": template})):
                parts.setdefault(fill(template, item.row), []).append(i)
    found = {}
    for name, of in task.figures.items():
        for part, chosen in parts.items():
            if part and len(chosen) == len(items):
                continue  # the only one of its kind
            figure = function(of)([items[i] for i in chosen], [samples[i] for i in chosen], task.decision)
            if figure is not None:
                found[f"{name}/{part}" if part else name] = figure
    if task.metric not in found:
        raise InputError(
            f"The metric {task.metric!r} of task {task.name} cannot be computed of these {len(items)} items: give the "
            "whole file, or a larger --limit."
        )
    return found
