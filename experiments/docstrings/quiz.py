"""Zero- and few-shot evaluation on the quiz (quiz.toml), of every model of the demo, and its calibration before and
after RLHF.

The score is log p(summary | signature) - log p(summary | another signature), `def f(x):` (quiz.toml). With log
p(summary) instead its softmax over the choices would be the posterior of a model that knows how the quiz is made, with
the other three drawn without regard to the signature.
"""

import html
from pathlib import Path

from experiments.docstrings.plot import COLORS, NORMALIZATIONS, RUNS
from gptjax import report
from gptjax.tasks import harness
from gptjax.tasks.task import load_task
from gptjax.trained import load_model
from gptjax.training.checkpoint import Checkpointer

TASK = Path(__file__).with_name("quiz.toml")
MODELS = {".": "pre-trained", "sft": "SFT", **RUNS}  # workdir: name
SHOTS = (0, 2)  # three examples seldom fit the context


def measure(workdir: Path, data: Path, limit: int) -> dict:
    """{'models': a record of harness.Result for each model and number of examples, with its `name`; 'curve': the same
    zero-shot for each checkpoint of the pre-training, with its `step`}. limit: questions."""
    task, models, curve = load_task(str(TASK)), [], []

    def asked(model, what: str, shots: int) -> dict:
        print(f"quiz: {what}, {shots}-shot")
        found = harness.evaluate(harness.scorer(model), task, str(data), shots=shots, limit=limit)
        return {"name": what, "step": model.step, **found.record()}

    for name, title in MODELS.items():
        model = load_model(workdir / name)
        models += [asked(model, title, shots) for shots in SHOTS]
    last = models[0]
    for step in Checkpointer(workdir).steps():
        if step != last["step"]:
            curve.append(asked(load_model(workdir, step=step), f"pre-trained, step {step:,}", 0))
    return {"models": models, "curve": [*curve, last]}


def say(result: dict):
    print(f"{'':<14}{'shots':>6}{'accuracy':>18}{'ECE':>8}")
    for row in result["models"]:
        value, error = (row["metrics"][row["metric"]][k] for k in ("value", "stderr"))
        print(f"{row['name']:<14}{row['shots']:>6}{f'{value:.3f} ± {error:.3f}':>18}{row['calibration']['ece']:>8.3f}")


def section(result: dict) -> str:
    """Of report.html: all normalizations and the calibration of each model, and the pictures."""
    first = result["models"][0]
    head = "".join(f"<th>{h}</th>" for h in ("", "shots", *NORMALIZATIONS.values(), "ECE (95 %)"))
    rows = ""
    for row in result["models"]:
        metrics = [row["metrics"][name] for name in NORMALIZATIONS]
        cells = "".join("<td class=n>{value:.3f} ± {stderr:.3f}</td>".format(**metric) for metric in metrics)
        ece = "{ece:.3f} ({ece_low:.3f} to {ece_high:.3f})".format(**row["calibration"])
        rows += f"<tr><th>{row['name']}</th><td class=n>{row['shots']}</td>{cells}<td class=n>{ece}</td></tr>"
    template = html.escape(first["protocol"]["form"][0]["context"] + "…")
    return (
        f"<p>Which of four summaries of one file belongs to the signature? {first['items']:,} questions of files that "
        f"no stage has seen, answered without training by the most likely summary after</p><pre>{template}</pre>"
        "<p>Accuracy ± standard error by the log-probability itself and by four normalizations of it; chance is .25. "
        "The last one compares how much more likely the signature makes a summary: its softmax is what calibration "
        "(ECE: expected calibration error) and reliability are about. Examples come from the demonstrations' files. "
        "SFT and RLHF trained on another form, a chat, so this also shows what they left of the model's own skill.</p>"
        f"<table><tr>{head}</tr>{rows}</table><p>{_protocols(result)}</p>"
        + report.image(picture(result), "accuracy on the quiz")
        + report.image(reliability(result), "calibration before and after RLHF")
    )


def _protocols(result: dict) -> str:
    """What was done to the prompts: a sentence for each number of examples, the same for every model."""
    found = []
    for row in result["models"][: len(SHOTS)]:
        protocol = row["protocol"]
        text = f"{row['shots']}-shot: prefix token {protocol['prefix_token']}, examples {protocol['examples']}, "
        text += f"{protocol['examples_dropped']:,} of them left out where they did not fit the context, "
        found.append(text + f"{protocol['truncated']:,} questions cut.")
    return html.escape(" ".join(found))


def picture(result: dict):
    """A matplotlib Figure: accuracy of each model without and with examples, and over pre-training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curve) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[3, 2], constrained_layout=True)
    for i, (shots, color) in enumerate(zip(SHOTS, COLORS, strict=False)):
        found = [row["metrics"][row["metric"]] for row in result["models"] if row["shots"] == shots]
        bars.bar(
            [place + 0.38 * i for place in range(len(found))], [f["value"] for f in found], 0.36, color=color,
            yerr=[f["stderr"] for f in found], capsize=3, alpha=0.85, label=f"{shots}-shot",
        )  # fmt: skip
    names = [row["name"] for row in result["models"] if row["shots"] == SHOTS[0]]
    bars.set_xticks([place + 0.19 for place in range(len(names))], names)
    points = [(row["step"], row["metrics"][row["metric"]]) for row in result["curve"]]
    curve.errorbar(
        [step for step, _ in points], [f["value"] for _, f in points], [f["stderr"] for _, f in points], fmt="o-",
        ms=4, capsize=3, color=COLORS[0],
    )  # fmt: skip
    curve.set_xlabel("step of pre-training")
    bars.margins(y=0.2)  # room for the legend
    for axis, title in ((bars, "accuracy ± standard error"), (curve, "zero-shot accuracy over pre-training")):
        axis.axhline(0.25, color="#666666", lw=1, ls=":", label="chance")
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, axis="y")
        axis.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)
    return figure


def reliability(result: dict):
    """A matplotlib Figure: every model's zero-shot reliability diagram."""
    rows = [row for row in result["models"] if row["shots"] == 0]
    return report.reliability_diagram(
        {f"{row['name']} (ECE {row['calibration']['ece']:.3f})": row["calibration"]["reliability"] for row in rows}
    )
