"""report.html: one self-contained page of a workdir: curves, samples, config, hardware, time."""

import base64
import html
import io
import json
import math
import platform

import jax
from etils import epath

from gptjax.config import read_config
from gptjax.training.metrics import JsonLines

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #8882; padding: .8rem; overflow-x: auto; white-space: pre-wrap; border-radius: 4px; }
pre b { font-weight: 600; color: #3b6fb6; } img { max-width: 100%; background: #fff; }
"""


def write(workdir) -> epath.Path:
    """Writes workdir/report.html from what the run left there; returns its path."""
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    train = JsonLines.read(workdir / "metrics.jsonl")
    evaluations = JsonLines.read(workdir / "evaluations.jsonl")
    samples = JsonLines.read(workdir / "samples.jsonl")
    parts = [
        f"<h1>{html.escape(workdir.name)}</h1>",
        _table(_summary(config, train, evaluations)),
        "<h2>Curves</h2>" + _figure(train, evaluations) if train else "",
        _samples(samples),
        "<h2>Config</h2><pre>" + html.escape(json.dumps(config, indent=2)) + "</pre>",
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(workdir.name)}</title><style>{_STYLE}</style>" + "\n".join(parts) + "</html>\n"
    )
    path = workdir / "report.html"
    path.write_text(page)
    return path


def _summary(config, train, evaluations) -> list[tuple[str, str]]:
    device = jax.devices()[0]
    rows = [("stage", config["stage"])]
    m = config["model"]
    rows.append(("model", f"{m['n_layer']} layers, {m['d_model']} wide, {m['n_head']} heads, context "
                 f"{m['context_length']}, vocabulary {m['vocab_size']:,}"))  # fmt: skip
    finite = [line for line in train if None not in (line["loss"], line["bits_per_byte"])]  # fp16 skips some
    if finite:
        last = finite[-1]
        speeds = sorted(line["tokens_per_second"] for line in train)
        rows += [
            ("steps", f"{train[-1]['step']:,}"),
            ("tokens seen", f"{last['tokens_seen']:,}"),
            ("last training loss", f"{last['loss']:.4f} nats/token, {last['bits_per_byte']:.4f} bits/byte"),
            ("speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median)"),
            ("training time", f"{last['seconds'] / 60:.1f} min, compiling, evaluating and saving not counted"),
        ]
        if last.get("mfu") is not None:
            rows.append(("MFU", f"{100 * last['mfu']:.1f} % (PaLM-style)"))
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        best = min(evaluations, key=lambda e: e["loss"])
        for name, e in (("first", first), ("last", last), ("best", best)):
            figures = f"{e['loss']:.4f} nats/token, {e['bits_per_byte']:.4f} bits/byte, step {e['step']:,}"
            rows.append((f"{name} validation", figures))
    rows += [
        ("hardware", f"{jax.device_count()} x {device.device_kind} ({platform.machine()} {platform.system()})"),
        ("software", f"jax {jax.__version__}, Python {platform.python_version()}"),
    ]
    return rows


def _table(rows):
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"


def _figure(train, evaluations) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    steps = [line["step"] for line in train]
    panels = (("loss", "loss, nats/token"), ("bits_per_byte", "bits/byte"),
              ("grad_norm", "gradient norm"), ("learning_rate", "learning rate"))  # fmt: skip
    for axis, (key, title) in zip(axes.flat, panels, strict=True):
        values = [math.nan if line[key] is None else line[key] for line in train]
        axis.plot(steps, values, lw=0.8, label="training", color="#3b6fb6")
        if key in ("loss", "bits_per_byte") and evaluations:
            points = [(e["step"], e[key]) for e in evaluations]
            axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, label="validation", color="#d1495b")
            axis.legend(frameon=False)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f"<img alt='training curves' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _samples(samples) -> str:
    if not samples:
        return ""
    shown = []
    for step in sorted({s["step"] for s in samples}):
        shown.append(f"<h3>step {step:,}</h3>")
        for s in samples:
            if s["step"] == step:
                shown.append(f"<pre><b>{html.escape(s['prompt'])}</b>{html.escape(s['text'])}</pre>")
    return "<h2>Samples</h2>" + "".join(shown)
