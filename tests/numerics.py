"""How far two computations of the same numbers may differ: a bound that follows from the arithmetic, not from the CPU
it was tried on.

The order in which a sum is taken differs between CPUs (their vectors' width), meshes, and programs compiled in one way
or another. Every order of a sum of n terms x_i has an error of at most gamma_n sum|x_i|, gamma_n = n u / (1 - n u), u
the unit roundoff (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. 2002, section 4.2), and, roundings
being as good as independent with mean 0, of at most lambda sqrt(n) u sum|x_i| but with probability
2 exp(-lambda^2 / 2) (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019). Errors of sums that follow one another add up
in the same way, so that their lengths add up under the root. Hence

    |actual - expected| <= 8 sqrt(terms) u scale + 8 u stored

in every entry of an array: 8 is 6 sqrt(2), of two such paths and lambda = 6, 3e-8 an entry. `terms` is how many
roundings lie on the longest way from the inputs to the result: the lengths of the sums one after another. `scale` is
the magnitude of what is summed: the largest entry of `expected` where nothing cancels, and what the caller gives where
it does. `stored` is for differences of two arrays that were rounded once more (how far parameters were moved): the
magnitude of those.

A bound that lets a relative error of 1e-4 pass tests nothing, so asking for one is an error by itself.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SAFETY = 8
PLANTED = 1e-4  # the relative error that every comparison in float32 must see


def unit_roundoff(dtype) -> float:
    """The largest relative error of rounding to nearest: half the distance from 1 to the next number."""
    return float(jnp.finfo(dtype).eps) / 2


def tolerance(terms: float, dtype=jnp.float32) -> float:
    """8 sqrt(terms) u, relative to the magnitude of what is summed. ValueError: an error of 1e-4 would pass."""
    found = SAFETY * math.sqrt(terms) * unit_roundoff(dtype)
    if jnp.finfo(dtype).bits >= 32 and not found < PLANTED / 2:
        raise ValueError(f"a sum of {terms} terms in {jnp.dtype(dtype)} hides a relative error of {PLANTED}")
    return found


def model_terms(config, rows: int = 1, time: int | None = None) -> int:
    """Roundings one after another in a model's loss and gradients: of each layer the matrices' and norms' sums over
    features and attention's over positions, the head's over features and the vocabulary, forward and backward, and a
    weight's gradient over all tokens."""
    time = time or config.context_length
    layer = 2 * config.d_model + 2 * time + 4 * config.d_model + config.d_ff  # norms and matrices in, attention, out
    return 2 * (config.n_layer * layer + config.d_model + config.vocab_size) + rows * time


def assert_close(actual, expected, *, terms: float, scale: float = 0.0, stored=0.0, dtype=None, err_msg: str = ""):
    """Every array of two trees of the same structure within the bound above, `scale` a lower limit of the magnitude,
    `stored` a number or a tree of the same structure.

    The roundoff is that of the coarser dtype of the two, at least float32's (figures from a file are Python floats, but
    were computed in float32), or of `dtype`.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    seen, leaves = False, jax.tree.leaves(expected)
    stored = len(leaves) * [stored] if isinstance(stored, float) else jax.tree.leaves(stored)
    for (path, a), b, whole in zip(jax.tree_util.tree_leaves_with_path(actual), leaves, stored, strict=True):
        kind = dtype or max([np.float32, *_floats(a, b)], key=unit_roundoff)
        a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
        name = f"{err_msg}{jax.tree_util.keystr(path)}"
        assert a.shape == b.shape, f"{name}: shapes {a.shape} and {b.shape}"
        largest = np.abs(b[np.isfinite(b)]).max(initial=0.0)
        limit = tolerance(terms, kind) * max(largest, scale)
        limit += SAFETY * unit_roundoff(kind) * float(np.abs(whole).max(initial=0.0))
        seen = seen or limit < PLANTED / 2 * largest or jnp.finfo(kind).bits < 32 or not largest
        with np.errstate(invalid="ignore"):
            error = np.where(a == b, 0.0, np.abs(a - b)).max(initial=0.0)
        note(error, limit, name)
        assert error <= limit, (  # of a NaN too: false
            f"{name}: differs by {error:.3g}, {error / max(limit, 1e-300):.3g} times the bound {limit:.3g} of {terms} "
            f"terms of magnitude {max(largest, scale):.3g} in {jnp.dtype(kind).name}"
        )
    if not seen:
        raise ValueError(f"{err_msg}: with terms of magnitude {scale} a relative error of {PLANTED} would pass")


def approx(expected, *, terms: float, scale: float = 0.0, dtype=jnp.float32):
    """pytest.approx with the bound above, for figures: each to its own magnitude, or to `scale` where that is more."""
    relative = tolerance(terms, dtype)
    return pytest.approx(expected, rel=relative, abs=relative * float(scale))


def note(error: float, limit: float, name: str):
    """Nothing: a place to measure how much of their bounds the comparisons use."""


def _floats(*arrays):
    return [a.dtype for a in arrays if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)]
