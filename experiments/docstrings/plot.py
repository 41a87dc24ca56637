"""results.json as a picture, drawn like the report's: gold and proxy score against KL, loss on pre-training text.

    python -m experiments.docstrings.plot        writes results.png, which README.md shows

results.json has where each run ended, not its path there, so a run is one point here and a curve in the report.
"""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLORS = ("#d1495b", "#3b6fb6", "#8a5fbf", "#c98a1b")


def picture(result: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {row["name"]: row for row in result["table"]}
    real, sft, _, *runs = rows.values()  # the third is best-of-n, drawn as a curve
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    root = [b["kl"] ** 0.5 for b in result["best_of_n"]]
    for axis, key in zip(axes, ("gold", "proxy"), strict=False):
        axis.plot(root, [b[key] for b in result["best_of_n"]], "s--", ms=4, color="#2e8b57", label="best of 1 to 16")
        for run, color in zip(runs, COLORS, strict=False):
            axis.plot(run["kl"] ** 0.5, run[key], "o", ms=7, color=color, label=run["name"])
        axis.axhline(real[key], color="#666666", lw=1, ls=":", label=real["name"])
        axis.set_xlabel("√KL from the SFT model")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=6)
    measured = [sft, *(run for run in runs if run.get("lm_loss") is not None)]
    for place, (row, color) in enumerate(zip(measured, ("#2e8b57", *COLORS), strict=False)):
        axes[2].plot(row["lm_loss"], place, "o", ms=7, color=color)
        axes[2].annotate(f"{row['lm_loss']:.3f}", (row["lm_loss"], place), (0, 8), textcoords="offset points",
                         ha="center", fontsize=8)  # fmt: skip
    axes[2].set_yticks(range(len(measured)), [row["name"] for row in measured])
    axes[2].set_ylim(len(measured) - 0.5, -0.7)
    axes[2].margins(x=0.15)
    axes[2].set_xlabel("nats per token")
    titles = ("gold score: the labeler's own", "proxy: the reward model's score", "loss on pre-training text")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    picture(json.loads((HERE / "results.json").read_text()), HERE / "results.png")
