"""GPT-1's fine-tuning on a labeled task (task.sentences), from the pre-trained model and from random weights."""

import html
import json
from collections import Counter
from pathlib import Path

from experiments.docstrings.plot import COLORS
from gptjax import json_files, report
from gptjax.config import config_dict
from gptjax.finetune import FinetuneConfig
from gptjax.training.metrics import JsonLines

RUNS = {"finetuned": "pre-trained, then fine-tuned", "from_scratch": "fine-tuned without pre-training"}  # workdir: name
LENGTH = 32  # tokens of a summary and the two marks; longer ones are cut


def config(workdir: Path, data: Path, scale: float, pretrained: bool):
    """GPT-1's recipe but for a higher learning rate, since the model is small, a longer warm-up and fewer epochs."""
    c = config_dict(FinetuneConfig)
    c.init_from, c.transfer = str(workdir), None if pretrained else -1
    c.data.update(train=str(data / "sentences_train.jsonl"), valid=str(data / "sentences.jsonl"), labels="0,1",
                  max_length=LENGTH)  # fmt: skip
    c.steps, c.batch_size = max(2, round(100 * scale)), 32
    c.model.dropout = 0.1
    c.optimizer.update(name="gpt1_adam", learning_rate=1e-3, b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
    c.schedule.update(kind="gpt1_linear", warmup_fraction=0.1)
    c.eval.update(every=max(2, round(50 * scale)))
    c.checkpoint.every = 100
    return c


def measure(workdir: Path, data: Path) -> dict:
    """{'runs': [{name, accuracy, stderr}], 'majority', 'sentences', 'steps'}: accuracy on the held-out files. majority:
    the share of the more frequent label there."""
    labels = [row["label"] for row in json_files.read_json_lines(data / "sentences.jsonl")]
    rows = []
    for name, title in RUNS.items():
        found = json.loads((workdir / name / "results.json").read_text())
        of = found["validation"]
        rows.append({"name": title, "accuracy": of["accuracy"], "stderr": of["accuracy_stderr"]})
    majority = max(Counter(labels).values()) / len(labels)
    return {"runs": rows, "majority": majority, "sentences": len(labels), "steps": found["step"]}


def say(result: dict):
    for row in result["runs"]:
        print(f"{row['name']:<34}{row['accuracy']:.3f} ± {row['stderr']:.3f}")
    print(f"{'majority class':<34}{result['majority']:.3f}")


def section(workdir: Path, result: dict) -> str:
    """Of report.html: the table and the curves of both runs."""
    rows = "".join(
        f"<tr><th>{html.escape(row['name'])}</th><td class=n>{row['accuracy']:.3f} ± {row['stderr']:.3f}</td></tr>"
        for row in result["runs"]
    )
    return (
        "<p>GPT-1's way to use a pre-trained model: [start] text [extract], a linear head on the last hidden state, "
        "and the language model's loss with weight .5. The task: is this the summary line of a docstring, or were two "
        "neighboring words of it swapped? Accuracy ± standard error on "
        f"{result['sentences']:,} lines of files that no stage has seen, after {result['steps']:,} steps.</p>"
        f"<table><tr><th></th><th>accuracy</th></tr>{rows}"
        f"<tr><th>majority class</th><td class=n>{result['majority']:.3f}</td></tr></table>"
        + report.image(picture(workdir, result), "fine-tuning with and without pre-training")
    )


def picture(workdir: Path, result: dict):
    """A matplotlib Figure: loss of the task in training, and accuracy on held-out questions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 3.3), constrained_layout=True)
    for (name, title), row, color in zip(RUNS.items(), result["runs"], COLORS, strict=False):
        lines = JsonLines.read(workdir / name / "metrics.jsonl")
        loss.plot([x["step"] for x in lines], [x["task_loss"] for x in lines], lw=1.2, color=color, label=title)
        lines = JsonLines.read(workdir / name / "evaluations.jsonl")
        found = [(x["step"], x["accuracy"], x["accuracy_stderr"]) for x in lines if x["step"] < result["steps"]]
        found.append((result["steps"], row["accuracy"], row["stderr"]))
        accuracy.errorbar(*zip(*found, strict=True), fmt="o-", ms=4, lw=1, capsize=3, color=color, label=title)
    accuracy.axhline(result["majority"], color="#666666", lw=1, ls=":", label="majority class")
    titles = ("loss of the task in training, nats", "accuracy ± standard error, held-out files")
    for axis, title in zip((loss, accuracy), titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    return figure
