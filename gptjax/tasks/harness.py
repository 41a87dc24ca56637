"""A task on a model: K-shot prompts, scores or generated text, metrics with standard errors, and the protocol that they
were computed by."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.evals import superglue
from gptjax.tasks import likelihood
from gptjax.tasks.figures import Figure
from gptjax.tasks.files import find_joined, task_files
from gptjax.tasks.generate import generate_texts
from gptjax.tasks.items import load
from gptjax.tasks.kinds import Scorer, score_generated, score_pairs, score_texts, score_threshold
from gptjax.tasks.prompts import Prompts, cluster_numbers
from gptjax.tasks.requests import prefix_token
from gptjax.tasks.task import Task
from gptjax.trained import Model


def scorer(model: Model, rows: int = 16, seed: int = 0) -> Scorer:
    """A model as a Scorer. rows: computed at a time."""
    return Scorer(
        model.tokenizer,
        model.config.context_length,
        lambda requests: likelihood.log_likelihoods(model, requests, rows=rows),
        lambda prompts, task: generate_texts(model, prompts, task, rows=rows, seed=seed),
    )


@dataclasses.dataclass(frozen=True)
class Result:
    """metrics: {name: (value, standard error)}. protocol: how they were computed, and what was counted on the way.
    samples: a record of each item. calibration, figures: kinds.Scored's."""

    task: str
    shots: int
    items: int
    metric: str
    metrics: dict[str, tuple[float, float]]
    protocol: dict[str, Any]
    samples: list[dict]
    calibration: dict[str, Any] | None = None
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)

    @property
    def no_error(self) -> str:
        """Why standard errors are NaN, where they are: there is but one unit of them."""
        unit = "document" if self.protocol["kind"] == "text" else "item"
        if self.items == 1:
            return f"one {unit}"
        return f"one cluster of {unit}s" if self.protocol.get("clusters") == 1 else "not known"

    def record(self) -> dict:
        """For JSON, without the samples."""
        values = {}
        for name, (value, error) in self.metrics.items():
            values[name] = {"value": value, "stderr": error}
            if math.isnan(error):
                values[name]["no_stderr"] = self.no_error
        for name, figure in self.figures.items():
            values[name] |= {"low": figure.low, "high": figure.high, "items": figure.n}
            values[name] |= {"notes": dict(figure.notes)} if figure.notes else {}
        return {"task": self.task, "shots": self.shots, "items": self.items, "metric": self.metric,
                "metrics": values, "calibration": self.calibration, "protocol": self.protocol}  # fmt: skip


_SCORE = {"text": score_texts, "threshold": score_threshold, "generation": score_generated, "code": score_generated}


def evaluate(scorer: Scorer, task: Task, data: str, *, shots: int = 0, limit: int | None = None,
             seed: int = 0) -> Result:  # fmt: skip
    """A task's result.

    data: a folder with the task's file, or the file. shots: K, the examples in a prompt, drawn at random with `seed`
    from the task's pool, never the item that is asked. limit: only the first so many items. InputError: no file, bad
    rows, a K larger than the pool.
    """
    files, join = task_files(task, data), find_joined(task, data)
    items, not_asked = load(task, *files, join=join)
    asked = items[:limit]
    prompts = Prompts(task, items, data, shots, seed)
    score = _SCORE.get(task.kind, score_pairs)
    found = score(scorer, task, asked, prompts)
    names = [Path(file).name for file in (*files, *([join] if join else []))]
    protocol = {"files": names, **_protocol(scorer, task, prompts), **found.counts, "not_asked": not_asked,
                "clusters": int(cluster_numbers(asked).max()) + 1}  # fmt: skip
    return Result(task.name, shots, len(asked), task.metric, found.metrics, protocol, found.samples, found.calibration,
                  found.figures)  # fmt: skip


def superglue_result(results: Sequence[Result]) -> Result | None:
    """SuperGLUE's score in percent, of eight results of one checkpoint and number of examples among these; None where a
    task of it is not. The standard error is of tasks that are independent, the two metrics of a task counting as one
    and the same: at most that large."""
    found = {result.task: result for result in results if result.task in superglue.METRICS}
    if len(found) < len(superglue.METRICS):
        return None
    of = lambda task, name: found[task].metrics[found[task].metric if name == "accuracy" else name]
    values = {task: {name: 100 * of(task, name)[0] for name in names} for task, names in superglue.METRICS.items()}
    errors = [np.mean([100 * of(task, name)[1] for name in names]) for task, names in superglue.METRICS.items()]
    score = superglue.superglue_score(values), float(np.linalg.norm(errors)) / len(errors)
    items = sum(result.items for result in found.values())
    protocol = {"kind": f"mean of {len(found)} tasks", "files": list(found)}
    return Result("superglue", results[0].shots, items, "score", {"score": score}, protocol, [])


def _protocol(scorer: Scorer, task: Task, prompts: Prompts) -> dict:
    tokenizer = scorer.tokenizer
    protocol = {
        "kind": task.kind,
        "form": [dict(form) for form in task.form],
        "description": task.description,
        "delimiter": task.delimiter,
        "separator": task.separator,
        "examples": prompts.source,
        "seed": prompts.seed,
        "context_length": scorer.context_length,
        "task_file_sha256": task.sha256,
    }
    steps = ("prepare", "detokenize", "units", "answer_context", "extract")
    protocol |= {key: value for key in steps if (value := getattr(task, key)) is not None}
    if task.kind in ("generation", "code"):
        return protocol | {"decoding": _decoding(task), "stop": list(task.stop), "over_answers": task.over_answers,
                           "max_new_tokens": task.max_new_tokens}  # fmt: skip
    protocol["prefix_token"] = None if tokenizer.bos_id is None else tokenizer.token(prefix_token(tokenizer))
    if task.kind in ("choice", "partial"):
        protocol["decided_by"] = task.decision
    return protocol


def _decoding(task: Task) -> str:
    if task.beams > 1:
        return f"beam {task.beams}, length penalty {task.length_penalty}"
    if not task.temperature:
        return "greedy"
    cut = [f"top_k {task.top_k}"] * (task.top_k > 0) + [f"top_p {task.top_p}"] * (task.top_p < 1)
    return ", ".join([f"{task.samples} samples at temperature {task.temperature}", *cut])
