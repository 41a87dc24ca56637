"""Plan a compute budget: parameters and tokens, batch and learning rate, and which next run would narrow them most.

    python -m gptjax.scaling.plan --compute=1e21 --law=runs/isoflop/law.json [--rates=runs/rates/results.jsonl] [--json]

N* and D* are Chinchilla's (fit --law=chinchilla) with 90 % intervals; batch and learning rate are published rules at
them, each named, and with --rates the best learning rates of a sweep, continued to N*. Where the loss is in nats per
token, a batch's steps and compute are compared with the least that any batch needs (Kaplan et al. 2020, eq. 5.4, 5.5).
The loss has the interval of a forecast (predict): widened by what earlier forecasts from these points got wrong. The
intervals of N* and D* are of the bootstrap alone: they are right where the law is. The next runs are ranked by how much
a run that ends where the law says would narrow N*.
"""

import math

import numpy as np
from absl import flags

from gptjax import command_line, json_files
from gptjax.errors import InputError
from gptjax.scaling import law_file
from gptjax.scaling.bootstrap import bootstrap, exponent_intervals, optimum_intervals
from gptjax.scaling.fitting import Fit
from gptjax.scaling.forecast import Forecast, earlier, predict
from gptjax.scaling.laws import LAWS, critical_batch, minimum_compute, minimum_steps, optimum
from gptjax.scaling.learning_rate import RateRule, fit_rate
from gptjax.scaling.points import read

# Brown et al. 2020, Table 2.1: parameters, batch in tokens, learning rate.
GPT3 = ((125e6, 0.5e6, 6e-4), (350e6, 0.5e6, 3e-4), (760e6, 0.5e6, 2.5e-4), (1.3e9, 1e6, 2e-4), (2.7e9, 1e6, 1.6e-4),
        (6.7e9, 2e6, 1.2e-4), (13e9, 2e6, 1e-4), (175e9, 3.2e6, 0.6e-4))  # fmt: skip
SPAN = np.array([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8])  # sizes of next runs, over N* of their compute


def gpt3_rule(N) -> tuple[float, float]:
    """(batch in tokens, learning rate) by Table 2.1, between its rows by a straight line in logs; its ends beyond."""
    sizes, batches, rates = np.log(np.array(GPT3)).T
    at = np.log(N)
    return float(np.exp(np.interp(at, sizes, batches))), float(np.exp(np.interp(at, sizes, rates)))


def deepseek_rule(compute) -> tuple[float, float]:
    """(batch in tokens, learning rate): .2920 C^.3271 and .3118 C^-.1250 (Bi et al. 2024, DeepSeek LLM, eq. 1)."""
    return 0.2920 * compute**0.3271, 0.3118 * compute**-0.1250


def plan(made: dict, found: Fit, compute: float, samples: int = 1000, rates: RateRule | None = None) -> dict:
    """The plan as JSON types."""
    theta = bootstrap(found, samples)
    best = optimum_intervals(found, theta, compute)
    run = {"N": best["N"]["value"], "D": best["D"]["value"], "C": compute}
    loss = predict(found, run, theta, earlier(found)[1])
    measured = [own_rule(rates, best["N"])] if rates is not None else []
    return {
        "compute": compute, "beyond": compute / float(found.points["C"].max()), **best,
        **exponent_intervals(found, theta),
        "loss": {"value": loss.loss, "low": loss.low, "high": loss.high, "widening": loss.widening},
        "rules": rules(made["metric"], best, compute, loss) + measured, "next_runs": next_runs(found, theta, compute),
    }  # fmt: skip


def rules(metric: str | None, best: dict, compute: float, loss: Forecast) -> list[dict]:
    """Published rules for the batch (tokens) and learning rate at N*: {rule, batch, learning_rate}, each an interval.
    Of a loss in nats per token also {steps, over_least_steps, over_least_compute} of each batch."""
    of_gpt3 = [gpt3_rule(best["N"][end]) for end in ("value", "low", "high")]
    deepseek = deepseek_rule(compute)
    found = [
        {"rule": "GPT-3, Table 2.1, at N*", "batch": _interval(*(e[0] for e in of_gpt3)),
         "learning_rate": _interval(*(e[1] for e in of_gpt3))},
        {"rule": "DeepSeek LLM, eq. 1, of C", "batch": _interval(*[deepseek[0]] * 3),
         "learning_rate": _interval(*[deepseek[1]] * 3)},
    ]  # fmt: skip
    if metric in (None, "nats/token"):
        losses = (loss.loss, loss.high, loss.low)  # the batch falls with the loss
        batch = _interval(*map(critical_batch, losses))
        found.append({"rule": "Kaplan, eq. 1.4: critical batch at the loss", "batch": batch})
        for rule in found:
            batch = rule["batch"]["value"]
            steps = best["D"]["value"] / batch
            rule |= {"steps": steps, "over_least_steps": float(steps / minimum_steps(steps, batch, loss.loss)),
                     "over_least_compute": float(compute / minimum_compute(compute, batch, loss.loss))}  # fmt: skip
    return found


def own_rule(rates: RateRule, N: dict) -> dict:
    """The best learning rate of a sweep, continued to N*, in the form of `rules`."""
    sizes = f"{rates.sizes.min():.3g} to {rates.sizes.max():.3g}"
    return {
        "rule": f"sweep over learning rates, N {sizes}: {rates.a:.3g} N^{rates.b:.3g}, at N*",
        "learning_rate": _interval(*(rates(N[end]) for end in ("value", "low", "high"))), "left_out": rates.left_out,
    }  # fmt: skip


def _interval(value, *ends):
    return {"value": float(value), "low": float(min(ends)), "high": float(max(ends))}


def next_runs(found: Fit, theta, compute: float) -> list[dict]:
    """Of each compute up to the target's, the run that narrows log N*(compute) most: {N, D, C, narrows}.

    narrows: the interval's width after it over the width now. By the law's derivatives g at the run and h of log N* at
    the fit, and the bootstrap's covariance V of the parameters: h'Vh falls by (h'Vg)^2 / (s^2 + g'Vg).
    """
    V = _covariance(theta)
    h = _derivative_of_optimum(found, compute)
    now = h @ V @ h
    largest = float(found.points["C"].max())
    rows = []
    for budget in (c for c in largest * np.array([0.1, 1.0, 3.0, 10.0, 30.0]) if c < compute):
        N = optimum(found.parameters, budget)[0] * SPAN
        x = np.log(np.stack([N, budget / (6 * N)]))
        g = found.law.log_loss(found.theta[None], x)[1][0].T
        # at the largest or smallest sizes the law's errors, too, are largest: this is of noise alone
        fall = (g @ V @ h) ** 2 / (found.scatter**2 + np.einsum("np,pq,nq->n", g, V, g))
        i = int(fall.argmax())
        rows.append({"N": float(N[i]), "D": float(budget / (6 * N[i])), "C": float(budget),
                     "narrows": float(math.sqrt(max(now - fall[i], 0) / now))})  # fmt: skip
    return rows


def _covariance(theta):
    """Of the samples [s, p], those in the farthest 2 % of any parameter left out: a few run away."""
    low, high = np.quantile(theta, [0.01, 0.99], axis=0)
    return np.cov(theta[((theta >= low) & (theta <= high)).all(1)].T)


def _derivative_of_optimum(found: Fit, compute: float):
    """d log N* / d theta, by central differences."""
    names, steps = found.law.parameters, 1e-5 * np.eye(len(found.theta))
    log_n = lambda theta: np.log(optimum(dict(zip(names, found.law.natural(theta), strict=True)), compute)[0])
    return np.array([(log_n(found.theta + step) - log_n(found.theta - step)) / 2e-5 for step in steps])


def text(made: dict) -> str:
    """A plan for people."""
    show = lambda row, form="{:.3g}": f"{form} ({form} to {form})".format(row["value"], row["low"], row["high"])
    lines = [
        f"compute {made['compute']:.3g} FLOPs, {made['beyond']:.3g} times the largest fitted",
        f"  N* {show(made['N'])}", f"  D* {show(made['D'])}", f"  tokens per parameter {show(made['D_per_N'])}",
        f"  loss {show(made['loss'], '{:.4f}')}, widened {made['loss']['widening']:.2f} times by earlier forecasts",
        "  the intervals of N* and D* are of sampling alone, if the law holds", "", "batch in tokens, learning rate:",
    ]  # fmt: skip
    for rule in made["rules"]:
        values = ", ".join(show(rule[key]) for key in ("batch", "learning_rate") if key in rule)
        lines.append(f"  {rule['rule']}: {values}")
        if "steps" in rule:
            lines.append(f"    {rule['steps']:,.0f} steps, {rule['over_least_steps']:.2f} times the least; "
                         f"{rule['over_least_compute']:.2f} times the least compute")  # fmt: skip
        lines += [f"    {sentence}" for sentence in rule.get("left_out", ())]
    if made["next_runs"]:
        lines += ["", "next runs, and how wide the interval of N* would be after each:"]
    for run in made["next_runs"]:
        lines.append(f"  C {run['C']:.3g}: N {run['N']:.3g}, D {run['D']:.3g}: {100 * run['narrows']:.0f} %")
    return "\n".join(lines)


def main(_):
    made, _ = law_file.load(FLAGS.law)
    law_file.chinchilla_only(LAWS[made["law"]], "A plan")
    rates = FLAGS.rates and fit_rate(read(FLAGS.rates))
    planned = plan(made, law_file.reopen(made), FLAGS.compute, rates=rates)
    if not all(np.isfinite([planned["N"]["low"], planned["N"]["high"]])):
        raise InputError("N* has no finite interval: the fitted exponents are not positive. Add runs of more budgets.")
    print(json_files.dumps(planned) if FLAGS.json else text(planned))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("law", None, "law.json of --law=chinchilla.", required=True)
    command_line.define_path("rates", None, "results.jsonl of a sweep over learning rates; also any such table.")
    flags.DEFINE_float("compute", None, "FLOPs to plan for.", lower_bound=1, required=True)
    flags.DEFINE_bool("json", False, "One JSON object.")
    command_line.run(main)
