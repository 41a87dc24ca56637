"""Pictures of runs and their law, each a matplotlib Figure."""

import matplotlib
import numpy as np

from gptjax.scaling import approaches
from gptjax.scaling.collapse import SHARES
from gptjax.scaling.fitting import Fit
from gptjax.scaling.forecast import frontier
from gptjax.scaling.laws import CHINCHILLA, optimum
from gptjax.scaling.points import Points, budgets

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the backend

_BLUE, _RED = "#3b6fb6", "#d1495b"


def _axes(title: str, x: str, y: str, log_y: bool = False):
    figure, axis = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    axis.set(title=title, xlabel=x, ylabel=y, xscale="log")
    if log_y:
        axis.set_yscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    return figure, axis


def loss_over_compute(points: Points, found: Fit | None):
    """All runs, the best of each budget, and where the law sees the frontier."""
    figure, axis = _axes("Loss over compute", "FLOPs", f"loss ({points.metric or 'as given'})")
    sizes = np.log10(points["N"]) if "N" in points.columns else None
    shown = axis.scatter(points["C"], points["loss"], c=sizes, s=14, cmap="viridis")
    if sizes is not None:
        figure.colorbar(shown, label="log10 parameters")
    best = frontier(points)
    axis.plot(best["C"], best["loss"], "o", ms=8, mfc="none", color=_RED, label="best of its budget")
    if found is not None and (found.law is CHINCHILLA or found.law.inputs == ("C",)):
        compute = np.geomspace(points["C"].min(), 10 * points["C"].max(), 100)
        inputs = {"C": compute}
        if found.law is CHINCHILLA:
            inputs["N"], inputs["D"] = optimum(found.parameters, compute)
        axis.plot(compute, np.exp(found.log_loss(inputs)), color=_BLUE, label="the law's frontier")
    axis.legend(frameon=False)
    return figure


def isoflop_curves(points: Points):
    """Loss over parameters, a parabola for each budget; crosses are the minima that approach 2 uses."""
    figure, axis = _axes("isoFLOP parabolas", "parameters", f"loss ({points.metric or 'as given'})")
    curves = approaches.parabolas(points)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, max(len(curves), 1)))
    for curve, color in zip(curves, colors, strict=False):
        which = min(budgets(points["C"]), key=lambda i: abs(np.log(points["C"][i].mean() / curve.compute)))
        axis.plot(points["N"][which], points["loss"][which], "o", ms=4, color=color)
        n = np.geomspace(curve.low, curve.high, 60)
        axis.plot(n, np.polyval(curve.coefficients, np.log(n / curve.center)), color=color, lw=1,
                  label=f"{curve.compute:.2g}" + (" (left out)" if curve.edge else ""))  # fmt: skip
        if curve.edge is None:
            axis.plot(curve.N, curve.loss, "x", color=_RED)
    axis.legend(frameon=False, title="FLOPs", fontsize=8)
    return figure


def contours(found: Fit):
    """The law's loss over compute and parameters, the runs, and N*."""
    points = found.points
    figure, axis = _axes("The law's loss", "FLOPs", "parameters", log_y=True)
    compute = np.geomspace(points["C"].min() / 2, points["C"].max() * 10, 80)
    N = np.geomspace(points["N"].min() / 2, points["N"].max() * 4, 80)
    grid_c, grid_n = np.meshgrid(compute, N)
    loss = np.exp(found.log_loss({"N": grid_n.ravel(), "D": (grid_c / (6 * grid_n)).ravel()})).reshape(grid_c.shape)
    levels = np.quantile(loss, np.linspace(0.02, 0.9, 14))
    lines = axis.contour(grid_c, grid_n, loss, levels=np.unique(levels), cmap="viridis", linewidths=0.9)
    axis.clabel(lines, fontsize=7, fmt="%.2f")
    axis.plot(points["C"], points["N"], ".", color="#555", ms=4)
    if found.law is CHINCHILLA:
        axis.plot(compute, optimum(found.parameters, compute)[0], color=_RED, label="N*")
        axis.legend(frameon=False)
    axis.set_ylim(N[0], N[-1])
    return figure


def residuals(found: Fit):
    """How far each run is from the law."""
    column = "C" if "C" in found.points.columns else found.law.inputs[0]
    figure, axis = _axes("Residuals", {"C": "FLOPs"}.get(column, column), "loss over the law's, %")
    axis.axhline(0, color="#999", lw=0.8)
    axis.plot(found.points[column], 100 * np.expm1(found.residuals), "o", ms=4, color=_BLUE)
    return figure


def forecasts(rows: list[dict]):
    """Sealed forecasts with their intervals, and outcomes. rows: {name, loss, low, high, outcome or None}."""
    figure, axis = plt.subplots(figsize=(6.4, 1.4 + 0.35 * len(rows)), constrained_layout=True)
    for y, row in enumerate(rows):
        ends = [[row["loss"] - row["low"]], [row["high"] - row["loss"]]]
        axis.errorbar(row["loss"], y, xerr=ends, fmt="o", color=_BLUE, capsize=3, label="forecast")
        if row["outcome"] is not None:
            axis.plot(row["outcome"], y, "x", color=_RED, ms=8, label="outcome")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set(title="Forecast and outcome", xlabel="loss", ylim=(-0.7, len(rows) + 0.2))
    axis.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), frameon=False, loc="upper center", ncols=2)
    return figure


def leave_future_out(rows: list[dict]):
    """Errors at the last budget's best run, by how much of the ladder was known: the law's and the baselines'."""
    figure, axis = _axes("Leave-future-out", "largest fitted FLOPs", "error of the forecast loss, %")
    axis.axhline(0, color="#999", lw=0.8)
    for name in dict.fromkeys(name for row in rows for name in row["best"] if name not in ("compute", "loss")):
        known = [row for row in rows if name in row["best"]]
        errors = [100 * (row["best"][name] / row["best"]["loss"] - 1) for row in known]
        style = dict(lw=2, color=_BLUE, ls="-") if name == "law" else dict(lw=1, ls="--")
        axis.plot([row["cutoff"] for row in known], errors, marker="o", ms=4, label=name.replace("_", " "), **style)
    axis.legend(frameon=False, fontsize=8)
    return figure


def collapse(shown: dict[str, np.ndarray], leaving: dict[str, float]):
    """Normalized loss curves; those that leave the others in red."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    for name, curve in shown.items():
        label = name if name in leaving else None
        axis.plot(SHARES[1:], curve, lw=1, color=_RED if label else _BLUE, alpha=1 if label else 0.5, label=label)
    axis.set(title="Loss-curve collapse", xlabel="share of the steps", ylabel="(L - E) / (L at the end - E)")
    axis.spines[["top", "right"]].set_visible(False)
    if leaving:
        axis.legend(frameon=False)
    return figure
