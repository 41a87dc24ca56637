"""A law fitted to points: the global minimum of the sum of Huber terms of log loss, over all of the law's starts."""

import dataclasses
import functools
import math

import numpy as np
from scipy import stats

from gptjax.errors import InputError
from gptjax.scaling import separable
from gptjax.scaling.laws import CHINCHILLA, Law
from gptjax.scaling.optimize import DELTA, minimize
from gptjax.scaling.points import Points

_COARSE = (40, 1e-4)  # steps at most from every start, and the promised decrease at which it ends
_KEPT = 100  # of the lowest that are then followed to their end


@dataclasses.dataclass(frozen=True)
class Fit:
    """theta [p]: the law's coordinates. objective: the sum of Huber terms there. reached: the share of the starts that
    came within 1e-3 of it, relative. pinned: parameters that were given, not fitted."""

    law: Law
    points: Points
    theta: np.ndarray
    objective: float
    delta: float
    reached: float
    pinned: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, float]:
        """As published."""
        return dict(zip(self.law.parameters, map(float, self.law.natural(self.theta)), strict=True))

    @property
    def free(self) -> int:
        """How many parameters were fitted."""
        return len(self.theta) - len(self.pinned)

    @property
    def frozen(self) -> np.ndarray:
        return np.array([name in self.pinned for name in self.law.parameters])

    def log_loss(self, inputs: dict, theta=None) -> np.ndarray:
        """log loss at inputs by name, [n]; of thetas [s, p], [s, n]."""
        x = np.log(np.stack([np.atleast_1d(np.asarray(inputs[name], float)) for name in self.law.inputs]))
        value = self.law.log_loss(np.atleast_2d(self.theta if theta is None else theta), x)[0]
        return value[0] if theta is None else value

    @property
    def residuals(self) -> np.ndarray:
        """log loss less the law's, [n]."""
        return np.log(self.points["loss"]) - self.log_loss(self.points.columns)

    @property
    def scatter(self) -> float:
        """Standard deviation of the residuals, with n - p degrees of freedom: noise and lack of fit."""
        return math.sqrt((self.residuals**2).sum() / (len(self.points) - self.free))

    def t(self, level: float) -> float:
        """Student's quantile of a two-sided interval, n - p degrees of freedom."""
        return float(stats.t.ppf((1 + level) / 2, len(self.points) - self.free))


def fit(law: Law, points: Points, delta: float = DELTA, starts=None, pinned: dict[str, float] | None = None) -> Fit:
    """The law at its global minimum. starts: theta [s, p] to search from, else all of the law's; in Chinchilla's case
    also from least squares in the loss, found by another way (separable.py). pinned: parameters by name, not fitted.

    InputError: not more points than free parameters, an input that does not vary, or no minimum.
    """
    pinned = pinned or {}
    x, y = points.inputs(law), np.log(points["loss"])
    _check(law, points, len(law.parameters) - len(pinned))
    starts = law.starts if starts is None else np.atleast_2d(starts)
    if law is CHINCHILLA and not pinned:
        squares = separable.least_squares(points["N"], points["D"], points["loss"])
        start = law.free(np.array([squares.parameters[name] for name in law.parameters]))
        starts = np.concatenate([starts, np.maximum(start, -30)[None]])  # a zero coefficient: its log is -inf
    frozen = np.array([name in pinned for name in law.parameters])
    if pinned:
        starts = _pinned(law, np.array(starts), frozen, [pinned[name] for name in law.parameters if name in pinned])
    search = functools.partial(minimize, law.log_loss, x, y, frozen=frozen, delta=delta)
    theta, value = search(starts, iterations=_COARSE[0], stop=_COARSE[1])
    lowest = np.argsort(value, kind="stable")[:_KEPT]
    if not np.isfinite(value[lowest[0]]):
        raise InputError(f"{law.name} has no finite loss at these points from any start: check the columns' units.")
    theta[lowest], value[lowest] = search(theta[lowest])
    best = int(value.argmin())
    reached = float((value <= value[best] * (1 + 1e-3) + 1e-18).mean())
    return Fit(law, points, theta[best], float(value[best]), delta, reached, tuple(pinned))


def _pinned(law, starts, frozen, values):
    """The starts with parameters as given. InputError: one is out of its range, or would not be held, because the
    coordinate that it is in has another parameter too, which is fitted."""
    whole = law.natural(starts)
    whole[:, frozen] = values
    with np.errstate(invalid="ignore", divide="ignore"):
        starts = np.unique(law.free(whole), axis=0)
    named = ", ".join(f"{name}={value:g}" for name, value in zip(np.array(law.parameters)[frozen], values, strict=True))
    if not np.isfinite(starts[:, frozen]).all():
        raise InputError(f"{law.name} cannot have {named}: {law.bounds}.")
    moved = law.natural(starts[:1] + 0.1 * ~frozen)[0, frozen]
    if not np.allclose(moved, values, rtol=1e-9, atol=0):
        held = [name for i, name in enumerate(law.parameters) if _alone(law, starts[:1], i)]
        raise InputError(f"{law.name} is not fitted with {named} held: pin {', '.join(held)} alone, or all of them.")
    return starts


def _alone(law, theta, i) -> bool:
    """Whether a parameter depends on its own coordinate alone."""
    others = np.arange(theta.shape[1]) != i
    return np.allclose(law.natural(theta + 0.1 * others)[0, i], law.natural(theta)[0, i], rtol=1e-9, atol=0)


def _check(law, points, free):
    if len(points) <= free:
        raise InputError(
            f"{points.path or 'points'}: {len(points)} finished runs are too few for {law.name}, which has {free} "
            f"parameters: {free + 1} or more are needed, so that how well it fits can be told. Run more, or choose a "
            "law with fewer."
        )
    for name in law.inputs:
        if (count := len(np.unique(points[name]))) < (needed := 3 if law.name == "gpt4" and free > 2 else 2):
            raise InputError(
                f"{points.path or 'points'}: {name} has {count} different value{'s' * (count > 1)}, and {law.name} "
                f"needs {needed} to tell its exponent. Add runs with another {name}."
            )
