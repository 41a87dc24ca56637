# ruff: noqa: F811 (fixtures)
"""Intervals of fitted laws: what the bootstrap draws, that they cover, when there is none; the profile likelihood."""

import numpy as np
import pytest
from scaling_points import BUDGETS, GPT4_TRUTH, isoflop, of_compute, of_kaplan, scattered
from scipy import stats
from test_scaling_fit import SOME
from test_scaling_forecast import SIX, found, theta  # noqa: F401 (fixtures)

from gptjax.errors import InputError
from gptjax.scaling import bootstrap, forecast
from gptjax.scaling import fit as fit_command
from gptjax.scaling.fitting import fit
from gptjax.scaling.laws import CHINCHILLA, GPT4, HOFFMANN, KAPLAN, KAPLAN_ND, optimum
from gptjax.scaling.points import of_arrays


def test_bootstrap_is_that_of_separate_fits(found, theta):
    """Three of its samples, fitted again from many starts to the same losses."""
    x, losses = found.points.inputs(CHINCHILLA), np.exp(bootstrap.resampled(found, 400))
    for i in (0, 100, 399):
        again = fit(CHINCHILLA, of_arrays(N=found.points["N"], D=found.points["D"], loss=losses[i]), starts=SOME)
        here = CHINCHILLA.log_loss(theta[i][None], x)[0]
        assert again.log_loss(found.points.columns) == pytest.approx(here[0], abs=2e-4)


def test_intervals_hold_the_truth_and_the_estimate(found, theta):
    intervals = bootstrap.parameter_intervals(found, theta)
    for name, (low, high) in intervals.items():
        assert low < found.parameters[name] < high, name
    best = bootstrap.optimum_intervals(found, theta, 1e21)
    assert best["N"]["low"] < best["N"]["value"] < best["N"]["high"]
    assert best["N"]["value"] * best["D"]["value"] * 6 == pytest.approx(1e21)
    exponents = bootstrap.exponent_intervals(found, theta)
    assert exponents["a"]["value"] + exponents["b"]["value"] == pytest.approx(1)
    assert exponents["a"]["low"] + exponents["b"]["high"] == pytest.approx(1)


def test_the_points_that_a_fit_meets_are_no_draws_of_noise():
    """With delta far below the noise the fit meets 5 points of 60; the noise that is drawn is that of the others, of
    either sign."""
    start = CHINCHILLA.free(np.array([HOFFMANN[name] for name in CHINCHILLA.parameters]))
    found = fit(CHINCHILLA, scattered(60, noise=0.02), starts=start)
    sizes = np.sort(np.abs(found.residuals))
    assert sizes[4] < 0.05 * found.scatter
    drawn = bootstrap.resampled(found, 500) - found.log_loss(found.points.columns)
    assert len(np.unique(np.abs(drawn).round(12))) == 55
    assert len(np.unique(drawn.round(12))) == 110 and abs(drawn.mean()) < 0.05 * found.scatter
    slopes = CHINCHILLA.log_loss(found.theta[None], found.points.inputs(CHINCHILLA))[1][0].T
    leverage = (np.linalg.qr(slopes / np.linalg.norm(slopes, axis=0))[0] ** 2).sum(1)
    expected = np.sort(np.abs(found.residuals) / np.sqrt(1 - leverage))[5:]
    assert np.unique(np.abs(drawn).round(12)) == pytest.approx(expected, rel=1e-6)


def test_samples_that_have_failed_are_counted_and_many_are_no_interval():
    samples = np.r_[np.arange(1000.0), np.full(20, np.nan)]
    assert bootstrap.interval(samples) == pytest.approx((49.95, 949.05)) and bootstrap.failed(samples) == 20 / 1020
    assert np.isnan(bootstrap.interval(np.r_[samples, np.full(40, np.nan)])).all()


def test_an_interval_without_samples_is_told(found, theta):
    """Where an exponent may be 0 there is no optimum; where no sample has a loss, no forecast."""
    few, many = theta.copy(), theta.copy()
    few[:8, 3], many[:40, 3] = -0.1, -0.1  # alpha, of 400
    row = bootstrap.optimum_intervals(found, few, 1e21)["N"]
    assert row["failed"] == 0.02 and "without the 2 % of the samples that have no optimum" in fit_command._range(row)
    for row in (bootstrap.optimum_intervals(found, many, 1e21)["N"], bootstrap.exponent_intervals(found, many)["a"]):
        assert np.isnan([row["low"], row["high"]]).all() and row["failed"] == 0.1
        assert fit_command._range(row) == "no interval: 10 % of the samples have no optimum"
    many[:40] = np.nan
    with pytest.raises(InputError, match="10 % of the bootstrap's samples have no loss at the target"):
        forecast.predict(found, {"N": 1e9, "D": 1e10}, many)


def test_leverage_adds_up_to_the_parameters(found):
    assert bootstrap._leverage(found, found.points.inputs(CHINCHILLA)).sum() == pytest.approx(5, abs=1e-6)


def test_profile_of_a_line_is_students_interval():
    """log L = k - alpha log x is a linear model: the exact interval is known."""
    from gptjax.scaling.laws import PASS_RATE

    rng = np.random.default_rng(0)
    compute = np.geomspace(1e18, 1e22, 12)
    loss = PASS_RATE.loss(dict(alpha=2e3, k=0.2), C=compute) * np.exp(0.05 * rng.standard_normal(12))
    found = fit(PASS_RATE, of_arrays(C=compute, loss=loss), delta=np.inf)
    x = np.log(compute)
    error = np.sqrt((found.residuals**2).sum() / 10 / ((x - x.mean()) ** 2).sum())
    k, half = found.parameters["k"], stats.t.ppf(0.95, 10) * error
    assert bootstrap.profile(found, "k") == pytest.approx((k - half, k + half), rel=1e-4)


def test_profile_where_nothing_is_determined():
    """Runs that do not show an irreducible loss: its lower end is 0."""
    points = of_arrays(C=BUDGETS, loss=GPT4.loss(dict(a=60.0, c=1e-9, b=-0.07), C=BUDGETS) * [1.01, 0.99, 1.01, 0.99])
    low, high = bootstrap.profile(fit(GPT4, points), "c")
    assert low < 1e-3 < high


def test_ill_determined_parameters_are_named():
    assert bootstrap.ill_determined({"A": (1.0, 11.0), "b": (-1.0, 1.0), "E": (1.0, 9.0)}) == ["A", "b"]


TRUTHS = {
    "isoflop": (CHINCHILLA, HOFFMANN, lambda seed: isoflop(SIX, 8, noise=0.005, seed=seed)),
    "scattered": (CHINCHILLA, HOFFMANN, lambda seed: scattered(60, 0.01, seed)),
    "kaplan_nd": (KAPLAN_ND, KAPLAN["kaplan_nd"], lambda seed: of_kaplan(40, 0.01, seed)),
    "gpt4": (GPT4, GPT4_TRUTH, lambda seed: of_compute(16, 0.002, seed)),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long if name == "kaplan_nd" else pytest.mark.slow) for name in TRUTHS
])  # fmt: skip
def test_intervals_cover_nine_of_ten(name):
    """200 sets of each law and design: the share whose 90 % interval holds the truth, of every parameter and of N*. Of
    100 samples the quantiles are a little narrow, by 1 or 2 % of the sets."""
    law, truth, points_of = TRUTHS[name]
    truth = truth | ({"N": optimum(truth, 1e22)[0]} if law is CHINCHILLA else {})
    covered, start = dict.fromkeys(truth, 0), law.free(np.array([truth[p] for p in law.parameters]))
    for seed in range(200):
        found = fit(law, points_of(seed), starts=start)
        theta = bootstrap.bootstrap(found, 100, seed)
        intervals = bootstrap.parameter_intervals(found, theta)
        if law is CHINCHILLA:
            best = bootstrap.optimum_intervals(found, theta, 1e22)["N"]
            intervals["N"] = best["low"], best["high"]
        for p, (low, high) in intervals.items():
            covered[p] += low <= truth[p] <= high
    assert all(170 <= count <= 190 for count in covered.values()), covered
