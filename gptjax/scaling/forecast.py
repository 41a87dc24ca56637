"""Forecasts: a loss with its prediction interval, baselines next to it, and how all of them would have done so far.

The interval is Student's, with n - p degrees of freedom, of log loss. Its variance is the sum of the runs' scatter
about the law, which holds both noise and lack of fit inside the fitted range, and of the law's own uncertainty at the
target by the bootstrap. Beyond the fitted range a law may be wrong in ways that its residuals do not show: the interval
is widened by how much larger the errors of the forecasts before were than they said (`widening`, at least 1).
"""

import dataclasses
import math

import numpy as np

from gptjax.errors import InputError
from gptjax.scaling.bootstrap import LEVEL, bootstrap, failed, interval
from gptjax.scaling.fitting import Fit, fit
from gptjax.scaling.laws import CHINCHILLA, GPT4, Law
from gptjax.scaling.points import Points, budgets, of_arrays

SAMPLES = 400  # of the bootstrap, for a standard error
_STARTS = 60  # of a law's, for each of the many fits of the table


@dataclasses.dataclass(frozen=True)
class Forecast:
    """loss, and where it will be with the given level; log_error: its standard error, of log loss, before widening."""

    loss: float
    low: float
    high: float
    level: float
    log_error: float
    widening: float


def predict(found: Fit, inputs: dict[str, float], theta=None, widening: float = 1.0, level: float = LEVEL) -> Forecast:
    """The loss of a run that is not among the points. theta: the bootstrap's samples. InputError: more than 5 % of them
    give no loss."""
    theta = bootstrap(found, SAMPLES) if theta is None else theta
    center = float(found.log_loss(inputs)[0])
    samples = found.log_loss(inputs, theta)[:, 0]
    low, high = interval(samples, 0.9)  # not the standard deviation: a few samples run off
    if math.isnan(low):
        raise InputError(
            f"{100 * failed(samples):.0f} % of the bootstrap's samples have no loss at the target, so that there is no "
            "interval: add runs, or choose a law with fewer parameters."
        )
    error = math.hypot(found.scatter, (high - low) / (2 * 1.6449))
    half = found.t(level) * widening * error
    return Forecast(math.exp(center), math.exp(center - half), math.exp(center + half), level, error, widening)


# --- baselines --------------------------------------------------------------------------------------------


def frontier(points: Points) -> Points:
    """The best run of each compute budget."""
    best = [which[points["loss"][which].argmin()] for which in compute_groups(points)]
    return points.take(best)


def compute_groups(points: Points) -> list[np.ndarray]:
    """Indices of the points by compute: budgets, or half decades where the runs have no budgets in common."""
    groups = list(budgets(points["C"]))
    if len(groups) > len(points) / 3 or len(groups) < 3:
        decades = np.floor(2 * np.log10(points["C"]) + 1e-9)
        groups = [np.flatnonzero(decades == value) for value in np.unique(decades)]
    return groups


def baselines(points: Points, compute: float, pinned: float) -> dict[str, float]:
    """{name: loss} at a compute, from the best run of each budget: the last one's; a straight line in logs; L = a C^b
    + c with c free, and with c pinned. Those that the points are too few for are left out."""
    best = frontier(points)
    found = {"last_rung": float(best["loss"][np.argmax(best["C"])])}
    if len(best) > 1:
        line = np.polyfit(np.log(best["C"]), np.log(best["loss"]), 1)
        found["log_linear"] = float(np.exp(np.polyval(line, np.log(compute))))
    only = of_arrays(C=best["C"], loss=best["loss"])
    for name, given in (("free_E", None), ("pinned_E", {"c": pinned})):
        if given and not 0 < pinned < best["loss"].min():
            continue
        try:
            law = fit(GPT4, only, np.inf, starts=GPT4.starts[::7], pinned=given)
            found[name] = float(np.exp(law.log_loss({"C": compute})[0]))
        except InputError:
            continue  # too few budgets
    return found


# --- leave-future-out -------------------------------------------------------------------------------------


def leave_future_out(law: Law, points: Points, level: float = LEVEL, pinned: float | None = None) -> list[dict]:
    """For each budget from the second to the last but one: fitted up to it, every later run is forecast.

    Rows: cutoff (the largest fitted compute), fitted, forecast (counts), error, max_error, bias (relative, of the
    loss), covered (the share inside the interval), widening, `best` (the best run of the last budget: its compute,
    loss, the law's forecast and the baselines'), errors (standardized, before widening). The widening of a row is from
    the forecasts before it alone, of runs up to its own cutoff. pinned: the baseline's irreducible loss; else the law's
    E as fitted to the same points. Cutoffs with too few points, or no interval, are left out.
    """
    groups = compute_groups(points)
    starts = law.starts[np.random.default_rng(0).permutation(len(law.starts))[:_STARTS]]
    rows, made = [], []
    for k in range(2, len(groups)):
        past, future = np.concatenate(groups[:k]), np.concatenate(groups[k:])
        cutoff = points["C"][past].max()
        known = [z for compute, z in made if compute <= cutoff * (1 + 1e-9)]
        wide, ahead = widening(known), points.take(future)
        try:
            found = fit(law, points.take(past), starts=starts)
            theta = bootstrap(found, SAMPLES)
            forecasts = [predict(found, _row(ahead, i), theta, wide, level) for i in range(len(ahead))]
        except InputError:
            continue
        loss = ahead["loss"]
        error = np.array([f.loss for f in forecasts]) / loss - 1
        z = [math.log(value / f.loss) / f.log_error for value, f in zip(loss, forecasts, strict=True)]
        made += zip(ahead["C"], z, strict=True)
        last = future[np.isin(future, groups[-1])]
        best = last[points["loss"][last].argmin()]
        e = irreducible_loss(found) if pinned is None else pinned
        target = {"compute": float(points["C"][best]), "loss": float(points["loss"][best]),
                  "law": float(np.exp(found.log_loss(_row(points, best))[0])),
                  **baselines(points.take(past), float(points["C"][best]), e)}  # fmt: skip
        covered = [f.low <= value <= f.high for value, f in zip(loss, forecasts, strict=True)]
        rows.append(dict(
            cutoff=float(cutoff), fitted=len(past), forecast=len(future), error=float(np.abs(error).mean()),
            max_error=float(np.abs(error).max()), bias=float(error.mean()), covered=float(np.mean(covered)),
            widening=wide, best=target, errors=z,
        ))  # fmt: skip
    return rows


def earlier(found: Fit) -> tuple[list[dict], float]:
    """(leave_future_out, the widening by all of it) of a fit; ([], 1) where the points have no compute."""
    rows = leave_future_out(found.law, found.points) if "C" in found.points.columns else []
    return rows, widening([z for row in rows for z in row["errors"]])


def widening(errors) -> float:
    """By how much the standardized errors of earlier forecasts are larger than they should be; at least 1."""
    return max(1.0, float(np.sqrt(np.mean(np.square(errors))))) if len(errors) else 1.0


def _row(points: Points, i: int) -> dict[str, float]:
    return {name: float(values[i]) for name, values in points.columns.items()}


def irreducible_loss(found: Fit) -> float:
    """The law's own; 0 of laws without one (Farseer's E is a coefficient of an exponent)."""
    return found.parameters["E" if found.law is CHINCHILLA else "c"] if found.law in (CHINCHILLA, GPT4) else 0.0
