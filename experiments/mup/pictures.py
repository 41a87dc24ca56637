"""The pictures of the study."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the backend


def coordinates(found: dict, path: Path):
    """Movement after each step against width: a row for each variant, a column for each activation."""
    names = list(next(iter(found["variants"].values()))["movement"])
    figure, axes = plt.subplots(len(found["variants"]), len(names), figsize=(2.5 * len(names), 9.5), sharex=True,
                                sharey="col", layout="constrained")  # fmt: skip
    for row, (variant, of) in zip(axes, found["variants"].items(), strict=True):
        for ax, name in zip(row, names, strict=True):
            for step, values in enumerate(of["movement"][name], 1):
                color = plt.get_cmap("viridis")((step - 1) / 5)
                ax.plot(found["widths"], values, "o-", ms=3, color=color, label=f"step {step}")
            ax.set(xscale="log", yscale="log")
            ax.set_title(f"{name}, slope {of['slopes'][name]:+.2f}", fontsize=8)
        row[0].set_ylabel(variant, fontsize=8)
    for ax in axes[-1]:
        ax.set_xticks(found["widths"], map(str, found["widths"]), fontsize=7, minor=False)
        ax.minorticks_off()
        ax.set_xlabel("width")
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.suptitle("Mean |change| since initialization; slope of its log over that of the width")
    _save(figure, path)


def transfer(found: dict, path: Path):
    """Loss against learning rate, a curve for each width; a panel for each parametrization."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for ax, (name, losses) in zip(axes, found["losses"].items(), strict=True):
        for i, (width, values) in enumerate(zip(found["widths"], losses, strict=True)):
            shown = [value if value is not None else float("nan") for value in values]
            color = plt.get_cmap("viridis")(i / len(found["widths"]))
            ax.plot(found["rates"], shown, "o-", ms=3, color=color, label=f"width {width}")
            best = min(range(len(shown)), key=lambda k: shown[k] if shown[k] == shown[k] else float("inf"))
            ax.plot(found["rates"][best], shown[best], "o", ms=9, mfc="none", color=color)
        ax.set(title=name, xscale="log", xlabel="learning rate")
    axes[0].set_ylabel(f"training loss after {found['steps']} steps (nats per byte)")
    axes[0].legend(frameon=False)
    _save(figure, path)


def _save(figure, path: Path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
