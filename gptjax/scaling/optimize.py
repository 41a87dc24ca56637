"""Many fits at once: the sum of Huber terms of log loss, minimized from many starts, or for many samples, side by side.

The objective is Hoffmann et al. 2022, eq. 3: sum_i Huber_delta(log L^(x_i) - log L_i). The sum, not the mean: with the
mean, stopping rules that have an absolute scale end before the minimum (Besiroglu et al. 2024). The rules here are
relative. delta = inf makes it half the sum of squares.

BFGS with exact gradients and each fit's own inverse Hessian [p, p]: with 2 to 9 parameters there is nothing to limit
the memory of. For the first steps, which begin far away, it is that of Gauss and Newton: a and alpha, whose effects
differ by a factor of log N, would take hundreds of steps without. Float64 numpy, in blocks that fit the cache, on two
threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

DELTA = 1e-3
_BLOCK = 60_000  # points x fits at a time
_THREADS = 2
_ARMIJO, _HALVINGS = 1e-4, 30
STOP = 1e-13
_GAUSS_NEWTON = 8  # steps


def huber(residual, delta: float = DELTA):
    """(Huber terms, their derivatives, weights derivative / residual in (0, 1]) of residuals of any shape."""
    size = np.abs(residual)
    clipped = np.minimum(size, delta)
    return clipped * (size - 0.5 * clipped), np.copysign(clipped, residual), clipped / np.maximum(size, 1e-300)


def minimize(log_loss: Callable, x, y, starts, *, frozen=None, delta: float = DELTA, iterations=300, stop=STOP):
    """(theta [s, p], objective [s]): a local minimum from each start.

    log_loss: of a Law. x: logs of the inputs, [inputs, n]. y: log losses, [n], or [s, n] where each fit has its own.
    frozen: which parameters stay where they start, bool [p]. stop: a fit ends when a step promises to lower its
    objective by less than this, relative.
    """
    theta = np.atleast_2d(np.asarray(starts, float)).copy()
    value = np.empty(len(theta))

    def part(first):
        which = slice(first, None, _THREADS)
        own = np.broadcast_to(y, (len(theta), len(x[0])))[which]
        objective = _Objective(log_loss, x, own, frozen, delta)
        theta[which], value[which] = _bfgs(objective, theta[which].copy(), iterations, stop)

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(part, range(min(_THREADS, len(theta)))))
    return theta, value


class _Objective:
    def __init__(self, log_loss, x, y, frozen, delta):
        self.log_loss, self.x, self.y, self.delta = log_loss, x, y, delta
        self.free = slice(None) if frozen is None else ~np.asarray(frozen)

    def value_and_slope(self, theta, which, curvature=False):
        """Objective [s] and gradient [s, p] at theta of the fits `which`; with curvature also Gauss-Newton's [s, p, p].
        Infinite, with gradient 0, where the law overflows."""
        rows = max(1, _BLOCK // len(self.x[0]))
        blocks = [self._block(theta[i : i + rows], which[i : i + rows], curvature) for i in range(0, len(theta), rows)]
        return blocks[0] if len(blocks) == 1 else tuple(map(np.concatenate, zip(*blocks, strict=True)))

    def _block(self, theta, which, curvature):
        with np.errstate(over="ignore", invalid="ignore"):
            value, derivatives = self.log_loss(theta, self.x)
            terms, slopes, shares = huber(value - self.y[which], self.delta)
            total = terms.sum(-1)
            gradient = np.matmul(derivatives, slopes[..., None])[..., 0]
        bad = ~(np.isfinite(total) & np.isfinite(gradient).all(-1))
        total[bad], gradient[bad] = np.inf, 0
        if not isinstance(self.free, slice):
            gradient[:, ~self.free] = 0
        if not curvature:
            return total, gradient
        derivatives[bad] = 0
        shares = np.where(bad[:, None], 0, shares)
        return total, gradient, np.matmul(derivatives * shares[:, None], derivatives.swapaxes(1, 2))

    def inverse_hessian(self, theta, which):
        """Gauss-Newton's, a little damped, and 0 where frozen."""
        *_, curvature = self.value_and_slope(theta, which, curvature=True)
        p = theta.shape[1]
        diagonal = np.einsum("spp->sp", curvature)
        damping = 1e-6 * diagonal + 1e-9 * diagonal.max(-1, keepdims=True) + 1e-30
        inverse = np.zeros_like(curvature)
        kept = np.arange(p)[self.free]
        block = np.ix_(range(len(theta)), kept, kept)
        inverse[block] = np.linalg.inv(curvature[block] + damping[:, kept, None] * np.eye(len(kept)))
        return inverse


def _bfgs(objective: _Objective, theta, iterations: int, stop: float):
    everything = np.arange(len(theta))
    value, gradient = objective.value_and_slope(theta, everything)
    inverse = objective.inverse_hessian(theta, everything)
    fresh = np.ones(len(theta), bool)  # its inverse Hessian is Gauss-Newton's of this very place
    active = everything[np.isfinite(value)]
    for iteration in range(iterations):
        if not len(active):
            break
        step = -np.einsum("spq,sq->sp", inverse[active], gradient[active])
        promised = np.einsum("sp,sp->s", step, gradient[active])
        moved, new_value, new_theta, new_gradient = _line_search(objective, theta, value, step, promised, active)
        small = -promised <= stop * value[active]
        stuck = ~moved
        done = (small | stuck) & fresh[active]
        again = active[(small | stuck) & ~done]
        taken = active[moved]
        s, t = new_theta[moved] - theta[taken], new_gradient[moved] - gradient[taken]
        theta[taken], value[taken], gradient[taken] = new_theta[moved], new_value[moved], new_gradient[moved]
        if iteration < _GAUSS_NEWTON:
            again = np.concatenate([again, taken])
        else:
            inverse[taken], fresh[taken] = _updated(inverse[taken], s, t), False
        if len(again):
            inverse[again], fresh[again] = objective.inverse_hessian(theta[again], again), True
        active = active[~done]
    return theta, value


def _line_search(objective, theta, value, step, promised, active):
    """Halves the steps until each decreases its objective enough: (which did, value, theta, gradient)."""
    new_theta, new_value = theta[active].copy(), value[active].copy()
    new_gradient = np.zeros_like(new_theta)
    moved = np.zeros(len(active), bool)
    length = np.minimum(1, 10 / np.maximum(np.abs(step).max(-1), 1e-300))  # in logs: a factor of 20,000 at most
    waiting = np.flatnonzero(promised < 0)
    for _ in range(_HALVINGS):
        if not len(waiting):
            break
        trial = theta[active[waiting]] + length[waiting, None] * step[waiting]
        got, slope = objective.value_and_slope(trial, active[waiting])
        enough = got <= value[active[waiting]] + _ARMIJO * length[waiting] * promised[waiting]
        enough &= got < value[active[waiting]]
        good = waiting[enough]
        new_theta[good], new_value[good], new_gradient[good] = trial[enough], got[enough], slope[enough]
        moved[good] = True
        waiting = waiting[~enough]
        length[waiting] *= 0.5
    return moved, new_value, new_theta, new_gradient


def _updated(inverse, s, t):
    """BFGS's update of inverse Hessians [s, p, p], left out where the curvature along the step is not positive."""
    along = np.einsum("sp,sp->s", s, t)
    good = along > 1e-12 * np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
    rho = np.where(good, 1 / np.where(good, along, 1), 0)
    ht = np.einsum("spq,sq->sp", inverse, t)
    scale = rho * (1 + rho * np.einsum("sp,sp->s", t, ht))
    outer = np.einsum("sp,sq->spq", ht, s)
    return inverse + scale[:, None, None] * np.einsum("sp,sq->spq", s, s) - rho[:, None, None] * (
        outer + outer.swapaxes(1, 2)
    )
