"""report.html: one self-contained page of a workdir: curves, samples, config, hardware, time."""

import base64
import html
import io
import itertools
import json
import math
import platform

import jax
from etils import epath

from gptjax import config as configs
from gptjax.model import architecture
from gptjax.run_config import read_config
from gptjax.training import files
from gptjax.training.metrics import JsonLines
from gptjax.training.stage import selection_value
from gptjax.web_page import page, table


def write(workdir) -> epath.Path:
    """Writes workdir/report.html from what the run left there; returns its path. A full disk is a warning."""
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    train = JsonLines.read(workdir / "metrics.jsonl", once=True)
    evaluations = JsonLines.read(workdir / "evaluations.jsonl", once=True)
    samples = JsonLines.read(workdir / "samples.jsonl")
    reward = workdir / "reward.json"
    parts = [
        f"<h1>{html.escape(workdir.name)}</h1>",
        table(_summary(config, train, evaluations)),
        "<h2>Curves</h2>" + _figure(train, evaluations) if train else "",
        _reward_model(json.loads(reward.read_text())) if reward.exists() else "",
        _samples(samples),
        "<h2>Config</h2><pre>" + html.escape(json.dumps(config, indent=2)) + "</pre>",
    ]
    content = page(workdir.name, parts)
    path, temporary = workdir / "report.html", workdir / ".report.html.tmp"

    def save():
        try:
            temporary.write_bytes(content.encode("utf-8", "xmlcharrefreplace"))
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    files.attempt(path, save)
    files.give_up(path)
    return path


def _summary(config, train, evaluations) -> list[tuple[str, str]]:
    device = jax.devices()[0]
    rows = [
        ("stage", config["stage"]),
        ("model", architecture.describe(configs.build(architecture.ModelConfig, config["model"]))),
    ]  # fmt: skip
    finite = [line for line in train if line.get("loss", 0.0) is not None]  # fp16 skips some
    if finite:
        last = finite[-1]
        rows.append(("steps", f"{train[-1]['step']:,}"))
        rows += [(k.replace("_", " "), f"{last[k]:,}") for k in ("tokens_seen", "episodes") if k in last]
        if "loss" in last:
            rows.append(("last training step", _figures(last)))
        for unit in ("tokens", "prompts", "examples"):
            speeds = sorted(line[f"{unit}_per_second"] for line in train if f"{unit}_per_second" in line)
            if speeds:
                rows.append(("speed", f"{speeds[len(speeds) // 2]:,.0f} {unit}/s (median)"))
        rows.append(("training time", f"{last['seconds'] / 60:.1f} min, compiling, evaluating and saving not counted"))
        if last.get("mfu") is not None:
            rows.append(("MFU", f"{100 * last['mfu']:.1f} % (PaLM-style)"))
    if evaluations:
        named = [("first", evaluations[0]), ("last", evaluations[-1])]
        if finite := [e for e in evaluations if selection_value(e) is not None]:
            named.append(("best", min(finite, key=selection_value)))
        rows += [(f"{name} validation", f"{_figures(e)}, step {e['step']:,}") for name, e in named]
    rows += [
        ("hardware", f"{jax.device_count()} x {device.device_kind} ({platform.machine()} {platform.system()})"),
        ("software", f"jax {jax.__version__}, Python {platform.python_version()}"),
    ]
    return rows


_UNITS = {"loss": "{:.4f} nats/token", "bits_per_byte": "{:.4f} bits/byte", "accuracy": "accuracy {:.4f}",
          "margin": "margin {:.3f}", "reward": "reward {:.3f}", "score": "score {:.3f}", "gold": "gold score {:.3f}",
          "kl": "KL {:.2f} nats", "lm_loss": "pre-training loss {:.4f} nats/token"}  # fmt: skip


def _figures(line: dict) -> str:
    """The main figures of a line, with their units."""
    units = _UNITS if "bits_per_byte" in line else _UNITS | {"loss": "loss {:.4f}"}
    return ", ".join(text.format(line[k]) for k, text in units.items() if line.get(k) is not None)


# (key of metrics.jsonl, title, keys of evaluations.jsonl): those a run has are drawn
_PANELS = (
    ("loss", "loss", ("loss",)),
    ("bits_per_byte", "bits/byte", ("bits_per_byte",)),
    ("accuracy", "accuracy", ("accuracy",)),
    ("objective/score", "score", ("score", "gold")),
    ("objective/kl", "KL from the reference, nats per response", ("kl",)),
    ("lm_loss", "loss on pre-training text, nats/token", ("lm_loss",)),
    ("response/length", "response length, tokens", ("length",)),
    ("policy/clipfrac", "policy clip fraction", ()),
    ("policy/approxkl", "approximate KL of an iteration's updates", ()),
    ("value/explained_var", "explained variance of the value", ()),
    ("grad_norm/ppo", "gradient norm, PPO", ()),
    ("grad_norm/ptx", "gradient norm, pre-training", ()),
    ("kl_coef", "KL coefficient", ()),
    ("grad_norm", "gradient norm", ()),
    ("learning_rate", "learning rate", ()),
)


_COLORS = ("#d1495b", "#2e8b57", "#8e6bbf", "#c9822b", "#4aa3a2", "#7a7a7a")


def _figure(train, evaluations) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [panel for panel in _PANELS if panel[0] in train[-1] or any(k in e for k in panel[2] for e in evaluations)]
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(10, 3.2 * -(-len(panels) // 2)), squeeze=False,
                                constrained_layout=True)  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (key, title, of_evaluation) in zip(axes.flat, panels, strict=False):
        if key in train[-1]:
            points = [(line["step"], math.nan if line.get(key) is None else line[key]) for line in train]
            axis.plot(*zip(*points, strict=True), lw=0.8, label="training", color="#3b6fb6")
        parts = {k for e in evaluations for k in e if k.startswith(tuple(f"{name}/" for name in of_evaluation))}
        of_evaluation = (*of_evaluation, *sorted(parts))
        for name, color in zip(of_evaluation, itertools.cycle(_COLORS), strict=False):
            points = [(e["step"], e[name]) for e in evaluations if e.get(name) is not None]
            if points:
                label = "validation" if len(of_evaluation) == 1 else f"validation: {name}"
                axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, label=label, color=color)
                axis.legend(frameon=False)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return image(figure, "training curves")


def image(figure, alt: str) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f"<img alt='{alt}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _reward_model(fitted: dict) -> str:
    """Accuracy compared with that of length alone, and the calibration curve."""
    names = ("pairs", "accuracy", "accuracy_by_prompt", "longer_wins", "longer_wins_characters",
             "accuracy_same_length", "accuracy_better_is_longer", "accuracy_better_is_shorter", "length_correlation",
             "mean_before", "mean_after")  # fmt: skip
    rows = [(k.replace("_", " "), f"{fitted[k]:,.4g}") for k in names if fitted.get(k) is not None]
    figure = reliability_diagram({"this model": fitted["calibration"]}, "agreement")
    return "<h2>Agreement with held-out rankings</h2>" + table(rows) + image(figure, "calibration")


def reliability_diagram(curves: dict[str, list[dict]], what: str = "accuracy"):
    """A matplotlib Figure: predicted against observed `what`, and below it the distribution of the predictions.

    curves: {name: bins}, each bin with `predicted` and `observed`; `observed_low` and `observed_high`, where it has
    them, become error bars, `low`, `high` and `items` the histogram.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    of_width = {name: [b for b in bins if "low" in b] for name, bins in curves.items()}
    heights = [3, 1] if any(of_width.values()) else [1]
    figure, axes = plt.subplots(len(heights), 1, figsize=(4.2, 3 + len(heights)), sharex=True, squeeze=False,
                                height_ratios=heights, constrained_layout=True)  # fmt: skip
    axis = axes[0, 0]
    predicted = [b["predicted"] for bins in curves.values() for b in bins]
    start = 0.5 if what == "agreement" and min(predicted, default=0.5) >= 0.5 else 0.0
    axis.plot([start, 1], [start, 1], color="#999", lw=0.8, label="calibrated")
    for (name, bins), color in zip(curves.items(), itertools.cycle(("#3b6fb6", *_COLORS)), strict=False):
        x, y = [b["predicted"] for b in bins], [b["observed"] for b in bins]
        low, high = ([b.get(key, b["observed"]) for b in bins] for key in ("observed_low", "observed_high"))
        below, above = ([abs(a - b) for a, b in zip(y, ends, strict=True)] for ends in (low, high))
        if bins:
            axis.errorbar(x, y, [below, above], fmt="o-", ms=4, lw=1.2, elinewidth=0.8, color=color, label=name)
        if of_width[name]:
            total = sum(b["items"] for b in of_width[name])
            edges, widths = [b["low"] for b in of_width[name]], [b["high"] - b["low"] for b in of_width[name]]
            axes[1, 0].bar(edges, [b["items"] / total for b in of_width[name]], widths, align="edge", alpha=0.4,
                           color=color)  # fmt: skip
    axis.set_ylabel(f"observed {what}")
    axes[-1, 0].set_xlabel("predicted agreement" if what == "agreement" else "confidence")
    if len(heights) > 1:
        axes[1, 0].set_ylabel("share of items")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _samples(samples) -> str:
    if not samples:
        return ""
    shown = []
    for step in sorted({s["step"] for s in samples}):
        shown.append(f"<h3>step {step:,}</h3>")
        for s in samples:
            if s["step"] == step:
                figures = [f"{k} {s[k]:.2f}" for k in ("score", "gold") if s.get(k) is not None]
                note = f"<small>{', '.join(figures)}</small>\n" if figures else ""
                gap = "\n" if "demonstration" in s or figures else ""
                shown.append(f"<pre>{note}<b>{html.escape(s['prompt'])}</b>{gap}{html.escape(s['text'])}</pre>")
    return "<h2>Samples</h2>" + "".join(shown)
