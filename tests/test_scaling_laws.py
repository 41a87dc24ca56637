"""The laws against the papers' figures, and their derivatives against differences."""

import numpy as np
import pytest
from scaling_points import rates

from gptjax.errors import InputError
from gptjax.model.flops import PF_DAY
from gptjax.scaling import laws
from gptjax.scaling.laws import HOFFMANN, KAPLAN, LAWS, critical_batch, minimum_compute, minimum_steps, optimum
from gptjax.scaling.learning_rate import fit_rate
from gptjax.scaling.points import of_arrays

NATURAL = {  # parameters of every law at which it is in its range
    "chinchilla": HOFFMANN,
    "gpt4": dict(a=30.0, c=1.7, b=-0.06),
    "pass_rate": dict(alpha=2e3, k=0.2),
    "farseer": dict(s=-0.021, q=0.169, S=0.091, B=88.01, b=-0.1, Q=-6.287, A=-0.124, a=0.123, E=0.424),
    **KAPLAN,
}
INPUTS = dict(N=[1e7, 3e8, 2e9, 7e10], D=[2e9, 1e9, 4e10, 1e12], C=[1e17, 1e19, 3e20, 1e23], S=[1e3, 3e4, 2e5, 1e5])


def at(law):
    return {name: np.array(INPUTS[name]) for name in law.inputs}


# Kaplan et al. 2020: the paper's constants, evaluated by hand.
@pytest.mark.parametrize(
    "law, parameters, inputs, loss",
    [
        ("kaplan_n", KAPLAN["kaplan_n"], dict(N=1.5e9), 2.30355),
        ("kaplan_d", KAPLAN["kaplan_d"], dict(D=22e9), 2.09917),
        ("kaplan_c", KAPLAN["kaplan_c"], dict(C=PF_DAY), 2.65808),
        ("kaplan_nd", KAPLAN["kaplan_nd"], dict(N=1e8, D=1e9), 2.95673),
        ("kaplan_nd", dict(N_c=8.8e13, D_c=5.4e13, alpha_N=0.076, alpha_D=0.095), dict(N=1e8, D=1e9), 3.01503),
    ],
)
def test_kaplan(law, parameters, inputs, loss):
    assert LAWS[law].loss(parameters, **inputs)[0] == pytest.approx(loss, rel=1e-4 / 2)


def test_kaplan_of_steps_is_the_sum_of_its_terms():
    expected = (6.5e13 / 1e9) ** 0.077 + (2.1e3 / 1e5) ** 0.76
    assert LAWS["kaplan_ns"].loss(KAPLAN["kaplan_ns"], N=1e9, S=1e5)[0] == pytest.approx(expected, rel=1e-12)


def test_laws_as_they_are_written():
    """OpenAI 2023, §3.1, whose exponent is negative, and Hoffmann et al. 2022, eq. 2, by plain powers."""
    assert LAWS["gpt4"].loss(NATURAL["gpt4"], C=1e20)[0] == pytest.approx(30.0 * 1e20**-0.06 + 1.7, rel=1e-12)
    p, N, D = HOFFMANN, 3e8, 2e10
    expected = p["E"] + p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"]
    assert LAWS["chinchilla"].loss(p, N=N, D=D)[0] == pytest.approx(expected, rel=1e-12)


def test_critical_batch():
    assert critical_batch(3.0) == pytest.approx(1.0691e6, rel=1e-4)
    assert critical_batch(3.0, 2.1e8) == pytest.approx(1.1226e6, rel=1e-4)
    batch = critical_batch(3.0)  # at the critical batch, twice the least steps and twice the least compute
    assert minimum_steps(1000, batch, 3.0) == pytest.approx(500)
    assert minimum_compute(8.0, batch, 3.0) == pytest.approx(4)


def test_best_learning_rates_of_a_sweep():
    rule = fit_rate(rates())
    assert rule.a == pytest.approx(3.0, rel=1e-6) and rule.b == pytest.approx(-0.4, rel=1e-6)
    assert rule(1e9) == pytest.approx(3.0 * 1e9**-0.4, rel=1e-5) and not rule.left_out


def test_a_size_whose_best_rate_is_at_the_edge_is_left_out():
    rule = fit_rate(rates(sizes=(1e6, 4e6, 1.6e7, 1e12)))
    assert len(rule.sizes) == 3 and "1e+12: the best rate is at the edge" in rule.left_out[0]
    assert rule.b == pytest.approx(-0.4, rel=1e-6)


@pytest.mark.parametrize(
    "sweep, says",
    [
        (of_arrays(N=[1e6, 2e6], D=[1e7, 2e7], loss=[3.0, 2.9]), "has no column of learning rates"),
        (rates(grid=[1e-3, 2e-3]), "three learning rates: sweep over optimizer.learning_rate"),
        (rates(sizes=[1e6]), "best learning rate of two sizes, and the points has 1"),
    ],
)  # fmt: skip
def test_a_sweep_without_a_rule_for_the_rate(sweep, says):
    with pytest.raises(InputError, match=says):
        fit_rate(sweep)


def test_hoffmann_optimum():
    """Their Table 3's 40B at Gopher's compute, from the unrounded parameters."""
    N, D = optimum(HOFFMANN, 5.76e23)
    assert N == pytest.approx(4.04e10, rel=2e-3) and 6 * N * D == pytest.approx(5.76e23, rel=1e-12)
    around = N * np.exp(np.linspace(-0.5, 0.5, 10_001))  # no other size at this compute is better
    losses = LAWS["chinchilla"].loss(HOFFMANN, N=around, D=5.76e23 / (6 * around))
    assert around[losses.argmin()] == pytest.approx(N, rel=2e-4)


def test_an_exponent_that_is_not_positive_has_no_optimum():
    assert np.isnan(optimum(HOFFMANN | dict(alpha=-0.1), 1e21)[0])


def test_pass_rate():
    problems = [0.5, 0.25, 1.0]
    assert laws.mean_negative_log(problems) == pytest.approx(np.log(8) / 3)
    assert LAWS["pass_rate"].loss(dict(alpha=3.0, k=0.5), C=100.0)[0] == pytest.approx(0.3)
    with pytest.raises(InputError, match="Problem 1 .*Sample more"):
        laws.mean_negative_log([0.5, 0.0])


def test_farseer_as_it_is_written():
    """arXiv 2506.10972: L = exp(s N^q + S) + exp(B N^b + Q) D^-exp(A N^a + E), by plain powers of N."""
    p, N, D = NATURAL["farseer"], 3e8, 2e10
    expected = np.exp(p["s"] * N ** p["q"] + p["S"])
    expected += np.exp(p["B"] * N ** p["b"] + p["Q"]) * D ** -np.exp(p["A"] * N ** p["a"] + p["E"])
    assert LAWS["farseer"].loss(p, N=N, D=D)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_derivatives_are_exact(name):
    law = LAWS[name]
    theta = law.free(np.array([NATURAL[name][p] for p in law.parameters]))[None]
    assert law.natural(theta)[0] == pytest.approx([NATURAL[name][p] for p in law.parameters], rel=1e-12)
    x = np.log(np.stack(list(at(law).values())))
    _, derivatives = law.log_loss(theta, x)
    for i in range(theta.shape[1]):
        step = 1e-5 * max(abs(theta[0, i]), 0.1) * np.eye(theta.shape[1])[i]
        difference = (law.log_loss(theta + step, x)[0] - law.log_loss(theta - step, x)[0]) / (2 * step[i])
        assert derivatives[:, i] == pytest.approx(difference, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_starts_are_in_a_laws_coordinates(name):
    law = LAWS[name]
    assert law.starts.shape[1] == len(law.parameters)
    assert len(law.starts) == (4500 if name == "chinchilla" else len(law.starts)) <= 4500
