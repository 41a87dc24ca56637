"""The picture of the study: accuracy against examples in the prompt, a curve for each size."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw(panels: Mapping[str, Sequence[dict]], titles: Mapping[str, str], best: Mapping[str, Mapping], path: Path):
    """A panel for each of titles, those with a best possible accuracy above the others.

    panels: {name: records {parameters, accuracy: {name: {K: (accuracy, standard error)}}} of each size}. titles: {name:
    title}. best: {name: {K: accuracy}}.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [[n for n in titles if n in best], [n for n in titles if n not in best]]
    columns = max(map(len, rows))
    figure, axes = plt.subplots(2, columns, figsize=(4 * columns, 6.4), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, names in enumerate(rows):
        for ax, name in zip(axes[i], names, strict=False):
            ax.axis("on")
            if name in best:
                ax.plot(list(best[name]), list(best[name].values()), "k--", label="best possible", linewidth=1)
            for r in panels[name]:
                values = r["accuracy"][name]
                means, errors = zip(*values.values(), strict=True)
                label = f"{r['parameters']:,} parameters"
                ax.errorbar(list(values), means, [2 * e for e in errors], marker="o", markersize=3, capsize=2,
                            label=label)  # fmt: skip
            ax.set(title=titles[name], xlabel="examples in the prompt", ylabel="accuracy", ylim=(-0.02, 1.02))
        axes[i][0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
