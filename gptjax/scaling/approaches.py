"""Hoffmann et al.'s approaches 1 and 2: N* ~ C^a without a law of the loss, from the envelope of training curves, and
from a parabola at each compute budget. How far approach 2 is off by its own grid is computed, not assumed."""

import dataclasses

import numpy as np
from scipy.interpolate import PchipInterpolator

from gptjax.errors import InputError
from gptjax.scaling import laws
from gptjax.scaling.points import Points, budgets

BINS = 1500  # appendix D.1
CENTERED = 1.25  # a grid's middle is at most this factor from its optimum


@dataclasses.dataclass(frozen=True)
class Frontier:
    """log N* = log k + a log C, by least squares over (compute, N) [m]; loss [m] of the best run there."""

    a: float
    k: float
    compute: np.ndarray
    N: np.ndarray
    loss: np.ndarray

    def optimum(self, compute):
        """(N*, D*), D* by C = 6 N D."""
        N = self.k * np.power(compute, self.a)
        return N, compute / (6 * N)


def _frontier(compute, N, loss) -> Frontier:
    a, log_k = np.polyfit(np.log(compute), np.log(N), 1)
    return Frontier(float(a), float(np.exp(log_k)), *map(np.asarray, (compute, N, loss)))


# --- approach 1 -------------------------------------------------------------------------------------------


def envelope(points: Points, bins: int = BINS) -> Frontier:
    """Approach 1 (§3.1): at each of `bins` compute values, equally spaced in their logs, the size with the lowest loss,
    each size's losses being interpolated over its tokens; then a power law through those.

    A size's points are ends of whole runs (a schedule decayed to each length), not a training curve. Left out are the
    values at which, of the sizes that have losses there, the smallest or the largest is best: there the envelope is cut
    off. InputError: fewer than 3 sizes have 2 points or more, or fewer than 2 sizes remain.
    """
    curves = []
    for N in np.unique(points["N"]):
        of = points["N"] == N
        compute, loss = points["C"][of], points["loss"][of]
        ends = np.unique(compute)
        if len(ends) > 1:
            mean = [np.log(loss[compute == c]).mean() for c in ends]
            curves.append((N, np.log(ends), PchipInterpolator(np.log(ends), mean, extrapolate=False)))
    if len(curves) < 3:
        raise InputError(
            f"Approach 1 needs 3 sizes with runs of 2 or more lengths, and {points.path or 'points'} has "
            f"{len(curves)}: use approach 2 or 3."
        )
    low, high = min(ends[0] for _, ends, _ in curves), max(ends[-1] for _, ends, _ in curves)
    at = np.linspace(low, high, bins)
    losses = np.array([curve(at) for *_, curve in curves])  # nan outside of a curve
    there = ~np.isnan(losses)
    losses = np.where(there, losses, np.inf)
    best = losses.argmin(0)
    kept = there.any(0) & (best > there.argmax(0)) & (best < len(curves) - 1 - there[::-1].argmax(0))
    if len(np.unique(best[kept])) < 2:
        raise InputError(
            "Approach 1: fewer than 2 sizes are best anywhere between smaller and larger ones. Add sizes between, or "
            "more lengths of each."
        )
    sizes = np.array([N for N, *_ in curves])
    return _frontier(np.exp(at[kept]), sizes[best[kept]], np.exp(losses.min(0)[kept]))


# --- approach 2 -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parabola:
    """The losses of one budget over log N. N: where the parabola is lowest, loss its value there; center: the middle of
    the grid, the geometric mean of its ends; edge: why it is left out of the power law, or None."""

    compute: float
    N: float
    loss: float
    center: float
    coefficients: np.ndarray
    low: float
    high: float
    edge: str | None

    @property
    def off_center(self) -> float:
        """The grid's middle over its optimum."""
        return self.center / self.N


def parabolas(points: Points) -> list[Parabola]:
    """Approach 2's fits (§3.2), a budget each, for budgets with 4 sizes or more: loss by (1, log N, log N squared)."""
    found = []
    for which in budgets(points["C"]):
        n, loss = np.log(points["N"][which]), points["loss"][which]
        if len(np.unique(n)) < 4:
            continue
        middle = (n.min() + n.max()) / 2
        curve = np.polyfit(n - middle, loss, 2)
        vertex = middle - curve[1] / (2 * curve[0]) if curve[0] > 0 else float(n[loss.argmin()])
        edge = None
        if curve[0] <= 0:
            edge = "its parabola has no minimum"
        elif not n.min() < vertex < n.max():
            edge = "the optimum is outside of the grid"
        elif loss.argmin() in (n.argmin(), n.argmax()):
            edge = "the best run is at the grid's edge"
        compute = float(np.exp(np.log(points["C"][which]).mean()))
        at_vertex = float(np.polyval(curve, vertex - middle))
        sizes = [float(np.exp(value)) for value in (vertex, middle, n.min(), n.max())]
        found.append(Parabola(compute, sizes[0], at_vertex, sizes[1], curve, *sizes[2:], edge))
    return found


def isoflop(points: Points) -> tuple[Frontier, list[Parabola]]:
    """Approach 2: a power law through the parabolas' minima. InputError: fewer than 2 budgets have one."""
    found = parabolas(points)
    used = [p for p in found if p.edge is None]
    if len(used) < 2:
        told = "; ".join(f"{p.compute:.3g}: {p.edge}" for p in found) or "no budget has 4 sizes"
        raise InputError(
            f"Approach 2 needs 2 compute budgets whose optimum is inside their grid of sizes, and there are "
            f"{len(used)} ({told}). Add sizes on the open side, or use approach 3."
        )
    return _frontier(*(np.array([getattr(p, name) for p in used]) for name in ("compute", "N", "loss"))), found


@dataclasses.dataclass(frozen=True)
class Bias:
    """What approach 2 gets wrong on this very grid where the law is exact and there is no noise.

    a: of the exponent. N: of N* at `compute`, relative. drift: the slope of log(grid's middle / optimum) over log C, to
    which the bias in a is due; centered: every grid's middle is within a factor of 1.25 of its optimum.
    """

    a: float
    N: float
    compute: float
    drift: float
    centered: bool


def expected_bias(points: Points, parameters: dict[str, float], compute: float) -> Bias:
    """Approach 2 on losses that Chinchilla's law with these parameters gives at the points, against its closed form."""
    exact = laws.CHINCHILLA.loss(parameters, N=points["N"], D=points["D"])
    found, curves = isoflop(dataclasses.replace(points, columns=points.columns | {"loss": exact}))
    optima = np.array([laws.optimum(parameters, p.compute)[0] for p in curves])
    off = np.log([p.center for p in curves]) - np.log(optima)
    drift = np.polyfit(np.log([p.compute for p in curves]), off, 1)[0]
    a = parameters["beta"] / (parameters["alpha"] + parameters["beta"])
    ratio = found.optimum(compute)[0] / laws.optimum(parameters, compute)[0]
    return Bias(found.a - a, float(ratio - 1), compute, float(drift), bool(np.abs(off).max() < np.log(CENTERED)))
