"""law.json: a fitted law with its intervals, what it was fitted to, and what is to be said against it."""

import contextlib
import dataclasses
import hashlib
import json
import os

import numpy as np

from gptjax import json_files, paths
from gptjax.errors import InputError
from gptjax.scaling import approaches, separable
from gptjax.scaling.bootstrap import (
    LEVEL,
    bootstrap,
    exponent_intervals,
    ill_determined,
    interval,
    optimum_intervals,
    parameter_intervals,
    profile,
    resampled,
)
from gptjax.scaling.fitting import Fit, fit
from gptjax.scaling.laws import CHINCHILLA, GPT4, LAWS, Law
from gptjax.scaling.optimize import minimize
from gptjax.scaling.points import Points, read

RESAMPLED = 400  # sets of losses, for the intervals of approaches 1 and 2
OUTLIER = 5.0  # robust standard deviations


def record(found: Fit, samples: int, read_with: dict, compute: list[float]) -> dict:
    """Everything of law.json. read_with: the columns and where that the points were read with. compute: budgets to
    give the optimum of."""
    law, points = found.law, found.points
    theta = bootstrap(found, samples)
    intervals = parameter_intervals(found, theta)
    parameters = {name: {"value": value, "low": intervals[name][0], "high": intervals[name][1]}
                  for name, value in found.parameters.items()}  # fmt: skip
    if law in (CHINCHILLA, GPT4):
        for name in ill_determined({k: v for k, v in intervals.items() if k not in found.pinned}):
            parameters[name]["profile"] = profile(found, name)
    made = {
        "law": law.name, "formula": law.formula, "source": law.source, "bounds": law.bounds, "parameters": parameters,
        "pinned": {name: found.parameters[name] for name in found.pinned}, "level": LEVEL, "samples": samples,
        "objective": found.objective, "delta": found.delta, "starts_at_optimum": found.reached, "runs": len(points),
        "free": found.free, "scatter": found.scatter, "metric": points.metric, "tokenizer": points.tokenizer,
        "count": points.count, "rule": points.rule, "left_out": points.left_out,
        "points": {"path": _absolute(points.path), "sha256": points.sha256, **read_with},
    }  # fmt: skip
    flags = _flags(found)
    if law is CHINCHILLA:
        squares = separable.least_squares(points["N"], points["D"], points["loss"])
        largest = float(points["C"].max())
        made["exponents"] = exponent_intervals(found, theta)
        made["optima"] = [{"C": c} | optimum_intervals(found, theta, c) for c in compute or [largest]]
        made["least_squares"] = squares.parameters | {
            "squares": squares.squares, "optimality": squares.optimality, "minima": squares.minima,
            "at_bound": squares.at_bound, "objective_from_there": from_least_squares(found, squares),
            "difference": separable.parameters_agree(squares, found.parameters, largest),
        }  # fmt: skip
        made |= _approaches(found, (compute or [largest])[-1], flags)
    if law is GPT4:
        made["sensitivity"] = sensitivity(found, compute or [10 * float(points["C"].max())])
    return made | {"flags": flags}


def _absolute(path: str) -> str:
    return path if not path or paths.is_remote(path) else os.path.abspath(paths.expand(path))


def from_least_squares(found: Fit, squares: separable.LeastSquares) -> float:
    """The fit's own objective at the minimum that is reached from the least-squares solution alone."""
    x, y = found.points.inputs(found.law), np.log(found.points["loss"])
    start = found.law.free(np.array([squares.parameters[name] for name in found.law.parameters]))
    return float(minimize(found.law.log_loss, x, y, np.maximum(start, -30), delta=found.delta)[1][0])


def _approaches(found: Fit, compute: float, flags: list[str]) -> dict:
    """approach_1 and approach_2, each with its a and N*, or why it cannot be used."""
    made, points, drawn = {}, found.points, np.exp(resampled(found, RESAMPLED))
    try:
        made["approach_1"] = _frontier(approaches.envelope, points, compute, drawn)
    except InputError as error:
        made["approach_1"] = {"unusable": str(error)}
    try:
        curves = approaches.parabolas(points)
        flags += [f"Budget {p.compute:.3g}: {p.edge}; it is left out of approach 2." for p in curves if p.edge]
        made["approach_2"] = _frontier(lambda of: approaches.isoflop(of)[0], points, compute, drawn)
        bias = approaches.expected_bias(points, found.parameters, compute)
        made["approach_2"] |= {"expected_bias_a": bias.a, "expected_bias_N": bias.N, "drift": bias.drift,
                               "centered": bias.centered, "off_center": [p.off_center for p in curves]}  # fmt: skip
    except InputError as error:
        made.setdefault("approach_2", {"unusable": str(error)})
    return made


def _frontier(approach, points: Points, compute: float, drawn: np.ndarray) -> dict:
    """a with its interval, over losses [samples, n] drawn anew (those where the approach fails left out), and N*."""
    best, sampled = approach(points), []
    for loss in drawn:
        with contextlib.suppress(InputError):
            sampled.append(approach(dataclasses.replace(points, columns=points.columns | {"loss": loss})).a)
    low, high = interval(sampled or [np.nan])
    return {"a": best.a, "low": low, "high": high, "C": compute, "N": float(best.optimum(compute)[0])}


def _flags(found: Fit) -> list[str]:
    """What a reader of the law should know, a sentence each."""
    flags, residuals = [], found.residuals
    spread = 1.4826 * float(np.median(np.abs(residuals - np.median(residuals))))
    for i in np.flatnonzero(np.abs(residuals) > max(OUTLIER * spread, 1e-6)):
        flags.append(f"Run {found.points.names[i]} is {100 * np.expm1(residuals[i]):+.1f} % off the law, more than "
                     f"{OUTLIER:g} times the usual: was it trained to the end?")  # fmt: skip
    if found.points.rule == "exact" and found.law is CHINCHILLA:
        flags.append("C of the runs is of every matrix product; N* and D* are those of C = 6 N D.")
    if found.law.name == "kaplan_ns":
        flags.append("Steps are taken as S_min: only with batches far above the critical one are they that.")
    values = found.parameters
    flags += [f"{name} = {values[name]:.3g} is not positive: with these runs the loss does not fall with it."
              for name in ("alpha", "beta", "k") if values.get(name, 1) <= 0]  # fmt: skip
    if found.law is CHINCHILLA and values["E"] < 1e-3 * found.points["loss"].min():
        flags.append("E ends at its bound, 0: the runs do not show an irreducible loss.")
    return flags


def sensitivity(found: Fit, compute: list[float]) -> list[dict]:
    """GPT-4's law with the irreducible loss c free, at 0, and pinned at shares of the lowest loss: objective and
    forecasts, so that what hangs on c is seen."""
    lowest = float(found.points["loss"].min())
    rows = [_pinned_row(found, "as fitted", compute)]
    for share in (0.5, 0.7, 0.8, 0.9, 0.95):
        at = fit(found.law, found.points, found.delta, pinned={"c": share * lowest})
        rows.append(_pinned_row(at, f"c pinned at {share:g} of the lowest loss", compute))
    return rows


def _pinned_row(found: Fit, name: str, compute: list[float]) -> dict:
    losses = [float(np.exp(found.log_loss({"C": c})[0])) for c in compute]
    return {"c": found.parameters["c"], "what": name, "objective": found.objective,
            "losses": [{"C": c, "loss": loss} for c, loss in zip(compute, losses, strict=True)]}  # fmt: skip


# --- the file ---------------------------------------------------------------------------------------------


def write(path, made: dict):
    """InputError: the folder cannot be written to."""
    try:
        json_files.write_json(paths.local(path), made)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): name another file by --out=PATH.") from None


def load(path: str) -> tuple[dict, str]:
    """(law.json, its sha256). InputError: there is none, or it is something else."""
    file = paths.local(path)
    if not file.exists():
        raise InputError(f"There is no law {path}: python -m gptjax.scaling.fit --points=… writes it.")
    content = file.read_bytes()
    try:
        made = json.loads(content)
        LAWS[made["law"]], made["points"]["sha256"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a law that gptjax.scaling.fit wrote: fit again.") from None
    return made, hashlib.sha256(content).hexdigest()


def reopen(made: dict, points: Points | None = None) -> Fit:
    """The fit of a law.json. points: those it was fitted to, else read from where they were. InputError: they have
    changed since."""
    points = points or current_points(made)
    if points.sha256 != made["points"]["sha256"]:
        raise InputError(
            f"{made['points']['path']} has changed since the law was fitted: fit again, so that law and points agree."
        )
    then = at(made, points)
    return fit(then.law, points, then.delta, starts=then.theta, pinned=made["pinned"])


def at(made: dict, points: Points) -> Fit:
    """A law.json's parameters beside any points, as those that have come since; nothing is fitted."""
    law = LAWS[made["law"]]
    theta = law.free(np.array([made["parameters"][name]["value"] for name in law.parameters]))
    return Fit(law, points, theta, made["objective"], made["delta"] or np.inf, 1.0, tuple(made["pinned"]))


def current_points(made: dict) -> Points:
    """The points of a law.json as the file is now."""
    source = made["points"]
    return read(source["path"], source.get("columns"), source.get("where"))


def chinchilla_only(law: Law, what: str):
    """InputError: the law says nothing of how to split compute between N and D."""
    if law is not CHINCHILLA:
        raise InputError(f"{what} needs N*(C) and D*(C), which {law.name} does not give: fit --law=chinchilla.")
