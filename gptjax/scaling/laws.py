"""The laws: formula, source, and log loss with exact derivatives, in the coordinates that they are fitted in.

Loss is in nats per token unless the points say otherwise, N in parameters, D in tokens, C in FLOPs, S in steps. Letters
of shapes here: s = starts or samples that are fitted side by side, n = points, p = parameters.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from gptjax.errors import InputError
from gptjax.model.flops import PF_DAY


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of the loss.

    inputs: the columns of the points that it takes, of N, D, C, S. parameters: as published. bounds: of these.
    log_loss: (theta [s, p], logs of the inputs [inputs, n]) → (log loss [s, n], its derivatives by theta [s, p, n]).
    natural: theta [..., p] → the parameters as published [..., p]; free: the inverse. starts: theta [s, p] to search
    from.
    """

    name: str
    formula: str
    source: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    bounds: str
    log_loss: Callable
    natural: Callable
    free: Callable
    starts: np.ndarray

    def loss(self, parameters: dict[str, float], **inputs) -> np.ndarray:
        """The loss [n] at inputs by name, as N=1e9, D=2e10."""
        theta = self.free(np.array([parameters[name] for name in self.parameters], float))
        x = np.log(np.stack(np.broadcast_arrays(*(np.atleast_1d(inputs[name]) for name in self.inputs))).astype(float))
        return np.exp(self.log_loss(theta[None], x)[0][0])


# --- sums of power laws and a constant --------------------------------------------------------------------


def power_terms(terms: int, constant: bool) -> Callable:
    """log_loss of exp(k_1) / x_1^alpha_1 + … [+ exp(e)], by the log of a sum of exponentials (Hoffmann et al. 2022,
    eq. 3). theta: (k_1, …, [e], alpha_1, …)."""

    def log_loss(theta, x):
        rows = [theta[:, j, None] - theta[:, terms + constant + j, None] * x[j] for j in range(terms)]
        if constant:
            rows.append(np.broadcast_to(theta[:, terms, None], rows[0].shape))
        top = rows[0]
        for row in rows[1:]:
            top = np.maximum(top, row)
        shares = [np.exp(row - top) for row in rows]
        total = sum(shares)
        derivatives = np.empty((*theta.shape, top.shape[1]))
        for j, share in enumerate(shares):
            np.divide(share, total, out=derivatives[:, j])
        for j in range(terms):
            np.multiply(derivatives[:, j], -x[j], out=derivatives[:, terms + constant + j])
        return top + np.log(total), derivatives

    return log_loss


def _logs(count: int):
    """natural and free of parameters whose first `count` are fitted as logs."""

    def natural(theta):
        return np.concatenate([np.exp(theta[..., :count]), theta[..., count:]], -1)

    def free(parameters):
        with np.errstate(divide="ignore"):  # E = 0 is -inf
            return np.concatenate([np.log(parameters[..., :count]), parameters[..., count:]], -1)

    return natural, free


def _critical(count: int):
    """natural and free of terms (x_c / x)^alpha: k = alpha log x_c. Parameters: (x_c, …, alpha, …)."""

    def natural(theta):
        k, alpha = theta[..., :count], theta[..., count:]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return np.concatenate([np.exp(k / alpha), alpha], -1)

    def free(parameters):
        x_c, alpha = parameters[..., :count], parameters[..., count:]
        return np.concatenate([alpha * np.log(x_c), alpha], -1)

    return natural, free


def _grid(*axes) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


_SCALE = np.arange(0.0, 26, 5)
_EXPONENT = np.arange(0.0, 2.1, 0.5)
_IRREDUCIBLE = np.arange(-1.0, 1.1, 0.5)

CHINCHILLA = Law(
    "chinchilla", "L = E + A / N^alpha + B / D^beta", "Hoffmann et al. 2022, eq. 2 and 3, appendix D.3", ("N", "D"),
    ("A", "B", "E", "alpha", "beta"), "E, A, B > 0", power_terms(2, True), *_logs(3),
    _grid(_SCALE, _SCALE, _IRREDUCIBLE, _EXPONENT, _EXPONENT),  # 4,500 starts, appendix D.3
)  # fmt: skip
# The log-parameters that the paper's arXiv source has to more digits than it prints (Besiroglu et al. 2024).
HOFFMANN = dict(A=np.exp(6.0073404), B=np.exp(6.0179186), E=np.exp(0.5267228), alpha=0.33917084, beta=0.2849083)


def _kaplan(name: str, formula: str, where: str, *inputs: str) -> Law:
    letters = [column.lower() for column in inputs]
    parameters = (*(f"{column}_c" for column in inputs), *(f"alpha_{column}" for column in inputs))
    axes = [_SCALE[:4]] * len(letters) + [np.array([0.05, 0.2, 0.7])] * len(letters)
    source = f"Kaplan et al. 2020, {where}"
    bounds = ", ".join(parameters) + " > 0"
    terms = power_terms(len(letters), False)
    return Law(name, formula, source, inputs, parameters, bounds, terms, *_critical(len(letters)), _grid(*axes))


KAPLAN_N = _kaplan("kaplan_n", "L = (N_c / N)^alpha_N", "eq. 1.1", "N")
KAPLAN_D = _kaplan("kaplan_d", "L = (D_c / D)^alpha_D", "eq. 1.2", "D")
KAPLAN_C = _kaplan("kaplan_c", "L = (C_c / C)^alpha_C", "eq. 1.3", "C")
KAPLAN_NS = _kaplan("kaplan_ns", "L = (N_c / N)^alpha_N + (S_c / S_min)^alpha_S", "eq. 1.6", "N", "S")

GPT4 = Law(
    "gpt4", "L = a C^b + c, c the irreducible loss", "OpenAI 2023, §3.1", ("C",), ("a", "c", "b"), "a, c > 0",
    power_terms(1, True), lambda theta: _gpt4(theta, np.exp), lambda parameters: _gpt4(parameters, np.log),
    _grid(np.arange(0.0, 21, 2.5), np.linspace(-2, 1, 7), np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.5])),
)  # fmt: skip
PASS_RATE = Law(
    "pass_rate", "-E[log pass_rate] = alpha C^-k", "OpenAI 2023, §3.2", ("C",), ("alpha", "k"), "alpha > 0",
    power_terms(1, False), *_logs(1), _grid(np.arange(0.0, 26, 5), np.array([0.0, 0.1, 0.3, 0.6])),
)  # fmt: skip


def _gpt4(values, transform):
    """(a, c, b) ↔ (k, e, -b): the exponent is negative as published."""
    with np.errstate(divide="ignore"):
        return np.concatenate([transform(values[..., :2]), -values[..., 2:]], -1)


# --- Kaplan's L(N, D) -------------------------------------------------------------------------------------


def _kaplan_nd(theta, x):
    """log loss of [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D. theta: logs of (N_c, D_c, alpha_N, alpha_D)."""
    log_n, log_d, log_alpha_n, log_alpha_d = (theta[:, j, None] for j in range(4))
    alpha_n, alpha_d = np.exp(log_alpha_n), np.exp(log_alpha_d)
    n, d = alpha_n / alpha_d * (log_n - x[0]), log_d - x[1]
    total = np.logaddexp(n, d)
    of_n, of_d = np.exp(n - total), np.exp(d - total)
    derivatives = np.stack([alpha_n * of_n, alpha_d * of_d, alpha_d * of_n * n, alpha_d * (total - of_n * n)], 1)
    return alpha_d * total, derivatives


KAPLAN_ND = Law(
    "kaplan_nd", "L = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D", "Kaplan et al. 2020, eq. 1.5", ("N", "D"),
    ("N_c", "D_c", "alpha_N", "alpha_D"), "all > 0", _kaplan_nd, np.exp, np.log,
    _grid(np.arange(15.0, 46, 6), np.arange(15.0, 46, 6), np.log([0.05, 0.1, 0.3]), np.log([0.05, 0.1, 0.3])),
)  # fmt: skip


# --- Farseer ----------------------------------------------------------------------------------------------

_FARSEER_UNIT = np.log(1e9)  # N is taken in billions while fitting: N^q of both signs stay near 1


def _farseer(theta, x):
    """log loss of exp(s N^q + S) + exp(B N^b + Q) D^-exp(A N^a + E). theta: (s, q, S, B, b, Q, A, a, E), N in 1e9."""
    s, q, S, B, b, Q, A, a, E = (theta[:, j, None] for j in range(9))
    log_n, log_d = x[0] - _FARSEER_UNIT, x[1]
    with np.errstate(over="ignore", invalid="ignore"):
        powers = [np.exp(np.minimum(exponent * log_n, 50)) for exponent in (q, b, a)]
        exponent = np.exp(np.minimum(A * powers[2] + E, 50))
        u, v = s * powers[0] + S, B * powers[1] + Q - exponent * log_d
        total = np.logaddexp(u, v)
        of_u, of_v = np.exp(u - total), np.exp(v - total)
        of_a = -of_v * exponent * log_d
        columns = [of_u * powers[0], of_u * s * powers[0] * log_n, of_u, of_v * powers[1], of_v * B * powers[1] * log_n,
                   of_v, of_a * powers[2], of_a * A * powers[2] * log_n, of_a]  # fmt: skip
    return total, np.stack(columns, 1)


def _billions(values, sign):
    """s, B and A for N in parameters (sign -1), or for N in billions (+1)."""
    values = np.array(values, float)
    for scale, exponent in ((0, 1), (3, 4), (6, 7)):
        values[..., scale] = values[..., scale] * np.exp(sign * values[..., exponent] * _FARSEER_UNIT)
    return values


FARSEER = Law(
    "farseer", "L = exp(s N^q + S) + exp(B N^b + Q) D^-exp(A N^a + E)",
    "Li et al. 2025, Farseer (arXiv 2506.10972): L = E + U(N) + B(N) D^-A(N), its exponential form", ("N", "D"),
    ("s", "q", "S", "B", "b", "Q", "A", "a", "E"), "none", _farseer,
    lambda theta: _billions(theta, -1), lambda parameters: _billions(parameters, 1),
    _grid([-0.3, 0.3], [-0.2, 0.2], [0.5], [-2.0, 2.0, 6.0], [-0.1, 0.1], [4.0, 7.0], [-0.5, 0.0, 0.2], [-0.1, 0.1],
          [-1.2, -0.8]),
)  # fmt: skip

LAWS = {law.name: law for law in (CHINCHILLA, FARSEER, GPT4, PASS_RATE, KAPLAN_N, KAPLAN_D, KAPLAN_C, KAPLAN_ND,
                                  KAPLAN_NS)}  # fmt: skip


# --- Kaplan's published figures ---------------------------------------------------------------------------

# §1.2 and Table 5 (headline), Table 2 (the joint fits). Nats per token of WebText2, N without embeddings.
KAPLAN = {
    "kaplan_n": dict(N_c=8.8e13, alpha_N=0.076),
    "kaplan_d": dict(D_c=5.4e13, alpha_D=0.095),
    "kaplan_c": dict(C_c=3.1e8 * PF_DAY, alpha_C=0.050),  # of C_min
    "kaplan_nd": dict(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103),  # Table 2
    "kaplan_ns": dict(N_c=6.5e13, S_c=2.1e3, alpha_N=0.077, alpha_S=0.76),  # Table 3
}
B_CRIT = dict(B_star=2e8, alpha_B=0.21)  # §1.2; Table 5 has 2.1e8


def critical_batch(loss, B_star: float = B_CRIT["B_star"], alpha_B: float = B_CRIT["alpha_B"]):
    """B_crit in tokens at a loss in nats per token: B* / L^(1/alpha_B) (Kaplan et al. 2020, eq. 1.4)."""
    return B_star / np.power(loss, 1 / alpha_B)


def minimum_steps(steps, batch, loss):
    """S_min = S / (1 + B_crit(L) / B): the steps that a batch far above critical would have taken (eq. 5.4)."""
    return steps / (1 + critical_batch(loss) / batch)


def minimum_compute(compute, batch, loss):
    """C_min = C / (1 + B / B_crit(L)): the compute that a batch far below critical would have taken (eq. 5.5)."""
    return compute / (1 + batch / critical_batch(loss))


# --- compute-optimal training -----------------------------------------------------------------------------


def optimum(parameters, compute):
    """(N*, D*) that minimize Chinchilla's law under C = 6 N D (Hoffmann et al. 2022, eq. 4).

    N* = G (C/6)^a, D* = (C/6)^b / G with G = (alpha A / (beta B))^(1/(alpha+beta)), a = beta/(alpha+beta), b = 1 - a.
    parameters: A, B, alpha, beta, each a number or an array [s]; nan where an exponent is not positive.
    """
    A, B, alpha, beta = (np.asarray(parameters[name], float) for name in ("A", "B", "alpha", "beta"))
    with np.errstate(all="ignore"):
        sound = (alpha > 0) & (beta > 0)
        scale = np.where(sound, (np.log(alpha * A) - np.log(beta * B)) / (alpha + beta), np.nan)
        log_n = scale + beta / (alpha + beta) * np.log(compute / 6)
        return np.exp(log_n), compute / 6 / np.exp(log_n)


def mean_negative_log(pass_rates) -> float:
    """-E[log pass_rate] over problems (OpenAI 2023, §3.2). InputError: a problem that was never solved."""
    rates = np.asarray(pass_rates, float)
    if not (rates > 0).all() or not (rates <= 1).all():
        raise InputError(
            f"Problem {int(np.argmin((rates > 0) & (rates <= 1)))} has a pass rate outside (0, 1]: its log is not "
            "finite. Sample more often, or leave the problem out for every model."
        )
    return float(-np.log(rates).mean())
