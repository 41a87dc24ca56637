"""L1-regularized logistic regression on features, and the best threshold on a single one.

    minimize  |w|_1 + C sum_n log(1 + exp(-s_n (w x_n + b))),  s = 2 y - 1,  b not penalized

is scikit-learn's LogisticRegression(penalty="l1"), but for the bias, which its liblinear penalizes.
Shapes: N examples, D features.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CS = tuple(2.0**k for k in range(-8, 1))  # of the study


class Fit(NamedTuple):
    """w_D and b, and by how much the conditions of a minimum are violated (`violation`)."""

    w_D: jax.Array
    b: jax.Array
    violation: jax.Array


def violation(x_ND, y_N, w_D, b, C):
    """The largest violation of 0 in the subdifferential: |g + sign(w)| where w != 0, max(|g| - 1, 0) where it is 0, and
    |g| of the bias, g being the gradient of the loss. The penalty's own slope, 1, is the scale."""
    error_N = C * (jax.nn.sigmoid(x_ND @ w_D + b) - y_N)
    g_D = x_ND.T @ error_N
    of_w_D = jnp.where(w_D != 0, jnp.abs(g_D + jnp.sign(w_D)), jnp.maximum(jnp.abs(g_D) - 1, 0))
    return jnp.maximum(of_w_D.max(), jnp.abs(error_N.sum()))


@functools.partial(jax.jit, static_argnames=("most", "tolerance"))
def fit(x_ND, y_N, C, start: Fit, *, tolerance: float = 5e-3, most: int = 20_000) -> Fit:
    """The minimum, by accelerated proximal gradient steps (FISTA, Beck & Teboulle 2009) that lose their momentum where
    it points uphill (O'Donoghue & Candès 2015).

    x_ND: float; y_N: 0 or 1. start: of a neighboring C, or zeros. Stops at `tolerance`, which
    the float32 sums of thousands of examples still reach, or after `most` steps.
    """
    with_bias = jnp.concatenate([x_ND, jnp.ones((x_ND.shape[0], 1), x_ND.dtype)], 1)
    shrunk = jnp.ones(with_bias.shape[1]).at[-1].set(0)

    def power(_, v):
        v = with_bias.T @ (with_bias @ v)
        return v / jnp.linalg.norm(v)

    v = lax.fori_loop(0, 100, power, jnp.ones(with_bias.shape[1]))
    step = 4 / (C * 1.1 * jnp.sum((with_bias @ v) ** 2))  # 1 / the gradient's Lipschitz constant, with a margin

    def body(carry):
        i, w, look, t, _ = carry
        g = C * with_bias.T @ (jax.nn.sigmoid(with_bias @ look) - y_N)
        moved = look - step * g
        new = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - step * shrunk, 0)
        uphill = jnp.vdot(look - new, new - w) > 0
        after = jnp.where(uphill, 1.0, (1 + jnp.sqrt(1 + 4 * t * t)) / 2)
        look = new + jnp.where(uphill, 0.0, (t - 1) / after) * (new - w)
        wrong = lax.cond(i % 10 == 9, lambda: violation(x_ND, y_N, new[:-1], new[-1], C), lambda: jnp.inf)
        return i + 1, new, look, after, wrong

    first = jnp.append(start.w_D, start.b)
    _, w, _, _, wrong = lax.while_loop(
        lambda carry: (carry[-1] > tolerance) & (carry[0] < most), body, (0, first, first, 1.0, jnp.inf)
    )
    return Fit(w[:-1], w[-1], wrong)


def accuracy(x_ND, y_N, found: Fit) -> float:
    return float(np.mean((np.asarray(x_ND @ found.w_D + found.b) > 0) == (y_N > 0)))


def path(x_ND, y_N, valid_ND, valid_N, cs=CS) -> list[tuple[float, Fit, float]]:
    """(C, fit, accuracy on the validation examples) of every C, the smallest first: each begins with the one before."""
    found, last = [], Fit(jnp.zeros(x_ND.shape[1]), jnp.float32(0), jnp.float32(0))
    for C in sorted(cs):
        last = fit(x_ND, y_N, C, last)
        found.append((C, last, accuracy(valid_ND, valid_N, last)))
    return found


class Threshold(NamedTuple):
    """Says 1 where sign x value > sign x at."""

    at: float
    sign: int

    def accuracy(self, values_N, y_N) -> float:
        return float(np.mean((self.sign * values_N > self.sign * self.at) == (y_N > 0)))


def best_threshold(values_N, y_N) -> Threshold:
    """The threshold of the highest accuracy on these examples, halfway between two values; its side too."""
    order = np.argsort(values_N, kind="stable")
    values, y = np.asarray(values_N, np.float64)[order], (np.asarray(y_N)[order] > 0).astype(int)
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # a threshold stands after the last equal value
    below = np.concatenate([[0], ends + 1])  # how many examples are below each threshold
    ones_below = np.concatenate([[0], np.cumsum(y)])[below]
    right = below - ones_below + (y.sum() - ones_below)  # of sign 1: zeros below and ones above
    k, sign = max(((int((s * right).argmax()), s) for s in (1, -1)),
                  key=lambda ks: right[ks[0]] if ks[1] == 1 else len(y) - right[ks[0]])  # fmt: skip
    n = below[k]
    at = values[0] - 1 if n == 0 else values[-1] + 1 if n == len(values) else (values[n - 1] + values[n]) / 2
    return Threshold(float(at), sign)
