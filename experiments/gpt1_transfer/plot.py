"""results.json as a picture.

Above: the score of each task and its difference from the whole recipe, with 95 % intervals over seeds, beside Table
5's differences; and the score against the number of layers that are transferred (GPT-1's Figure 2, left). Below: the
zero-shot heuristics against updates of pre-training, with bands of two standard errors (Figure 2, right).
"""

from pathlib import Path

COLORS = {"full": "#2e8b57", "no_auxiliary": "#3b6fb6", "no_pretraining": "#d1495b", "lstm": "#c98a1b"}
NAMES = {"full": "full", "no_auxiliary": "no auxiliary loss", "no_pretraining": "no pre-training", "lstm": "LSTM"}


def picture(result: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    zero_shot = list(dict.fromkeys(point["task"] for point in result["zero_shot"]))
    figure = plt.figure(figsize=(14, 7), layout="constrained")
    above, below = figure.subfigures(2, 1)
    for draw, axis in zip((_variants, _differences, _layers), above.subplots(1, 3), strict=True):
        draw(result, axis)
    for axis, task in zip(below.subplots(1, len(zero_shot), squeeze=False)[0], zero_shot, strict=True):
        _over_updates([p for p in result["zero_shot"] if p["task"] == task], axis)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _variants(result: dict, axis):
    columns = [*result["chance"], "average"]
    for i, (variant, row) in enumerate(result["table"].items()):
        places = [c + 0.16 * (i - 1.5) for c in range(len(columns))]
        means, halves = ([row[c][key] or 0 for c in columns] for key in ("mean", "half"))
        axis.errorbar(places, means, halves, fmt="o", ms=5, capsize=2, color=COLORS[variant], label=NAMES[variant])
    for place, task in enumerate(result["chance"]):
        axis.plot([place - 0.35, place + 0.35], [100 * result["chance"][task]] * 2, "k:", lw=1)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_title("fine-tuned (dotted: without skill)", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _differences(result: dict, axis):
    columns = [*result["chance"], "average"]
    for i, (variant, found) in enumerate(result["comparison"].items()):
        of = [(found["tasks"] | {"average": found})[c] for c in columns]
        places = [c + 0.2 * (i - 1) for c in range(len(columns))]
        means, halves = ([d[key] or 0 for d in of] for key in ("mean", "half"))
        axis.errorbar(places, means, halves, fmt="o", ms=5, capsize=2, color=COLORS[variant], label=NAMES[variant])
        published = [(place, d["published"]) for place, d in zip(places, of, strict=True) if "published" in d]
        axis.plot(*zip(*published, strict=True), "x", ms=7, color=COLORS[variant])
    axis.plot([], [], "x", ms=7, color="gray", label="Table 5")
    axis.axhline(0, color="k", lw=1)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_title("difference from full", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _layers(result: dict, axis):
    of_layers = result["layers"]
    for task in [*result["chance"], "average"]:
        means, halves = ([row[task][key] or 0 for row in of_layers.values()] for key in ("mean", "half"))
        style = {"color": "k", "lw": 2} if task == "average" else {"lw": 1}
        axis.errorbar([int(k) for k in of_layers], means, halves, marker="o", ms=4, capsize=2, label=task, **style)
    axis.set(xlabel="layers transferred (0: embeddings alone)", xticks=[int(k) for k in of_layers])
    axis.set_title("score against layers transferred", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _over_updates(points: list[dict], axis):
    for model, color in (("transformer", COLORS["full"]), ("lstm", COLORS["lstm"])):
        some = sorted((p["step"], p["value"], p["stderr"]) for p in points if p["model"] == model)
        steps, values, errors = zip(*some, strict=True)
        axis.plot(steps, values, "o-", ms=3, color=color, label="Transformer" if model == "transformer" else "LSTM")
        low, high = ([v + side * e for v, e in zip(values, errors, strict=True)] for side in (-2, 2))
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axis.axhline(points[0]["chance"], color="k", ls=":", lw=1)
    axis.set(xlabel="updates of pre-training", ylabel=points[0]["metric"])
    axis.set_title(f"{points[0]['task']}, zero-shot", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
