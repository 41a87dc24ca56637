"""results.json as a picture, drawn like the report's: gold and proxy score against KL, loss on pre-training text.

    python -m experiments.docstrings.plot [runs/demo]

writes results.png, which README.md shows, and prints the tables of experiments/README.md; given a demo's workdir, it
takes results.json from there first. results.json has where each run ended, not its path there, so a run is one point
here and a curve in the report.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = {"ppo": "PPO", "ppo_ptx": "PPO-ptx", "grpo": "GRPO", "dpo": "DPO"}  # workdir: name
NORMALIZATIONS = {"acc": "log p", "acc_token": "per token", "acc_norm": "per character", "acc_bytes": "per byte",
                  "acc_answer_context": "less log p without the signature"}  # fmt: skip
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


def kept(story: dict) -> dict:
    """What results.json keeps of a demo's story.json: no samples, and of the quiz no protocols and diagrams."""
    result = {k: v for k, v in story.items() if k != "samples"}
    keys = ("name", "step", "shots", "items", "metric", "metrics")
    figures = ("ece", "ece_low", "ece_high", "ece_if_calibrated", "brier", "brier_se", "nll", "nll_se")
    result["quiz"] = {
        part: [{k: row[k] for k in keys} | {k: row["calibration"][k] for k in figures} for row in rows]
        for part, rows in story["quiz"].items()
    }
    return result


def markdown(result: dict) -> str:
    """The tables and figures that experiments/README.md quotes."""
    number = lambda x, digits=3: "" if x is None else f"{x:.{digits}f}"
    lines = ["| | gold (-2 to 2) | proxy | KL, nats | loss on pre-training text |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['gold']:.2f} | {row['proxy']:.2f} | {number(row.get('kl'), 2)} | "
        f"{number(row.get('lm_loss'))} |"
        for row in result["table"]
    ]
    tuned = result["finetuned"]
    lines += ["", f"Fine-tuned: {tuned['accuracy']:.3f} ± {tuned['stderr']:.3f}, majority {tuned['majority']:.3f}.", ""]
    metrics = list(NORMALIZATIONS)
    lines += [f"| | shots | {' | '.join(NORMALIZATIONS.values())} | ECE (95 %) |", "|---" * (len(metrics) + 3) + "|"]
    for row in result["quiz"]["models"]:
        cells = [f"{row['metrics'][m]['value']:.3f} ± {row['metrics'][m]['stderr']:.3f}" for m in metrics]
        ece = f"{row['ece']:.3f} ({row['ece_low']:.3f} to {row['ece_high']:.3f})"
        lines.append(f"| {row['name']} | {row['shots']} | {' | '.join(cells)} | {ece} |")
    curve = [(row["step"], row["metrics"][row["metric"]]["value"]) for row in result["quiz"]["curve"]]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    lines += [
        "", "Zero-shot over pre-training: " + ", ".join(f"step {step} {value:.3f}" for step, value in curve),
        f"Reward model {result['reward_accuracy']:.3f}, noise allows {result['pair_accuracy_ceiling']:.3f}, the "
        f"longer one {result['longer_wins']:.3f}.",
        f"{sum(result['seconds'].values()):.0f} s: {seconds}.",
    ]  # fmt: skip
    return "\n".join(lines)


def main(workdir: str | None = None):
    saved = HERE / "results.json"
    if workdir is not None:
        story = json.loads((Path(workdir) / "story.json").read_text())
        saved.write_text(json.dumps(kept(story), indent=1) + "\n")
    result = json.loads(saved.read_text())
    picture(result, HERE / "results.png")
    print(markdown(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
