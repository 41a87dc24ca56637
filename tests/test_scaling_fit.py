"""Fits: planted laws are recovered, the minimum is the lowest there is, and two optimizers agree on it."""

import numpy as np
import pytest
from scaling_points import BUDGETS, isoflop, scattered
from scipy import optimize
from test_scaling_laws import INPUTS, NATURAL

from gptjax.errors import InputError
from gptjax.scaling import approaches, separable
from gptjax.scaling.fit import number, numbers
from gptjax.scaling.fitting import fit
from gptjax.scaling.laws import CHINCHILLA, GPT4, HOFFMANN, LAWS, optimum
from gptjax.scaling.optimize import DELTA, huber, minimize
from gptjax.scaling.points import of_arrays

SOME = CHINCHILLA.starts[np.random.default_rng(0).permutation(4500)[:200]]
A = HOFFMANN["beta"] / (HOFFMANN["alpha"] + HOFFMANN["beta"])


@pytest.fixture(scope="module")
def noisy():
    return scattered(60, noise=0.01)


@pytest.fixture(scope="module")
def found(noisy):
    return fit(CHINCHILLA, noisy)


def objective(theta, points, delta=1e-3):
    """Hoffmann et al. 2022, eq. 3, a term at a time."""
    a, b, e, alpha, beta = theta
    total = 0.0
    for N, D, loss in zip(points["N"], points["D"], points["loss"], strict=True):
        terms = [a - alpha * np.log(N), b - beta * np.log(D), e]
        r = max(terms) + np.log(sum(np.exp(t - max(terms)) for t in terms)) - np.log(loss)
        total += r * r / 2 if abs(r) <= delta else delta * (abs(r) - delta / 2)
    return total


def test_the_objective_is_hoffmanns_sum(found, noisy):
    assert found.objective == pytest.approx(objective(found.theta, noisy), rel=1e-12)


def test_huber():
    terms, slopes, shares = huber(np.array([0.0, 0.5, -0.5, 3.0, -3.0]), 1.0)
    assert terms.tolist() == [0, 0.125, 0.125, 2.5, 2.5] and slopes.tolist() == [0, 0.5, -0.5, 1, -1]
    assert shares[1:] == pytest.approx([1, 1, 1 / 3, 1 / 3])


def test_no_start_goes_lower(found, noisy):
    """scipy's L-BFGS-B from some of the 4,500 starts, stopped by its gradient alone, and from the truth."""
    x, y = noisy.inputs(CHINCHILLA), np.log(noisy["loss"])

    def value(theta):
        log_loss, derivatives = CHINCHILLA.log_loss(theta[None], x)
        terms, slopes, _ = huber(log_loss[0] - y)
        return 1e6 * terms.sum(), 1e6 * derivatives[0] @ slopes

    truth = CHINCHILLA.free(np.array([HOFFMANN[name] for name in CHINCHILLA.parameters]))
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000, "maxfun": 4000}
    ends = [optimize.minimize(value, s, jac=True, method="L-BFGS-B", options=options).fun for s in [*SOME[:40], truth]]
    assert found.objective <= min(ends) / 1e6 * (1 + 1e-6)
    assert min(ends) / 1e6 == pytest.approx(found.objective, rel=1e-4)


def test_the_minimum_is_where_nothing_near_is_lower(found, noisy):
    rng = np.random.default_rng(1)
    for size in (1e-1, 1e-3, 1e-5):
        for _ in range(20):
            assert objective(found.theta + size * rng.standard_normal(5), noisy) > found.objective * (1 - 1e-9)


def test_planted_parameters_without_noise():
    found = fit(CHINCHILLA, scattered(40), starts=SOME)
    assert found.parameters == pytest.approx(HOFFMANN, rel=1e-5)
    assert optimum(found.parameters, 5.76e23)[0] == pytest.approx(optimum(HOFFMANN, 5.76e23)[0], rel=1e-5)


def test_exponent_of_approach_3():
    found = fit(CHINCHILLA, isoflop(noise=0.002, sizes=12), starts=SOME).parameters
    assert found["beta"] / (found["alpha"] + found["beta"]) == pytest.approx(A, abs=0.01)


def test_outliers_move_the_minimum_less_than_squares():
    """What Huber's terms are for: five runs that broke."""
    points = scattered(60, noise=0.003)
    points["loss"][:5] *= 1.3
    robust, squares = (fit(CHINCHILLA, points, delta, starts=SOME).parameters for delta in (DELTA, np.inf))
    assert abs(robust["E"] - HOFFMANN["E"]) < 0.05 < abs(squares["E"] - HOFFMANN["E"])


def test_two_optimizers_agree_on_least_squares(noisy):
    """The separable search, in the loss, against BFGS from many starts on the same objective."""
    other = separable.least_squares(noisy["N"], noisy["D"], noisy["loss"])
    assert other.optimality < 1e-9 and not other.at_bound

    def squares(theta, x):  # log(L^/L) becomes L^ - L: least squares of the minimizer are then those of the loss
        log_loss, derivatives = CHINCHILLA.log_loss(theta, x)
        loss = np.exp(np.minimum(log_loss, 50))
        return loss, derivatives * loss[:, None]

    theta, value = minimize(squares, noisy.inputs(CHINCHILLA), noisy["loss"], SOME, delta=np.inf, iterations=600)
    best = value.argmin()
    assert 2 * value[best] == pytest.approx(other.squares, rel=1e-8)
    assert dict(zip(CHINCHILLA.parameters, CHINCHILLA.natural(theta[best]), strict=True)) == pytest.approx(
        other.parameters, rel=1e-3
    )


def test_the_separable_search_finds_planted_parameters_and_bounds():
    points = scattered(40)
    found = separable.least_squares(points["N"], points["D"], points["loss"])
    assert found.parameters == pytest.approx(HOFFMANN, rel=1e-5) and not found.at_bound
    without = scattered(40, law=HOFFMANN | dict(E=1e-12))
    found = separable.least_squares(without["N"], without["D"], without["loss"] - 0.2)  # its best E is below 0
    assert found.at_bound and found.parameters["E"] == 0 and found.optimality < 1e-9


def test_nonnegative_least_squares_of_the_grid_are_the_solvers():
    rng = np.random.default_rng(0)
    n, loss = rng.standard_normal(30), 3 + rng.standard_normal(30)
    exponents = np.geomspace(0.05, 2, 4)
    columns = np.exp(-exponents[:, None] * n)
    grid = separable._grid_squares(columns, columns[::-1], loss)
    for i in range(4):
        for j in range(4):
            design = np.stack([np.ones(30), columns[i], columns[3 - j]], 1)
            assert grid[i, j] == pytest.approx(optimize.nnls(design, loss)[1] ** 2, rel=1e-6)


@pytest.mark.parametrize("name", ["kaplan_n", "kaplan_d", "kaplan_c", "kaplan_nd", "kaplan_ns", "gpt4", "pass_rate"])
def test_every_law_is_recovered(name):
    law, rng = LAWS[name], np.random.default_rng(0)
    inputs = {k: np.exp(rng.uniform(np.log(min(INPUTS[k])), np.log(max(INPUTS[k])), 40)) for k in law.inputs}
    points = of_arrays(loss=law.loss(NATURAL[name], **inputs), **inputs)
    found = fit(law, points)
    assert found.parameters == pytest.approx(NATURAL[name], rel=1e-4)
    assert found.scatter < 1e-6


def test_farseer_fits_what_it_made():
    """Its nine parameters are not one-to-one with the losses of few runs, so the losses are compared."""
    law, rng = LAWS["farseer"], np.random.default_rng(0)
    N, D = 10 ** rng.uniform(8, 10, 50), 10 ** rng.uniform(9.5, 11.5, 50)
    points = of_arrays(N=N, D=D, loss=law.loss(NATURAL["farseer"], N=N, D=D))
    found = fit(law, points)
    assert found.scatter < 1e-3
    assert fit(CHINCHILLA, points, starts=SOME).scatter > 2 * found.scatter


def test_a_pinned_parameter_stays():
    points = of_arrays(C=BUDGETS, loss=GPT4.loss(dict(a=30.0, c=1.7, b=-0.06), C=BUDGETS))
    found = fit(GPT4, points, pinned={"c": 1.5})
    assert found.parameters["c"] == pytest.approx(1.5, rel=1e-12) and found.free == 2
    assert found.objective > fit(GPT4, points).objective


def test_pins_of_any_sign():
    """gpt4's exponent is negative as published."""
    points = of_arrays(C=BUDGETS, loss=GPT4.loss(dict(a=30.0, c=1.7, b=-0.06), C=BUDGETS))
    assert number("-0.06", "pin") == -0.06 and numbers({"b": "-0.05"}, GPT4) == {"b": -0.05}
    found = fit(GPT4, points, pinned={"b": -0.06}).parameters
    assert found == pytest.approx(dict(a=30.0, c=1.7, b=-0.06), rel=1e-6)


@pytest.mark.parametrize(
    "name, pinned, said",
    [
        ("gpt4", {"c": -1.0}, "gpt4 cannot have c=-1: a, c > 0"),
        ("kaplan_c", {"C_c": 1e22}, "kaplan_c is not fitted with C_c=1e\\+22 held: pin alpha_C alone, or all of them"),
        ("gpt4", {"b": "x"}, "--pin: 'x' is not a number"),
    ],
)
def test_pins_that_cannot_be_held(name, pinned, said):
    points = of_arrays(C=BUDGETS, loss=[4.0, 3.5, 3.1, 2.9])
    with pytest.raises(InputError, match=said):
        fit(LAWS[name], points, pinned=numbers({key: str(value) for key, value in pinned.items()}, LAWS[name]))


@pytest.mark.parametrize(
    "points, law, said",
    [
        (isoflop(BUDGETS[:1], 5), CHINCHILLA, "5 finished runs are too few for chinchilla, which has 5 parameters: 6"),
        (of_arrays(N=[1e8] * 7, D=np.geomspace(1e9, 1e10, 7), loss=[3.0] * 7), CHINCHILLA, "N has 1 different value"),
        (of_arrays(C=[1e18, 1e18, 1e19, 1e19], loss=[3.0, 3, 2, 2]), GPT4, "C has 2 different values, .* needs 3"),
    ],
)
def test_points_that_cannot_tell(points, law, said):
    with pytest.raises(InputError, match=said):
        fit(law, points)


# --- approaches 1 and 2 -----------------------------------------------------------------------------------


def test_approach_1():
    """16 sizes over 2.5 decades, each at 8 lengths: the envelope's exponent to .01."""
    N, ratio = (grid.ravel() for grid in np.meshgrid(np.geomspace(3e7, 1e10, 16), np.geomspace(1, 400, 8)))
    points = of_arrays(N=N, D=N * ratio, loss=CHINCHILLA.loss(HOFFMANN, N=N, D=N * ratio))
    found = approaches.envelope(points)
    assert found.a == pytest.approx(A, abs=0.01)
    assert found.optimum(1e21)[0] == pytest.approx(optimum(HOFFMANN, 1e21)[0], rel=0.1)
    with pytest.raises(InputError, match="Approach 1 needs 3 sizes"):
        approaches.envelope(isoflop())


# Noise-free budgets 1e17 … 1e21 of 15 sizes, extrapolated to 1e24, with the paper's rounded constants, and exponents
# that are farther apart.
FIVE = np.geomspace(1e17, 1e21, 5)
ROUNDED = dict(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28)
APART = ROUNDED | dict(alpha=0.46, beta=0.15)


@pytest.mark.parametrize(
    "law, span, error",
    [(ROUNDED, 2.0, 0.0033), (ROUNDED, 8.0, 0.0299), (ROUNDED, 16.0, 0.0537), (APART, 2.0, 0.017), (APART, 8.0, 0.162)],
)
def test_approach_2_on_centered_grids(law, span, error):
    """The exponent is exact, N* is not."""
    points = isoflop(FIVE, 15, span, law=law)
    found, _ = approaches.isoflop(points)
    a = law["beta"] / (law["alpha"] + law["beta"])
    assert found.a == pytest.approx(a, abs=1e-4)
    assert found.optimum(1e24)[0] / optimum(law, 1e24)[0] - 1 == pytest.approx(error, abs=5e-4)
    bias = approaches.expected_bias(points, law, 1e24)
    assert bias.centered and bias.a == pytest.approx(found.a - a, abs=1e-9)
    assert bias.N == pytest.approx(error, abs=5e-4)


def test_approach_2_on_a_grid_that_drifts():
    """To 3 times the optimum: the bias is known, and told. At +-2 the last optima are outside of their grids."""
    bias = approaches.expected_bias(isoflop(FIVE, 15, 8.0, drift=2.0, law=APART), APART, 1e24)
    assert not bias.centered and bias.drift > 0.1
    assert bias.a == pytest.approx(-0.0164, abs=5e-4) and bias.N == pytest.approx(-0.089, abs=2e-3)
    curves = approaches.parabolas(isoflop(FIVE, 15, 2.0, drift=2.0, law=APART))
    assert [curve.edge is None for curve in curves] == [True, True, True, False, False]
    slope = np.polyfit(np.log(FIVE), np.log([curve.N for curve in curves]), 1)[0]  # as if they were not left out
    assert slope - 0.15 / 0.61 == pytest.approx(-0.0182, abs=5e-4)


def test_budgets_whose_optimum_is_outside_are_left_out():
    points = isoflop(sizes=9)
    low = points["C"] < 2e18
    keep = points.take(~low | (points["N"] > 1.5 * optimum(HOFFMANN, 1e18)[0]))
    _, curves = approaches.isoflop(keep)
    assert [curve.edge is None for curve in curves][-3:] == [True] * 3
    assert len(curves) == 3 or "grid" in curves[0].edge
    with pytest.raises(InputError, match="Approach 2 needs 2"):
        approaches.isoflop(points.take(low))
