"""GPT-1's fine-tuning of the pre-trained model on a labeled task (task.kinds)."""

import json
from collections import Counter
from pathlib import Path

from experiments.docstrings.plot import COLORS
from gptjax import json_files, report
from gptjax.config import config_dict
from gptjax.finetune import FinetuneConfig
from gptjax.training.metrics import JsonLines

WORKDIR = "finetuned"
LENGTH = 32  # tokens of a summary and the two marks; longer ones are cut


def config(workdir: Path, data: Path, scale: float):
    """GPT-1's recipe but for a higher learning rate, since the model is small, a longer warm-up and fewer epochs."""
    c = config_dict(FinetuneConfig)
    c.init_from = str(workdir)
    c.data.update(train=str(data / "kinds_train.jsonl"), valid=str(data / "kinds.jsonl"), labels="class,function",
                  max_length=LENGTH)  # fmt: skip
    c.steps, c.batch_size = max(2, round(60 * scale)), 32
    c.model.dropout = 0.1
    c.optimizer.update(name="gpt1_adam", learning_rate=1e-3, b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
    c.schedule.update(kind="gpt1_linear", warmup_fraction=0.1)
    c.eval.update(every=max(2, round(20 * scale)))
    c.checkpoint.every = 100
    return c


def measure(workdir: Path, data: Path) -> dict:
    """{'accuracy', 'stderr', 'majority', 'rows', 'steps'}: accuracy on the held-out files. majority: the share of the
    more frequent label there."""
    labels = [row["label"] for row in json_files.read_json_lines(data / "kinds.jsonl")]
    found = json.loads((workdir / WORKDIR / "results.json").read_text())
    of, majority = found["validation"], max(Counter(labels).values()) / len(labels)
    return {"accuracy": of["accuracy"], "stderr": of["accuracy_stderr"], "majority": majority, "rows": len(labels),
            "steps": found["step"]}  # fmt: skip


def say(result: dict):
    print(f"fine-tuned: {_accuracy(result)}; majority class {result['majority']:.3f}")


def _accuracy(result: dict) -> str:
    return f"{result['accuracy']:.3f} ± {result['stderr']:.3f}"


def section(workdir: Path, result: dict) -> str:
    """Of report.html: the accuracy and the curves of the run."""
    return (
        "<p>GPT-1's way to use a pre-trained model: [start] text [extract], a linear head on the last hidden state, "
        "and the language model's loss with weight .5. The task: is this the summary line of a class or of a "
        "function? Accuracy after "
        f"{result['steps']:,} steps, on {result['rows']:,} lines of files that no stage has seen: "
        f"<b>{_accuracy(result)}</b> (standard error); the majority class {result['majority']:.3f}.</p>"
        + report.image(picture(workdir, result), "fine-tuning")
    )


def picture(workdir: Path, result: dict):
    """A matplotlib Figure: loss of the task in training, and accuracy on held-out questions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 3.3), constrained_layout=True)
    lines = JsonLines.read(workdir / WORKDIR / "metrics.jsonl")
    loss.plot([x["step"] for x in lines], [x["task_loss"] for x in lines], lw=1.2, color=COLORS[0])
    lines = JsonLines.read(workdir / WORKDIR / "evaluations.jsonl")
    found = [(x["step"], x["accuracy"], x["accuracy_stderr"]) for x in lines if x["step"] < result["steps"]]
    found.append((result["steps"], result["accuracy"], result["stderr"]))
    accuracy.errorbar(*zip(*found, strict=True), fmt="o-", ms=4, lw=1, capsize=3, color=COLORS[0], label="fine-tuned")
    accuracy.axhline(result["majority"], color="#666666", lw=1, ls=":", label="majority class")
    titles = ("loss of the task in training, nats", "accuracy ± standard error, held-out files")
    for axis, title in zip((loss, accuracy), titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    accuracy.legend(frameon=False, fontsize=8)
    return figure
