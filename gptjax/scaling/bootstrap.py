"""Intervals: the bootstrap for every parameter and for N*, D*, and the profile likelihood of each parameter."""

import numpy as np
from scipy import optimize, stats

from gptjax.scaling import laws
from gptjax.scaling.fitting import Fit
from gptjax.scaling.optimize import minimize

SAMPLES = 4000
LEVEL = 0.9
FAILED = 0.05  # with a larger share of samples without a value there is no interval


def bootstrap(fit: Fit, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """theta [samples, p], each fitted to a set of `resampled`."""
    x, starts = fit.points.inputs(fit.law), np.broadcast_to(fit.theta, (samples, len(fit.theta)))
    theta, _ = minimize(
        fit.law.log_loss, x, resampled(fit, samples, seed), starts, frozen=fit.frozen, delta=fit.delta, iterations=100
    )
    return theta


def resampled(fit: Fit, samples: int, seed: int = 0) -> np.ndarray:
    """Log losses [samples, n] at the points: the law's, with residuals drawn anew. The design is kept, because budgets
    and sizes are chosen, not drawn.

    Residuals are divided by sqrt(1 - leverage), without which they are smaller than the noise by sqrt(1 - p/n). Of
    these the p smallest, of p fitted parameters, are not drawn. With noise far above delta the fit is nearly one of
    least absolute deviations, which meets p points exactly: those zeros are the fit's, not the noise's, and how wide an
    interval is depends on how dense the noise is around 0 (LOG.md). With noise below delta their absence makes up for
    n - p degrees of freedom. The others are drawn with either sign: noise around the law is as likely above as below,
    while the mean of few residuals, and of robust ones, is not 0.
    """
    x, fitted = fit.points.inputs(fit.law), fit.log_loss(fit.points.columns)
    residuals = fit.residuals / np.sqrt(1 - _leverage(fit, x))
    drawn = residuals[np.argsort(np.abs(residuals))[fit.free :]]
    drawn = np.concatenate([drawn, -drawn])
    return fitted + drawn[np.random.default_rng(seed).integers(len(drawn), size=(samples, len(fitted)))]


def _leverage(fit, x):
    """Diagonal of the hat matrix of the law's derivatives, [n], below .95."""
    derivatives = fit.law.log_loss(fit.theta[None], x)[1][0][~fit.frozen].T
    u, s, _ = np.linalg.svd(derivatives / np.maximum(np.linalg.norm(derivatives, axis=0), 1e-300), full_matrices=False)
    return np.minimum((u[:, s > 1e-10 * s[0]] ** 2).sum(1), 0.95)


def interval(values, level: float = LEVEL) -> tuple[float, float]:
    """The central share `level` of samples [s]. Those that are not a number have failed and are left out; where they
    are more than 5 % there is no interval: (nan, nan)."""
    values = np.asarray(values, float)
    if failed(values) > FAILED:
        return np.nan, np.nan
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def failed(values) -> float:
    """The share of samples that are not a number."""
    return float(np.isnan(values).mean())


def parameter_intervals(fit: Fit, theta, level: float = LEVEL) -> dict[str, tuple[float, float]]:
    """{parameter: (low, high)}."""
    values = fit.law.natural(theta)
    return {name: interval(values[:, i], level) for i, name in enumerate(fit.law.parameters)}


def optimum_intervals(fit: Fit, theta, compute: float, level: float = LEVEL) -> dict:
    """{N, D, D_per_N: {value, low, high, failed}} at a compute, by Chinchilla's law. failed: the share of samples that
    have no optimum, since an exponent is not positive."""
    values = dict(zip(fit.law.parameters, fit.law.natural(theta).T, strict=True))
    best, sampled = laws.optimum(fit.parameters, compute), laws.optimum(values, compute)
    ratio = best[1] / best[0], sampled[1] / sampled[0]
    rows = {"N": (best[0], sampled[0]), "D": (best[1], sampled[1]), "D_per_N": ratio}
    return {name: _row(float(value), samples, level) for name, (value, samples) in rows.items()}


def exponent_intervals(fit: Fit, theta, level: float = LEVEL) -> dict:
    """{a, b}: N* ~ C^a, D* ~ C^b, by Chinchilla's law, as optimum_intervals."""

    def of(parameters):
        alpha, beta = parameters["alpha"], parameters["beta"]
        with np.errstate(all="ignore"):
            return np.where((np.minimum(alpha, beta) > 0), np.divide(beta, alpha + beta), np.nan)

    values = dict(zip(fit.law.parameters, fit.law.natural(theta).T, strict=True))
    a, samples = float(of(fit.parameters)), of(values)
    return {"a": _row(a, samples, level), "b": _row(1 - a, 1 - samples, level)}


def _row(value, samples, level):
    low, high = interval(samples, level)
    return {"value": value, "low": low, "high": high, "failed": failed(samples)}


def ill_determined(intervals: dict[str, tuple[float, float]]) -> list[str]:
    """Parameters that the points leave open: an interval over more than a factor of 10, or that includes 0."""
    return [name for name, (low, high) in intervals.items() if low * high <= 0 or max(low / high, high / low) > 10]


def profile(fit: Fit, name: str, level: float = LEVEL) -> tuple[float, float]:
    """The values of a parameter that the points do not reject: each held fixed, the others fitted to it.

    Of normal errors in log loss with unknown variance: (SS(value) - SS_min) / (SS_min / (n - p)) is at most F's
    quantile with 1 and n - p degrees of freedom. Of laws whose coordinates are their parameters or the logs of these,
    as chinchilla and gpt4. An end that is not found within a factor of e^20 (an exponent: 20) is infinite, or 0.
    """
    index = fit.law.parameters.index(name)
    x, y = fit.points.inputs(fit.law), np.log(fit.points["loss"])
    best, value = minimize(fit.law.log_loss, x, y, fit.theta, frozen=fit.frozen, delta=np.inf)
    freedom = len(y) - fit.free
    limit = value[0] * (1 + stats.f.ppf(level, 1, freedom) / freedom)
    frozen = fit.frozen.copy()
    frozen[index] = True

    def excess(offset, start):
        moved = start + offset * np.eye(len(start))[index]
        theta, value = minimize(fit.law.log_loss, x, y, moved, frozen=frozen, delta=np.inf)
        return value[0] / limit - 1, theta[0]

    return tuple(sorted(_end(fit, excess, best[0], index, sign) for sign in (-1, 1)))


def _end(fit, excess, start, index, sign):
    """Where the profile crosses its limit, as the parameter is published: doubling steps, then bisection."""
    step, inside, here = 1e-3, 0.0, start
    while step < 20:
        above, theta = excess(step * sign - (here[index] - start[index]), here)
        if above > 0:
            break
        inside, here, step = step, theta, 2 * step
    else:
        step = np.inf
    if np.isfinite(step):
        above = lambda s: excess(s * sign - (here[index] - start[index]), here)[0]
        step = optimize.brentq(above, inside, step, xtol=1e-6)
    end = start.copy()
    end[index] += sign * step
    with np.errstate(all="ignore"):
        return float(fit.law.natural(end)[index])
