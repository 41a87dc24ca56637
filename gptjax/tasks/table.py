"""Results of tasks, as a table, as files and as a picture of skill over training."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from gptjax import json_files
from gptjax.errors import InputError
from gptjax.evals import calibration
from gptjax.tasks.harness import Result


def table(results: Sequence[Result]) -> str:
    """A line for each metric of each task, with its standard error and, where any has one, its 95 % interval; the
    task's main metric is marked *. Below, each task's `protocol`, and what its figures note."""
    rows = [("task", "shots", "items", "metric", "value", "± s.e.", "95 % interval")]
    for result in results:
        names = sorted(result.metrics, key=lambda name: name != result.metric)
        for i, name in enumerate(names):
            value, error = result.metrics[name]
            first = (result.task, str(result.shots), f"{result.items:,}") if i == 0 else ("", "", "")
            interval = ""
            if figure := result.figures.get(name):
                first = (*first[:2], f"{figure.n:,}")
                interval = "" if math.isnan(figure.low) else f"{number(figure.low)} to {number(figure.high)}"
            shown = "" if figure and math.isnan(error) else errors(result, error)
            rows.append((*first, name + " *" * (i == 0), number(value), shown, interval))
    columns = 7 if any(row[6] for row in rows[1:]) else 6
    rows = [row[:columns] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(columns)]
    left = (True, False, False, True, False, False, True)[:columns]
    lines = [
        "  ".join(c.ljust(w) if lft else c.rjust(w) for c, w, lft in zip(row, widths, left, strict=True)).rstrip()
        for row in rows
    ]
    notes = [note for result in results for note in figure_notes(result)]
    return "\n".join([*lines, *map(protocol, results), *notes])


def figure_notes(result: Result) -> list[str]:
    return [f"{result.task}, {name}, {about}: {text}"
            for name, figure in result.figures.items() for about, text in figure.notes.items()]  # fmt: skip


def errors(result: Result, error: float) -> str:
    """A standard error, or why there is none."""
    return f"n/a ({result.no_error})" if math.isnan(error) else number(error)


def protocol(result: Result) -> str:
    """A line: the files, examples, decoding and prefix token, and what was counted: items cut, examples left out,
    continuations encoded apart from their context, questions not asked, clusters. tasks.json has all of it, templates
    too."""
    given = result.protocol
    parts = [f"{given['kind']}, {', '.join(given['files']) or 'rows of the task file'}"]
    parts += [f"examples: {given['examples']}"] if "examples" in given and result.shots else []
    parts += [given["decoding"]] if "decoding" in given else []
    parts += [f"compared by {_COMPARED[given['decided_by']]}"] if result.figures and "decided_by" in given else []
    parts += [f"prefix token {given['prefix_token'] or 'none'}"] if "prefix_token" in given else []
    parts += [f"{given[key]:,} {text}" for key, text in _COUNTED if given.get(key)]
    parts += [f"{count:,} {why} not asked" for why, count in given.get("not_asked", {}).items()]
    if given.get("clusters", result.items) < result.items:
        parts.append(f"standard errors over {given['clusters']:,} clusters of items")
    return f"{result.task}, {result.shots}-shot: {'; '.join(parts)}"


_COMPARED = {
    "acc": "the sum of log-probabilities",
    "acc_token": "the mean log-probability of a token",
    "acc_norm": "the log-probability per character",
    "acc_bytes": "the log-probability per byte",
    "acc_answer_context": "the log-probability minus that after the answer context",
}
_COUNTED = (
    ("truncated", "items cut on the left"),
    ("examples_dropped", "examples left out of prompts that were too long"),
    ("spanned", "continuations encoded apart from their context, since a token spanned both"),
)


def number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.4g}"


def write(results: Sequence[tuple[int, Result]], folder: Path, about: dict, log_samples: bool) -> None:
    """Writes (step, result) pairs: tasks.json with all metrics and protocols and, if log_samples, a file with a record
    of each item of the last one. Called after each result, so that an error loses none before it."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"step": step, **result.record()} for step, result in results]
    json_files.write_json(folder / "tasks.json", {**about, "results": records})
    if log_samples:
        for step, result in results[-1:]:
            path = folder / f"samples-{result.task}-{result.shots}shot-{step}.jsonl"
            json_files.write_json_lines(path, result.samples)


def plot_reliability(folders: Sequence[Path], path: Path) -> None:
    """A reliability diagram for each task of choices and number of examples in the last of several folders' tasks.json,
    with a curve for each folder: written to path, with the task's name. InputError: a folder without results."""
    found = {}
    for folder in folders:
        try:
            results = json.loads((folder / "tasks.json").read_text())["results"]
        except FileNotFoundError:
            raise InputError(f"{folder} has no tasks.json: run evaluate --tasks with --out={folder} first.") from None
        found[str(folder)] = {(r["task"], r["shots"]): r["calibration"] for r in results if r.get("calibration")}
    for task, shots in found[str(folders[-1])]:
        curves = {name: of[task, shots] for name, of in found.items() if (task, shots) in of}
        calibration.reliability_plot(path.with_name(f"{path.stem}-{task}-{shots}shot{path.suffix}"), curves)


def plot_over_steps(results: Sequence[tuple[int, Result]], path: Path) -> None:
    """A picture of each task's main metric over the steps of training, with a band of two standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(result.task for _, result in results))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(tasks) :]:
        ax.axis("off")
    for ax, task in zip(axes.flat, tasks, strict=False):
        for shots in sorted({result.shots for _, result in results if result.task == task}):
            points = sorted((step, r.metrics[r.metric]) for step, r in results if (r.task, r.shots) == (task, shots))
            steps, values, errors = ([point[0] for point in points], [v for _, (v, _) in points],
                                     [0 if math.isnan(e) else e for _, (_, e) in points])  # fmt: skip
            (line,) = ax.plot(steps, values, marker="o", markersize=3, label=f"{shots}-shot")
            low, high = ([v + side * e for v, e in zip(values, errors, strict=True)] for side in (-2, 2))
            ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        metric = next(result.metric for _, result in results if result.task == task)
        ax.set(title=task, xlabel="step", ylabel=metric)
        ax.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
