"""Chinchilla's law by least squares in the loss, its separable form: a second way to the fit, and a check of the first.

Given alpha and beta, L = E + A N^-alpha + B D^-beta is linear in E, A, B >= 0, so its best coefficients are a convex
problem that is solved exactly; what is left is a search in two dimensions, over a grid and then from each of its local
minima (variable projection). Hoffmann's own objective is not separable, being of log loss.
"""

import dataclasses
import itertools

import numpy as np
from scipy import optimize

from gptjax.scaling import laws

LOWEST, HIGHEST, CELLS = 0.01, 3.0, 64  # of alpha and beta, in equal steps of their logs


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """parameters: A, B, E, alpha, beta. squares: the sum of squared residuals of the loss. minima: local minima of the
    grid. optimality: by how much the conditions of the inner minimum are violated, relative (Karush, Kuhn and
    Tucker); at_bound: whether an exponent ended at the edge of the search, or a coefficient at 0."""

    parameters: dict[str, float]
    squares: float
    minima: int
    optimality: float
    at_bound: bool


def least_squares(N, D, loss) -> LeastSquares:
    """The global minimum for arrays [n]."""
    n, d = np.log(N), np.log(D)
    center_n, center_d = n.mean(), d.mean()  # A and B are fitted in these units: columns near 1
    n, d, loss = n - center_n, d - center_d, np.asarray(loss, float)
    exponents = np.geomspace(LOWEST, HIGHEST, CELLS)
    grid = _grid_squares(np.exp(-exponents[:, None] * n), np.exp(-exponents[:, None] * d), loss)
    starts = _local_minima(grid)
    best = min((_refined(exponents[[i, j]], n, d, loss) for i, j in starts), key=lambda result: result.fun)
    alpha, beta = np.exp(best.x)
    coefficients, columns = _inner(alpha, beta, n, d, loss)
    E, A, B = coefficients
    residual = loss - columns @ coefficients
    slope = columns.T @ residual  # at the minimum 0 where a coefficient is positive, else not positive
    violation = np.where(coefficients > 0, np.abs(slope), np.maximum(slope, 0)).max()
    found = dict(A=A * np.exp(alpha * center_n), B=B * np.exp(beta * center_d), E=E, alpha=alpha, beta=beta)
    return LeastSquares(
        {name: float(value) for name, value in found.items()},
        float(residual @ residual), len(starts), float(violation / (np.linalg.norm(loss) * np.linalg.norm(columns))),
        bool(min(coefficients) == 0 or not all(LOWEST * 1.001 < v < HIGHEST * 0.999 for v in (alpha, beta))),
    )  # fmt: skip


def parameters_agree(squares: LeastSquares, other: dict[str, float], compute: float) -> dict[str, float]:
    """How far another fit is from this one: the difference in alpha, beta and E, and the ratio of N*(compute)."""
    ours = squares.parameters
    ratio = laws.optimum(other, compute)[0] / laws.optimum(ours, compute)[0]
    return {name: other[name] - ours[name] for name in ("alpha", "beta", "E")} | {"N_ratio": float(ratio)}


def _grid_squares(x, y, loss):
    """Least sum of squares [cells, cells] over E, A, B >= 0 for all pairs of columns x, y [cells, n].

    The minimum under the constraint is that of one of the 7 subsets of positive coefficients: of those whose own
    minimum is positive, the lowest.
    """
    cells, n = x.shape
    gram, right = np.empty((cells, cells, 3, 3)), np.empty((cells, cells, 3))
    gram[..., 0, 0], right[..., 0] = n, loss.sum()
    gram[..., 1, 1], right[..., 1] = (x * x).sum(1)[:, None], (x @ loss)[:, None]
    gram[..., 2, 2], right[..., 2] = (y * y).sum(1), y @ loss
    gram[..., 0, 1] = gram[..., 1, 0] = x.sum(1)[:, None]
    gram[..., 0, 2] = gram[..., 2, 0] = y.sum(1)
    gram[..., 1, 2] = gram[..., 2, 1] = x @ y.T
    best = np.full((cells, cells), loss @ loss)
    for size in (1, 2, 3):
        for subset in map(list, itertools.combinations(range(3), size)):
            b = right[..., subset]
            block = gram[..., subset, :][..., subset]
            ridge = 1e-13 * np.einsum("abii->ab", block)[..., None, None] * np.eye(size)
            w = np.linalg.solve(block + ridge, b[..., None])[..., 0]
            value = loss @ loss - (w * b).sum(-1)
            best = np.where((w >= 0).all(-1), np.minimum(best, value), best)
    return best


def _local_minima(grid) -> list[tuple[int, int]]:
    """Cells that none of their 8 neighbors is below; at most the 20 lowest."""
    padded = np.pad(grid, 1, constant_values=np.inf)
    around = [padded[1 + i : padded.shape[0] - 1 + i, 1 + j : padded.shape[1] - 1 + j]
              for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]  # fmt: skip
    cells = np.argwhere(grid <= np.min(around, axis=0))
    return sorted(map(tuple, cells), key=lambda cell: grid[cell])[:20]


def _inner(alpha, beta, n, d, loss):
    """(E, A, B >= 0, columns [n, 3]) of least squares at given exponents."""
    columns = np.stack([np.ones_like(n), np.exp(-alpha * n), np.exp(-beta * d)], 1)
    norms = np.linalg.norm(columns, axis=0)
    return optimize.nnls(columns / norms, loss)[0] / norms, columns


def _refined(start, n, d, loss):
    """The outer problem from a cell: the derivative by an exponent is that at fixed coefficients, as these are best."""

    def squares(logs):
        alpha, beta = np.exp(logs)
        (E, A, B), columns = _inner(alpha, beta, n, d, loss)
        residual = loss - columns @ np.array([E, A, B])
        slope = 2 * np.array([A * alpha * (residual * n) @ columns[:, 1], B * beta * (residual * d) @ columns[:, 2]])
        return residual @ residual / scale, slope / scale

    scale = 1.0
    scale = max(squares(np.log(start))[0], 1e-300)
    bounds = [(np.log(LOWEST), np.log(HIGHEST))] * 2
    options = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 500, "maxls": 60}
    found = optimize.minimize(squares, np.log(start), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    found.fun *= scale
    return found
